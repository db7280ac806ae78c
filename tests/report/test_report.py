"""Reports: figures of known runs come out as they went in, the page stands alone, and what is missing is said."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.report.collect import collect, paper_rows
from ddpm_lmk.report.page import write_report
from ddpm_lmk.report.pictures import featured_shots
from ddpm_lmk.report.tables import update_between_markers
from tests.known_runs import put, write_run, write_sweep


@pytest.fixture
def known_sweep(tmp_path: Path) -> Path:
    """Scratch is off by 40, 50 and 60 px (4, 5, 6 mm), pre-trained by 20, 21 and 22 px, with 5 labels; 10 is closer."""
    cells = {("scratch", 5, seed): 40 + 10 * seed for seed in range(3)}
    cells |= {("isbi", 5, seed): 20 + seed for seed in range(3)}
    cells |= {("isbi", 10, 0): 10.0, ("scratch", 10, 0): 30.0}
    parent = tmp_path / "pretrained"
    lines = [{"step": step, "images": 32 * step, "loss": 1 / step} for step in range(1, 60)]
    put(parent / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    put(parent / "results.json", {"kind": "denoise", "seed": 7, "train": {"steps": 59, "images": 1888}})
    write_sweep(tmp_path / "sweep", cells, {"scratch": None, "isbi": str(parent)})
    return tmp_path / "sweep"


def test_means_and_spreads_of_known_runs_are_their_closed_forms(known_sweep: Path) -> None:
    (study,) = collect([known_sweep])
    scratch = study.score("scratch", 5, "original")
    assert scratch is not None
    assert (scratch.unit, scratch.mre) == ("mm", pytest.approx((5.0, 1.0, 3)))
    isbi = study.score("isbi", 5, "original")
    assert isbi is not None
    assert isbi.mre == pytest.approx((2.1, 0.1, 3))
    assert isbi.sdr["2"][0] == pytest.approx(100 / 3)  # 2.0 mm is within 2 mm, 2.1 and 2.2 are not
    single = study.score("isbi", 10, "original")
    assert single is not None
    assert single.mre == (pytest.approx(1.0), None, 1)
    assert study.starts == ["scratch", "isbi"]
    assert study.best_start(5) == "isbi"


def test_every_number_of_labels_has_a_mean_shape_row_and_the_papers_own(known_sweep: Path) -> None:
    (study,) = collect([known_sweep])
    rows = [(row.training, row.kind, row.method) for row in study.rows()]
    for labels in (5, 10):
        here = [row[1:] for row in rows if row[0] == labels]
        assert here[:3] == [("mean shape", "mean shape"), ("run", "scratch"), ("run", "isbi")]
        assert ("paper", "the paper, pre-trained") in here
    assert "paper" not in {row.kind for row in study.rows(with_paper=False)}


def test_the_papers_figures_are_those_of_its_tables() -> None:
    ceph = {row.training: row for row in paper_rows("cephalometric", ["Our method"])}
    assert ceph[10].scores["paper"].mre == (3.52, 0.0, 3)
    assert ceph[10].validation == 20
    assert {key: rate[0] for key, rate in ceph[50].scores["paper"].sdr.items()} == {
        "2": 44.91,
        "2.5": 62.84,
        "3": 72.82,
        "4": 85.81,
    }
    assert paper_rows("someone-elses-knees") == []


def test_runs_that_used_validation_labels_stand_in_a_row_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "without", errors_px=np.full(3, 10.0))
    write_run(tmp_path / "with", errors_px=np.full(3, 8.0), validation=20)
    (study,) = collect([tmp_path / "without", tmp_path / "with"])
    rows = [(row.validation, row.scores["original"].mre[0]) for row in study.rows() if row.kind == "run"]
    assert rows == [(0, pytest.approx(1.0)), (20, pytest.approx(0.8))]


class Links(HTMLParser):
    """Collects what a browser would fetch, and the text it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data")]
        self.text += [tag] if tag in ("script", "link", "iframe") else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_shows_the_numbers(known_sweep: Path, tmp_path: Path) -> None:
    html, table, markdown = write_report([known_sweep], tmp_path / "out" / "report.html")
    content = html.read_text()
    page = Links()
    page.feed(content)
    assert all(target.startswith(("#", "data:")) for target in page.targets)
    assert not {"script", "link", "iframe"} & set(page.text)
    assert not re.search(r"url\((?!#)|@import", content)
    text = " ".join(" ".join(page.text).split())
    for words in ("5.00 ±1.00", "2.10 ±0.10", "mean shape", "the paper, pre-trained", "2 of 2 numbers"):
        assert words in text, words
    for title in ("Cumulative error", "Pre-training", "Fine-tuning", "Landmark by landmark", "1. sella", "x86_64"):
        assert title in text, title
    assert "The pictures are not at hand" in text
    with table.open() as file:
        rows = list(csv.DictReader(file))
    found = [
        row for row in rows if (row["start"], row["labels_training"], row["protocol"]) == ("scratch", "5", "original")
    ]
    assert [(row["mre"], row["mre_std"], row["runs"]) for row in found] == [("5", "1", "3")]
    assert "| 5 | 0 | scratch | 3 | 5.00 ± 1.00 |" in markdown.read_text()


