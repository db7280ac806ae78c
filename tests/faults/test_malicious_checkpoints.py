"""Code hidden in what looks like a checkpoint: nothing runs, wherever a loader might look, and the exit code is 4."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.rundir.checkpoint import load_latest, load_weights, save_checkpoint, save_snapshot
from ddpm_lmk.system import files


class Gadget:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (self.mark,))


def poison(mark: Path) -> bytes:
    return pickle.dumps(Gadget(mark))


def archive(mark: Path) -> bytes:
    """What torch.save writes, with a gadget inside."""
    buffer = io.BytesIO()
    torch.save({"w": Gadget(mark)}, buffer)
    return buffer.getvalue()


def array(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Gadget(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


CONTENTS = {"pickle": poison, "torch.save": archive, "numpy": array}
NAMES = [
    "weights.pt",
    "weights.pth",
    "pytorch_model.bin",
    "last.ckpt",
    "model.pkl",
    "model",
    "model.safetensors",
    "x.npy",
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_under_any_name(tmp_path: Path, name: str, content: str) -> None:
    path, mark = tmp_path / name, tmp_path / "ran"
    path.write_bytes(CONTENTS[content](mark))
    with pytest.raises(CheckpointError) as error:
        load_weights(path, "auto")
    assert error.value.exit_code == 4
    assert not mark.exists()
    pickle.loads(poison(mark))  # noqa: S301  (the gadget works)
    assert mark.exists()


DIRECTORIES = {
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
    "DeepSpeed": ["latest", "zero_to_fp32.py", "global_step1/mp_rank_00_model_states.pt"],
    "Accelerate": ["random_states_0.pkl", "optimizer.bin", "custom_checkpoint_0.pkl", "model.safetensors"],
}


@pytest.mark.parametrize("tool", DIRECTORIES)
def test_a_directory_of_another_tool(tmp_path: Path, tool: str) -> None:
    mark, place = tmp_path / "ran", tmp_path / "checkpoint"
    for name in DIRECTORIES[tool]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(poison(mark))
    with pytest.raises(CheckpointError, match=f"is a checkpoint of {tool} .* may hold code"):
        load_weights(place, "auto")
    assert not mark.exists()


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
def test_a_file_of_our_own_checkpoint_exchanged_and_signed_anew(tmp_path: Path, name: str, content: str) -> None:
    mark = tmp_path / "ran"
    group = {"w": torch.ones(2)}
    path = save_checkpoint(tmp_path / "checkpoints", {"model": group, "optim": group}, {"step": 1})
    exchange(path, name, CONTENTS[content](mark), manifest="MANIFEST.json")
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path / "checkpoints", on_bad=lambda path, reason: None)
    assert error.value.exit_code == 4
    assert not mark.exists()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_of_our_own_snapshot_exchanged_and_signed_anew(tmp_path: Path, content: str) -> None:
    mark = tmp_path / "ran"
    path = save_snapshot(tmp_path / "snapshots", {"model": {"w": torch.ones(2)}}, {"step": 1, "selected": True})
    exchange(path, "model.safetensors", CONTENTS[content](mark), manifest="meta.json")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(tmp_path, "auto")
    assert not mark.exists()


def exchange(path: Path, name: str, content: bytes, *, manifest: str) -> None:
    """As somebody does who knows how a manifest is made: the sums are right, only the content is not."""
    (path / name).write_bytes(content)
    if name == manifest:
        return
    record = files.read_manifest(path, manifest)
    record["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / manifest).write_bytes(files.to_json({**record, "digest": files.digest(record)}))


def test_a_step_directory_that_holds_only_foreign_files(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "checkpoints" / "step-00000009"
    path.mkdir(parents=True)
    with zipfile.ZipFile(path / "optimizer.bin", "w") as file:
        file.writestr("archive/data.pkl", poison(mark))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: No such file"):
        load_latest(tmp_path / "checkpoints", on_bad=lambda path, reason: None)
    assert not mark.exists()
