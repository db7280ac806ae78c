"""Tables of a report: recipes and where they differ within a row, the runs and their pre-training, compute."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from ddpm_lmk.config.load import dump_run, load_run
from ddpm_lmk.report.collect import ENOUGH_IMAGES, SCRATCH, Study, collect, short_pretraining
from ddpm_lmk.report.page import write_report
from ddpm_lmk.report.statistics import difference
from ddpm_lmk.report.tables import compute_table, recipes_table, runs_table, unlike_runs
from tests.known_runs import put, write_sweep

FEW = ["task.codec.sigma_px=3", "train.duration=100 steps", "optim.lr=1e-3"]
MANY = ["task.codec.sigma_px=1.5", "train.duration=300 steps", "optim.lr=1e-3"]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A row whose recipe and weights change between 5 and 10 labels, beside one that has the same recipe throughout."""
    cells = {("scratch", labels, seed): 60.0 - labels + seed for labels in (1, 5, 10) for seed in (0, 1)}
    cells |= {("ours", labels, seed): 40.0 - labels + seed for labels in (1, 5, 10) for seed in (0, 1)}
    settings = {("ours", labels): MANY if labels == 10 else FEW for labels in (1, 5, 10)}
    write_sweep(tmp_path / "sweep", cells, {"scratch": None, "ours": str(tmp_path / "small")}, settings=settings)
    for name, size, images in (("small", 128, 100), ("large", 192, 50)):
        put(tmp_path / name / "metrics.jsonl", "")
        put(tmp_path / name / "results.json", {"kind": "denoise", "train": {"images": images, "tflop": 1.0}})
        put(
            tmp_path / name / "config.yaml",
            f"name: {name}\ndata: {{path: nowhere, image_size: {size}}}\ntask: {{kind: denoise}}\n",
        )
    for seed in (0, 1):
        path = tmp_path / "sweep" / "cells" / f"ours-k10-s{seed}" / "results.json"
        put(path, path.read_text().replace(str(tmp_path / "small"), str(tmp_path / "large")))
    (found,) = collect([tmp_path / "sweep"])
    return found


def test_numbers_of_labels_with_one_recipe_share_a_line_and_what_another_changes_is_said(study: Study) -> None:
    table = recipes_table(study)
    lines = [(line[0], line[1], line[3], line[5]) for line in table.rows]
    assert lines[1:] == [
        ("ours", "1, 5", "100 steps × 32", "spatial, σ 3 px of 256"),
        ("ours", "10", "300 steps × 32", "spatial, σ 1.5 px of 256"),
    ]
    assert lines[0][:2] == ("scratch", "1, 5, 10")
    changes = "task.codec.sigma_px 1.5 instead of 3.0, train.duration 300 steps instead of 100 steps"
    assert f"ours with 10 labels: {changes}." in table.remark
    assert not any(key in table.remark for key in ("scratch", "seed", "optim.lr"))


def test_weights_from_several_pre_trainings_are_all_named_and_paid_for(study: Study, tmp_path: Path) -> None:
    lines = runs_table(study).rows
    assert [line[0] for line in lines] == ["scratch", "ours", "↳ pre-training", "↳ pre-training"]
    assert lines[1][1] == f"{tmp_path / 'small'} (ema), {tmp_path / 'large'} (ema)"
    page = write_report([tmp_path / "sweep"], tmp_path / "report.html")[0].read_text()
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "Recipes method labels network" in text
    assert "ours 150 2 –" in text  # images and TFLOP of both, hours not known
    seeds, _ = difference(study, "ours", SCRATCH, 10)
    assert seeds is not None
    assert (seeds.mean, seeds.count) == (pytest.approx(-2.0), 2)


def test_runs_of_one_row_that_were_not_trained_alike_are_told_before_any_number(study: Study, tmp_path: Path) -> None:
    assert unlike_runs(study) == []
    home = tmp_path / "sweep" / "cells" / "ours-k5-s1"
    put(home / "config.yaml", dump_run(load_run(home / "config.yaml", ["optim.lr=0.5", "runtime.workers=7"])))
    for seed, name in enumerate(("one pack", "another")):
        put(tmp_path / "sweep" / "cells" / f"scratch-k1-s{seed}" / "run.json", {"fingerprint": name})
    (found,) = collect([tmp_path / "sweep"])
    packs, settings = unlike_runs(found)
    assert "with 1 label differ in packed data one pack and another (seed 1)" in packs
    assert "the 2 runs of “ours” with 5 labels differ in optim.lr 0.001 and 0.5 (seed 1)" in settings
    page, _, markdown = write_report([tmp_path / "sweep"], tmp_path / "report.html")
    assert f'<p class="stamp">{settings}</p>' in page.read_text()
    assert settings in markdown.read_text()


def test_a_pre_training_too_short_to_count_on_is_told_below_the_runs(study: Study, tmp_path: Path) -> None:
    assert short_pretraining({"kind": "denoise", "train": {"images": ENOUGH_IMAGES}}) is None
    assert short_pretraining({"kind": "dino", "train": {"images": 100}}) is None
    remark = runs_table(study).remark
    assert remark.startswith("“ours”: pre-trained on 100 images, which may be too few")
    assert "“ours”: pre-trained on 50 images" in remark
    page = write_report([tmp_path / "sweep"], tmp_path / "report.html")[0].read_text()
    assert "pre-trained on 100 images, which may be too few" in page
    assert 'class="stamp"' not in page


def test_compute_is_pre_training_once_and_fine_tuning_per_run(tmp_path: Path) -> None:
    train = {"steps": 59, "images": 1888, "tflop": 12.0, "wall_s": 7200.0}
    put(tmp_path / "parent" / "metrics.jsonl", "")
    put(tmp_path / "parent" / "results.json", {"kind": "denoise", "seed": 7, "train": train})
    put(tmp_path / "parent" / "run.json", {"hardware": {"device": "x86_64", "processes": 2, "threads": 1}})
    cells = {("discs", 5, seed): 20.0 for seed in range(3)}
    write_sweep(tmp_path / "sweep", cells, {"discs": str(tmp_path / "parent")})
    (found,) = collect([tmp_path / "sweep"])
    ((name, *row),) = compute_table(found).rows
    assert name == "discs"
    assert row[:3] == ["1,888", "12", "4"]  # two hours on two processes of a thread
    assert row[3:7] == ["1,500", "–", "0.00347", "0.0104"]
    assert row[7] == "one thread of x86_64"
