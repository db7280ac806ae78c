"""What is written can be read: every JSON of ours is UTF-8, and names that are none come back as they were."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from ddpm_lmk.errors import ResourceError
from ddpm_lmk.rundir.log import METRICS, RunLog, read_lines
from ddpm_lmk.system import files

NAMES = ["Nasenrücken", "鼻根点", "b\udcff\udc80.png", "two\u2028lines\u0085 and\n", '"\\udcff"', "\\"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_comes_back_from_a_result_a_manifest_and_a_log(tmp_path: Path, name: str) -> None:
    content = {"name": name, name: [name]}
    files.write_json(tmp_path / "results.json", content)
    files.write_directory(tmp_path / "step", [], manifest="MANIFEST.json", facts=content)
    log = RunLog(tmp_path, writes=True)
    for step in (1, 2):
        log.metrics({"step": step, **content})
    log.rewind_metrics(1)
    assert files.read_json(tmp_path / "results.json") == content
    kept = files.read_manifest(tmp_path / "step", "MANIFEST.json")
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


@pytest.mark.parametrize("may_replace", [True, False])
def test_a_file_is_whole_or_absent_and_for_its_owner_only(tmp_path: Path, may_replace: bool) -> None:
    path = tmp_path / "folder" / "file"
    with files.open_whole(path, may_replace=may_replace) as file:
        file.write(b"old")
        assert not path.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ZeroDivisionError), files.open_whole(path, may_replace=may_replace) as file:
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"old"
    refused = nullcontext() if may_replace else pytest.raises(ResourceError, match="File exists")
    with refused, files.open_whole(path, may_replace=may_replace) as file:
        file.write(b"new")
    assert path.read_bytes() == (b"new" if may_replace else b"old")
    assert list(path.parent.iterdir()) == [path]
