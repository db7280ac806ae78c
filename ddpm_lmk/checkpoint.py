"""Checkpoints (state to resume) and snapshots (weights to use); two different things.

A checkpoint is `checkpoints/step-00001500/{model,ema,optim,best}.safetensors state.json MANIFEST.json`: weights,
moments by parameter name, and counters. It holds no random state and no loader state, because order, augmentation and
noise are functions of (seed, position). A snapshot is `snapshots/step-00006000/{model,ema}.safetensors meta.json`.

There is no pointer to the newest one: the directories are scanned, verified, and the first good one is used. A damaged
checkpoint is renamed to `.bad-*` and the one before it taken. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_lmk import durable
from ddpm_lmk.durable import DamagedError
from ddpm_lmk.errors import CheckpointError

MANIFEST = "MANIFEST.json"
META = "meta.json"
LARGEST_HEADER = 100 << 20  # bytes; the limit of the safetensors format
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file (`model`, `ema`, `optim`, `best`) and the counters of `state.json`."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def step_name(step: int) -> str:
    """Directory name of a checkpoint or snapshot."""
    return f"step-{step:08d}"


def save_checkpoint(directory: Path, tensors: Tensors, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `state["step"]`, then drop all but the newest `keep`.

    Raises:
        OSError: no space or no rights; earlier checkpoints are untouched.
    """
    path = directory / step_name(state["step"])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        return path  # the same step of the same run: verified when it was loaded, or written by this process
    _want_space(directory, tensors)
    files = itertools.chain([("state.json", durable.to_json(state))], _serialized(tensors))
    durable.write_directory(path, files, manifest=MANIFEST, facts={"step": state["step"]})
    for old in _steps(directory)[keep:]:
        _drop(old)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; raises `CheckpointError` when a single byte is not as it was written."""
    try:
        record = durable.read_manifest(path, MANIFEST)
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {}
        for name, data in durable.read_files(path, record):
            if name == "state.json":
                state = json.loads(data)
            else:
                tensors[name.removesuffix(".safetensors")] = _parse(data, name)
        if path.name != step_name(record["step"]) or state.get("step") != record["step"]:
            raise DamagedError(f"the directory says {path.name}, its state step {state.get('step')}")
    except DamagedError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, tensors, state)


def load_latest(directory: Path, *, on_bad: Callable[[Path, str], None]) -> Checkpoint | None:
    """The newest good checkpoint, or None where there never was one.

    Damaged ones are renamed to `.bad-*` and reported to `on_bad(new path, reason)`.

    Raises:
        CheckpointError: there were checkpoints, and all are damaged.
    """
    candidates = _steps(directory)
    reason = ""
    for path in candidates:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            reason = str(error)
            on_bad(_set_aside(path), reason)
    if candidates:
        raise CheckpointError(
            f"none of {len(candidates)} checkpoints in {directory} can be used, the oldest because {reason}; "
            "they are kept there as .bad-*; start again in another --out directory"
        )
    return None


def clean(directory: Path) -> None:
    """Remove what a killed writer left half done; call only with the lock of the run."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def save_snapshot(directory: Path, tensors: Tensors, meta: dict[str, Any]) -> Path:
    """Write weights to use: `model`, and `ema` where there is one, with `meta.json`.

    One that exists for this step is kept, unless it is now `selected` and was not.

    Raises:
        OSError: no space or no rights.
    """
    path = directory / step_name(meta["step"])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        if snapshot_meta(path).get("selected") or not meta.get("selected"):
            return path
        _drop(path)
    _want_space(directory, tensors)
    durable.write_directory(path, _serialized(tensors), manifest=META, facts=meta)
    return path


def load_weights(path: str | Path, use: Literal["ema", "model", "auto"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and their facts from a run directory, a snapshot directory or a `.safetensors` file.

    A run directory stands for its selected snapshot, or its newest. `auto` means the moving average where there is one.
    A bare file has one set of weights, so `use` does not apply, and its facts hold its path only.

    Raises:
        CheckpointError: missing, damaged, malformed, or a pickle, which is refused without being opened.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} may hold code and is not opened; wanted a run, a snapshot or a .safetensors file"
        )
    if path.is_file():
        return _read_bare(path), {"path": str(path)}
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; wanted a run directory, a snapshot or a .safetensors file")
    snapshot = path if (path / META).exists() else find_snapshot(path)
    meta = snapshot_meta(snapshot)
    kind = ("ema" if "ema.safetensors" in meta["files"] else "model") if use == "auto" else use
    wanted = f"{kind}.safetensors"
    if wanted not in meta["files"]:
        raise CheckpointError(
            f"{snapshot} holds {', '.join(meta['files'])} and no {wanted}; choose the other with init.use"
        )
    try:
        [(_, data)] = durable.read_files(snapshot, {"files": {wanted: meta["files"][wanted]}})
        return _parse(data, wanted), {**meta, "path": str(snapshot), "use": kind}
    except DamagedError as error:
        raise CheckpointError(f"{snapshot}: {error}") from None


def snapshot_meta(path: Path) -> dict[str, Any]:
    """The facts of a snapshot directory: step, config, arch, outputs, files; raises `CheckpointError`."""
    try:
        return durable.read_manifest(path, META)
    except DamagedError as error:
        raise CheckpointError(f"{path}: {error}") from None


def find_snapshot(run: Path) -> Path:
    """The selected snapshot of a run directory, or else its newest."""
    found = _steps(run / "snapshots")
    if not found:
        raise CheckpointError(f"{run} has no snapshot yet; wanted a run that has finished, or train.snapshot_every")
    return next((path for path in found if snapshot_meta(path).get("selected")), found[0])


def _steps(directory: Path) -> list[Path]:
    """Complete directories, newest step first."""
    return sorted(
        (path for path in directory.glob("step-*") if path.is_dir()), key=lambda path: path.name, reverse=True
    )


def _serialized(tensors: Tensors) -> Iterator[tuple[str, bytes]]:
    for name, group in tensors.items():
        flat = {key: value.detach().contiguous().cpu() for key, value in group.items()}
        yield f"{name}.safetensors", safetensors.torch.save(flat)


def _parse(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({error})") from None


def _read_bare(path: Path) -> dict[str, Tensor]:
    """Read a file nobody vouches for: its header is checked against the file before anything large is read."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(LARGEST_HEADER, path.stat().st_size - 8):
            raise CheckpointError(f"{path} is not a safetensors file: its header claims {length} bytes")
        try:
            return _parse(head + file.read(), path.name)
        except DamagedError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _want_space(directory: Path, tensors: Tensors) -> None:
    """Refuse early when the file system has less than 1.5 times the room that is needed."""
    needed = int(1.5 * sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
    room = os.statvfs(directory)
    if room.f_bavail * room.f_frsize < needed:
        raise OSError(
            errno.ENOSPC, f"{needed >> 20} MiB wanted, {room.f_bavail * room.f_frsize >> 20} MiB free", str(directory)
        )


def _set_aside(path: Path) -> Path:
    numbered = (path.with_name(f".bad-{path.name}-{n}") for n in itertools.count())
    target = next(candidate for candidate in numbered if not candidate.exists())
    path.rename(target)
    return target


def _drop(path: Path) -> None:
    """Rename first, so that a kill in the middle leaves no half directory with a good name."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
