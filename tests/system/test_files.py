"""What is written can be read: every JSON of ours is UTF-8, and names that are none come back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddpm_lmk.rundir.log import METRICS, RunLog, read_lines
from ddpm_lmk.system import files
from ddpm_lmk.system import files as durable

NAMES = ["Nasenrücken", "鼻根点", "b\udcff\udc80.png", "two\u2028lines\u0085 and\n", '"\\udcff"', "\\"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_comes_back_from_a_result_a_manifest_and_a_log(tmp_path: Path, name: str) -> None:
    content = {"name": name, name: [name]}
    files.write_json(tmp_path / "results.json", content)
    durable.write_directory(tmp_path / "step", [], manifest="MANIFEST.json", facts=content)
    log = RunLog(tmp_path, writes=True)
    for step in (1, 2):
        log.metrics({"step": step, **content})
    log.rewind_metrics(1)
    assert durable.read_json(tmp_path / "results.json") == content
    kept = durable.read_manifest(tmp_path / "step", "MANIFEST.json")
    assert {key: kept[key] for key in content} == content
    assert read_lines(tmp_path / METRICS) == [{"step": 1, **content}]
    for path in (tmp_path / "results.json", tmp_path / "step" / "MANIFEST.json", tmp_path / METRICS):
        json.loads(path.read_text("utf-8"))  # one line, or one document


def test_other_text_is_utf8_too_and_legible(tmp_path: Path) -> None:
    files.write_text(tmp_path / "table.csv", "file\nb\udcffü.png\n")
    assert (tmp_path / "table.csv").read_text("utf-8") == "file\nb\\udcffü.png\n"


def test_a_line_that_is_no_whole_text_is_left_out_and_the_others_are_read(tmp_path: Path) -> None:
    lines = '{"step": 1}\n{"step": 2}\n{"name": "Nasenrü'.encode()[:-1]  # cut off within a letter
    (tmp_path / METRICS).write_bytes(lines)
    assert read_lines(tmp_path / METRICS) == [{"step": 1}, {"step": 2}]