def test_reports_are_the_same_bytes_every_time(known_sweep: Path, tmp_path: Path) -> None:
    first, second = (write_report([known_sweep], tmp_path / name / "report.html")[0] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_overlays_show_best_median_and_worst_picture_from_the_packed_data(tmp_path: Path) -> None:
    pack("skull", tmp_path / "data", PackSettings(kind="phantom", counts={"train": 2, "test": 5}, size=64), workers=1)
    manifest = Manifest.open(tmp_path / "data")
    records = [manifest.read_record(int(row)) for row in manifest.rows(["test"])]
    truth = {r.id: (r.points, r.native_size, r.mm_per_px) for r in records}
    errors = np.array([3.0, 9.0, 1.0, 5.0, 7.0])
    write_run(tmp_path / "run", errors_px=errors, spec=manifest.spec, truth=truth, data=tmp_path / "data")
    html = write_report([tmp_path / "run"], tmp_path / "report.html")[0].read_text()
    ids = sorted(truth)
    shown = re.findall(r"<strong>(\w+)</strong> ([^:]+):", html)
    by_error = sorted(zip(errors * [truth[name][2] for name in ids], ids))
    assert shown == [("best", by_error[0][1]), ("median", by_error[2][1]), ("worst", by_error[4][1])]
    assert html.count("data:image/jpeg;base64,") == 3


def test_a_set_without_thresholds_has_no_empty_columns_of_success_rates(tmp_path: Path) -> None:
    spec = DatasetSpec(name="mine", landmark_names=("Nasenrücken", "鼻根点"))
    write_run(tmp_path / "run", errors_px=np.array([3.0, 4.0]), spec=spec)
    for path in write_report([tmp_path / "run"], tmp_path / "report.html"):
        text = path.read_text("utf-8")
        if path.suffix in (".html", ".md"):
            table = text[text.index("<table") :] if path.suffix == ".html" else text
            assert "3.50" in table
            assert "SDR" not in re.sub(r"(?s)<p.*?</p>|<figcaption.*?</figcaption>", "", table)
            assert 'colspan="0"' not in table
    assert "鼻根点" in (tmp_path / "report.html").read_text("utf-8")


def test_folders_that_hold_nothing_to_report_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a sweep"):
        write_report([tmp_path], tmp_path / "report.html")
    put(tmp_path / "results.json", {"kind": "denoise"})
    with pytest.raises(DataError, match="run of kind denoise"):
        write_report([tmp_path], tmp_path / "report.html")
    pending = {"kind": "sweep", "name": "s", "cells": [{"cell": "scratch-k1-s0", "start": "scratch"}]}
    put(tmp_path / "sweep.json", pending)
    with pytest.raises(DataError, match="no finished fine-tuning run"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_table_is_put_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    assert update_between_markers(readme, "table", "| new \\1 |\n")
    assert readme.read_text() == "before\n<!-- table -->\n| new \\1 |\n<!-- /table -->\nafter\n"
    assert not update_between_markers(readme, "table", "| new \\1 |")
    with pytest.raises(ConfigError, match="<!-- other -->"):
        update_between_markers(readme, "other", "x")


def test_three_numbers_of_labels_are_featured() -> None:
    assert featured_shots([1, 5, 10, 25, 50]) == [1, 10, 50]
    assert featured_shots([5, 10]) == [5, 10]
