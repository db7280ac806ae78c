"""Checkpoints and snapshots: complete or absent, verified to the last bit, never unpickled."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.errors import CheckpointError, ResourceError, RunConflictError
from ddpm_lmk.rundir import checkpoint, retention
from ddpm_lmk.rundir.checkpoint import load_latest, save_checkpoint
from ddpm_lmk.system import files
from ddpm_lmk.system import files as privacy


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 4), float(step)).t(), "n": torch.tensor(step)}, "optim": {}}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, tensors(step), {"step": step, "best": None})


def unused(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} was found bad: {reason}")


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = load_latest(tmp_path, on_bad=unused)
    assert found is not None
    assert found.state == {"step": 7, "best": None}
    assert torch.equal(found.tensors["model"]["a"], tensors(7)["model"]["a"])
    assert found.tensors["optim"] == {}
    assert sorted(p.name for p in found.path.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optim.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize(("shared", "modes"), [("0", (0o700, 0o600)), ("1", (0o770, 0o660))])
def test_a_checkpoint_is_for_its_owner_unless_the_run_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, modes: tuple[int, int]
) -> None:
    monkeypatch.setenv(privacy.SHARE, shared)
    before = os.umask(0)
    try:
        save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    path = tmp_path / "checkpoints" / "step-00000001"
    assert {folder.stat().st_mode & 0o777 for folder in (path, path.parent)} == {modes[0]}
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {modes[1]}


def test_there_is_none_in_an_empty_directory(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", on_bad=unused) is None


def flip_a_bit(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 4
        (path / name).write_bytes(data)

    return damage


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 40)


def remove(path: Path) -> None:
    (path / "optim.safetensors").unlink()


def empty_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text("")


def list_nothing(path: Path) -> None:
    record = {"format": 1, "step": 2, "files": {}}
    (path / "MANIFEST.json").write_bytes(files.to_json({**record, "digest": "0"}))


def name_a_file_outside(path: Path) -> None:
    record = files.read_manifest(path, "MANIFEST.json")
    record["files"]["../step-00000001/model.safetensors"] = record["files"].pop("model.safetensors")
    sign(path, record)


def sign(path: Path, record: dict[str, Any]) -> None:
    """Write a manifest as somebody would who knows how its digest is made."""
    (path / "MANIFEST.json").write_bytes(files.to_json({**record, "digest": files.digest(record)}))


def exchange_the_whole_for_a_link(path: Path) -> None:
    elsewhere = path.rename(path.parent / "elsewhere")
    path.mkdir()
    for file in elsewhere.iterdir():
        (path / file.name).symlink_to(file)


def exchange_for_a_pipe(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")  # reading it would wait for ever


def exchange_for_a_link(path: Path) -> None:
    file = path / "model.safetensors"
    file.rename(path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


DAMAGES = [
    flip_a_bit("model.safetensors"),
    flip_a_bit("state.json"),
    flip_a_bit("MANIFEST.json"),
    truncate,
    remove,
    empty_manifest,
    list_nothing,
    exchange_for_a_link,
    exchange_the_whole_for_a_link,
    exchange_for_a_pipe,
    name_a_file_outside,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    bad: list[str] = []
    found = load_latest(tmp_path, on_bad=lambda path, reason: bad.append(path.name))
    assert found is not None
    assert found.state["step"] == 1
    assert bad == [".bad-step-00000002-0"]
    assert (tmp_path / bad[0]).is_dir()
    save(tmp_path, 2)
    found = load_latest(tmp_path, on_bad=unused)
    assert found is not None
    assert found.state["step"] == 2


def test_when_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for path in list(tmp_path.iterdir()):
        truncate(path)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints") as error:
        load_latest(tmp_path, on_bad=lambda path, reason: None)
    assert error.value.exit_code == 4


def test_a_link_to_a_checkpoint_is_none(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 2)
    save(tmp_path / "own", 1)
    (tmp_path / "own" / "step-00000002").symlink_to(tmp_path / "elsewhere" / "step-00000002")
    found = load_latest(tmp_path / "own", on_bad=unused)
    assert found is not None
    assert found.state["step"] == 1


def test_all_damaged_stays_an_error_the_next_time(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(tmp_path / "step-00000001")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of 1 checkpoints"):
            load_latest(tmp_path, on_bad=lambda path, reason: None)


@pytest.mark.parametrize("found", [0, 99, None, "1"])
def test_a_checkpoint_of_another_format_says_so_and_stays_where_it_is(tmp_path: Path, found: Any) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002"
    sign(path, {**files.read_manifest(path, "MANIFEST.json"), "format": found})
    with pytest.raises(CheckpointError, match=f"has format {found!r}, this version of ddpm-lmk reads format 1; use"):
        load_latest(tmp_path, on_bad=unused)
    assert path.is_dir()


def test_what_is_parsed_is_what_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file exchanged the moment its sum was right changes nothing: it is not opened a second time."""
    save(tmp_path, 1)
    parse = checkpoint.parse

    def exchange_and_parse(data: bytes, name: str) -> dict[str, torch.Tensor]:
        (tmp_path / "step-00000001" / name).write_bytes(b"something else")
        return parse(data, name)

    monkeypatch.setattr(checkpoint, "parse", exchange_and_parse)
    found = load_latest(tmp_path, on_bad=unused)
    assert found is not None
    assert torch.equal(found.tensors["model"]["a"], tensors(1)["model"]["a"])


def test_a_manifest_says_what_network_run_and_session_it_is_of(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tensors(1), {"step": 1}, facts={"config": "c0", "incarnation": "i0"})
    record = files.read_manifest(path, "MANIFEST.json")
    other = save_checkpoint(tmp_path, {"model": {"a": torch.zeros(4, 4)}}, {"step": 2})
    assert (record["config"], record["incarnation"]) == ("c0", "i0")
    assert record["arch"] != files.read_manifest(other, "MANIFEST.json")["arch"]


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def stale(*place: Any, **more: Any) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", stale)
        with pytest.raises(ResourceError, match="cannot be read now"):
            load_latest(tmp_path, on_bad=unused)
    assert load_latest(tmp_path, on_bad=unused) is not None


def test_a_directory_taken_over_gets_no_checkpoint(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise RunConflictError("somebody else works here")

    with pytest.raises(RunConflictError):
        save_checkpoint(tmp_path, tensors(1), {"step": 1}, fence=taken_over)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-99").mkdir()
    (tmp_path / ".trash-step-00000000-99").mkdir()
    found = load_latest(tmp_path, on_bad=unused)
    assert found is not None
    retention.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_no_room_leaves_the_previous_one_and_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(path: Path) -> Any:
        return os.statvfs_result((4096, 4096, 10, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr(checkpoint.os, "statvfs", full)
    with pytest.raises(OSError, match="MiB free"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
