"""Weights to use: which snapshot a run stands for, what of it is damaged, and bare files of weights."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.rundir import checkpoint
from ddpm_lmk.rundir.checkpoint import load_weights, save_snapshot
from ddpm_lmk.system import files
from tests.rundir.test_checkpoint import flip_a_bit


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 4), float(step)).t(), "n": torch.tensor(step)}, "optim": {}}


def snapshot(run: Path, step: int, *, selected: bool = True, ema: bool = True) -> Path:
    files = {"model": {"w": torch.tensor([float(step)])}}
    if ema:
        files["ema"] = {"w": torch.tensor([step + 0.5])}
    return save_snapshot(run / "snapshots", files, {"step": step, "selected": selected, "out_channels": 1})


def test_a_run_directory_stands_for_its_selected_snapshot(tmp_path: Path) -> None:
    snapshot(tmp_path, 10)
    snapshot(tmp_path, 20, selected=False)
    weights, meta = load_weights(tmp_path, "ema")
    assert weights["w"].item() == 10.5
    assert (meta["step"], meta["use"]) == (10, "ema")


def test_without_a_selected_snapshot_the_newest_is_taken(tmp_path: Path) -> None:
    snapshot(tmp_path, 9, selected=False)
    snapshot(tmp_path, 10, selected=False)
    assert load_weights(str(tmp_path), "model")[0]["w"].item() == 10.0


def test_a_snapshot_becomes_the_selected_one_later(tmp_path: Path) -> None:
    path = snapshot(tmp_path, 10, selected=False)
    assert snapshot(tmp_path, 10) == path
    assert checkpoint.snapshot_meta(path)["selected"]
    assert [p.name for p in path.parent.iterdir()] == ["step-00000010"]


def test_a_snapshot_stays_until_the_one_in_its_place_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = snapshot(tmp_path, 10, selected=False)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        with pytest.raises(OSError, match="full"):
            snapshot(tmp_path, 10)
    assert not checkpoint.snapshot_meta(path)["selected"]
    assert load_weights(path, "ema")[0]["w"].item() == 10.5


def refuse(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "full")


def test_a_damaged_snapshot_is_written_anew(tmp_path: Path) -> None:
    path = snapshot(tmp_path, 10)
    (path / "meta.json").write_text("{")
    snapshot(tmp_path, 10, selected=False)
    assert load_weights(path, "ema")[0]["w"].item() == 10.5


def test_weights_that_are_not_there_are_not_replaced_by_others(tmp_path: Path) -> None:
    path = snapshot(tmp_path, 10, ema=False)
    with pytest.raises(CheckpointError, match=r"no ema\.safetensors; choose the other with init\.use"):
        load_weights(path, "ema")
    assert load_weights(path, "auto")[1]["use"] == "model"


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    path = snapshot(tmp_path, 10)
    flip_a_bit("ema.safetensors")(path)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        load_weights(path, "ema")
    assert load_weights(path, "model")[0]["w"].item() == 10.0


def test_a_bare_file_of_weights_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    weights, meta = load_weights(path, "ema")
    assert weights["w"].tolist() == [1.0, 1.0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta == {"path": str(path), "files": {path.name: {"size": path.stat().st_size, "sha256": digest}}}


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"{{{{"],
)
def test_a_malformed_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(path, "model")


@pytest.mark.parametrize("suffix", checkpoint.PICKLES)
def test_a_pickle_is_refused_without_being_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="may hold code and is not opened"):
        load_weights(path, "model")


def test_what_does_not_exist_or_is_unfinished_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere", "model")
    with pytest.raises(CheckpointError, match="no snapshot yet"):
        load_weights(tmp_path, "model")
