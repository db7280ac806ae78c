"""Run files of the version before: read under their old names, one warning, and the same hash."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ddpm_lmk.config import Duration, RunConfig, renamed
from ddpm_lmk.config.load import config_hash, dump_run, is_hash_of, load_run, load_stored
from ddpm_lmk.config.renamed import RENAMED, under_old_names
from ddpm_lmk.config.yaml import dump
from ddpm_lmk.errors import ConfigError

OLD = """\
data: {path: x, workers: 3, leaks: keep}
task: {kind: denoise}
train:
  length: 3 epochs
  log_every: 0 steps
"""
HASH_BEFORE = "519a30dd5251f552"  # of `data.path=x task.kind=denoise model.patch=2`, by version 0.1


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_warned", set())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(OLD.replace("0 steps", "7 steps"))
    return path


def test_old_names_in_files_and_words_mean_the_new_ones_and_one_warning_names_all(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run = load_run(file, ["train.group_size=8", "data.copies=keep"])
    assert (run.train.duration, run.train.global_batch_size) == (Duration(3, "epochs"), 8)
    assert (run.runtime.workers, run.runtime.log_every) == (3, Duration(7))
    assert (run.data.dedup.leakage, run.data.dedup.duplicates) == ("keep", "keep")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for old in ("train.length", "train.group_size", "data.workers", "data.leaks", "data.copies", "train.log_every"):
        assert f"{old} is now {RENAMED[old]}" in record.getMessage()


def test_a_file_may_extend_one_that_uses_the_other_names(file: Path, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("extends: run.yaml\ntrain: {duration: 5 steps}\n")
    assert load_run(tmp_path / "new.yaml").train.duration == Duration(5)
    (tmp_path / "old.yaml").write_text("extends: new.yaml\ntrain: {length: 6 steps}\n")
    assert load_run(tmp_path / "old.yaml", ["runtime.workers=1"]).train.duration == Duration(6)


def test_an_empty_section_takes_settings_that_moved_into_it(file: Path) -> None:
    file.write_text(file.read_text() + "runtime:\n")
    assert load_run(file).runtime.workers == 3


def test_a_setting_under_both_names_is_refused(file: Path) -> None:
    file.write_text(OLD + "  duration: 4 steps\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.length is now train\.duration, and both are given"):
        load_run(file)


def test_a_wrong_value_under_an_old_name_is_named_with_its_new_name_and_line(file: Path) -> None:
    file.write_text(OLD.replace("3 epochs", "3 years"))
    with pytest.raises(ConfigError, match=r"line 4: train\.duration='3 years'"):
        load_run(file)


@pytest.mark.parametrize(
    "data", ["data: 5\n", "data: {path: x, packed: 3}\n", "runtime: 5\ndata: {path: x, workers: 1}\n"]
)
def test_nonsense_under_an_old_name_is_a_mistake_and_no_crash(file: Path, data: str) -> None:
    file.write_text(data + "task: {kind: denoise}\n")
    with pytest.raises(ConfigError):
        load_run(file)


def test_settings_stored_by_the_version_before_are_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunConfig.model_validate({"data": {"path": "x"}, "task": {"kind": "denoise"}, "runtime": {"workers": 9}})
    before = under_old_names(run.model_dump(mode="json"))
    assert before["data"]["workers"] == 9
    assert "runtime" not in before
    assert RunConfig.model_validate(before) == run
    (tmp_path / "config.yaml").write_text(dump(before))
    assert load_stored(tmp_path) == run
    assert not caplog.records


def test_a_run_is_known_by_the_hash_of_either_version() -> None:
    fields = {"data": {"path": "x"}, "task": {"kind": "denoise"}, "model": {"pixel_unshuffle": 2}}
    run = RunConfig.model_validate(fields)
    assert is_hash_of(HASH_BEFORE, run)
    assert is_hash_of(config_hash(run), run)
    assert not is_hash_of(HASH_BEFORE, run.model_copy(update={"seed": 1}))
    assert not is_hash_of(None, run)


def test_a_written_run_file_uses_new_names_only() -> None:
    run = RunConfig.model_validate({"data": {"path": "x"}, "task": {"kind": "denoise"}})
    written = dump_run(run)
    assert under_old_names(run.model_dump(mode="json")) != run.model_dump(mode="json")
    for new in RENAMED.values():
        assert f"{new.rpartition('.')[2]}:" in written
