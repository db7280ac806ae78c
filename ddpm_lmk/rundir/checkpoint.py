"""Checkpoints (state to resume) and snapshots (weights to use); two different things.

A checkpoint is `checkpoints/step-00001500/{model,ema,optim,best}.safetensors state.json MANIFEST.json`: weights,
moments by parameter name, and counters. It holds no random state and no loader state, because order, augmentation and
noise are functions of (seed, position). A snapshot is `snapshots/step-00006000/{model,ema}.safetensors meta.json`.

There is no pointer to the newest one: the directories are scanned, verified, and the first good one is used. A damaged
checkpoint is renamed to `.bad-*` and the one before it taken; one of another format stays where it is and is an error.
Nothing is pickled or unpickled. Which checkpoints stay is `retention`'s.

Tensors are in the safetensors format, written in pieces and read from memory: the library's own writer makes a second
copy of everything before the first byte can be hashed, `pieces` hands out the memory of the tensors one after the
other. The format: 8 bytes of header length, a JSON header of names, types, shapes and byte ranges, padded to 8 bytes,
then the tensors, widest type first so that each is aligned. Reading is the library's, after the header's length was
checked against the data and a limit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_lmk.errors import CheckpointError, ResourceError
from ddpm_lmk.models.weights import architecture_hash
from ddpm_lmk.rundir import retention
from ddpm_lmk.rundir.retention import step_name
from ddpm_lmk.system import files
from ddpm_lmk.system.files import Content, DamagedError, OtherFormatError

LARGEST_HEADER = 8 << 20  # bytes, of about 100 per tensor; the library would take 100 MB and need a GB to parse it
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}


def pieces(group: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file holding `group`; what is not contiguous on the host is copied when its turn comes."""
    # Widest type first, then by name: every tensor is aligned, and equal tensors make equal bytes.
    ordered = sorted(group, key=lambda name: (-group[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in ordered:
        tensor = group[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The first tensor begins at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in ordered:
        # Here and not before the header: one tensor at a time is on its way to the disk.
        flat = group[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def parse(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a file's bytes; raises `DamagedError` for anything that is not a safetensors file."""
    _header_length(data[:8], len(data), name)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({error})") from None


def read(file: BinaryIO, size: int, name: str) -> dict[str, Tensor]:
    """The tensors of an open file of `size` bytes nobody vouches for; they are read only if they fill the file."""
    head, text, _ = _read_header(file, size, name)
    return parse(head + text + file.read(), name)


def header(file: BinaryIO, size: int, name: str) -> dict[str, Tensor]:
    """The tensors of an open file, as names, types and shapes: they lie on the device `meta`, nothing else is read."""
    _, _, entries = _read_header(file, size, name)
    try:
        return {
            key: torch.empty([int(side) for side in entry["shape"]], dtype=TYPES[entry["dtype"]], device="meta")
            for key, entry in entries.items()
        }
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({type(error).__name__} in its header)") from None


def _read_header(file: BinaryIO, size: int, name: str) -> tuple[bytes, bytes, dict[str, Any]]:
    """Length and text of the header, and its entries by name of tensor."""
    head = file.read(8)
    text = file.read(_header_length(head, size, name))
    try:
        entries = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        filled = 8 + len(text) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({type(error).__name__} in its header)") from None
    # A header can claim anything: nothing is read, or allocated, by its word alone.
    if filled != size:
        raise DamagedError(f"{name} is not a safetensors file: it has {size} bytes, its header lists {filled}")
    return head, text, entries


def _header_length(head: bytes, size: int, name: str) -> int:
    """What the first 8 bytes of a file of `size` bytes say."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise DamagedError(f"{name} is not a safetensors file: its header claims {length} bytes")
    return length


MANIFEST = "MANIFEST.json"
META = "meta.json"
SUFFIX = ".safetensors"
# A folder as the Hugging Face hub has it; in ours, `config.json` is the manifest (`report.hub`).
HUB, HUB_WEIGHTS, LIBRARY = "config.json", "model.safetensors", "ddpm-lmk"
RUNS_SHOWN = 6
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp", ".npz", ".npy", ".joblib", ".tar", ".zip")
FOREIGN = {  # what other tools leave in a directory, by a name only they use
    ".metadata": "torch.distributed.checkpoint",
    "latest": "DeepSpeed",
    "zero_to_fp32.py": "DeepSpeed",
    "random_states_0.pkl": "Accelerate",
    "optimizer.bin": "Accelerate",
    "custom_checkpoint_0.pkl": "Accelerate",
}

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file (`model`, `ema`, `optim`, `best`) and the counters of `state.json`."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class UnusableError(CheckpointError):
    """A checkpoint that is damaged, so that an older one is the next best."""


def save_checkpoint(
    directory: Path,
    tensors: Tensors,
    state: dict[str, Any],
    *,
    facts: dict[str, Any] | None = None,
    fence: Callable[[], None] | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]`.

    Args:
        facts: more for the manifest, beside step and architecture.
        fence: see `files.write_directory`.

    Raises:
        OSError: no space or no rights; earlier checkpoints are untouched.
    """
    path = directory / step_name(state["step"])
    directory.mkdir(parents=True, exist_ok=True, mode=files.folder_mode())
    if path.exists():
        return path  # the same step of the same run: verified when it was loaded, or written by this process
    _check_space(directory, tensors)
    # In the manifest, so that a checkpoint of another network is known without reading it.
    arch = architecture_hash({name: tuple(value.shape) for name, value in tensors["model"].items()})
    content = itertools.chain([("state.json", [files.to_json(state)])], _serialized(tensors))
    known = {"step": state["step"], "arch": arch, **(facts or {})}
    files.write_directory(path, content, manifest=MANIFEST, facts=known, fence=fence)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UnusableError: a single byte is not as it was written.
        CheckpointError: it is of a format this version does not read.
        ResourceError: the disk does not answer.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    with _refusing(path, UnusableError):
        record = files.read_manifest(path, MANIFEST)
        for name, data in files.read_files(path, record):
            if name == "state.json":
                state = _parse_state(data)
            else:
                tensors[name.removesuffix(SUFFIX)] = parse(data, name)
        step = state.get("step")
        # A folder that was renamed, or a manifest of another folder, has right digests and is wrong.
        if record.get("step") != step or not isinstance(step, int) or path.name != step_name(step):
            raise DamagedError(f"the directory says {path.name}, its manifest {record.get('step')}, its state {step}")
    return Checkpoint(path, tensors, state)


def load_latest(directory: Path, *, on_bad: Callable[[Path, str], None]) -> Checkpoint | None:
    """The newest good checkpoint, or None where there never was one.

    Damaged ones are renamed to `.bad-*` and reported to `on_bad(new path, reason)`.

    Raises:
        CheckpointError: there were checkpoints, and all are damaged; or the newest is of another format.
        ResourceError: the disk does not answer.
    """
    reason = ""
    # No pointer to the newest: it would be one more file that can be torn.
    for path in retention.complete(directory):
        try:
            return load_checkpoint(path)
        except UnusableError as error:
            reason = str(error)
            on_bad(_set_aside(path), reason)
    # Starting anew would look like success, and days of training would be gone without a word.
    bad = list(directory.glob(".bad-*"))
    if bad:
        raise CheckpointError(
            f"none of {len(bad)} checkpoints in {directory} can be used"
            f"{f', the oldest because {reason}' if reason else ''}; "
            "they are kept there as .bad-*; start again in another --out directory"
        )
    return None


def newest_where(directory: Path, is_wanted: Callable[[dict[str, Any]], bool]) -> Path | None:
    """The newest undamaged checkpoint whose `state.json` is wanted; nothing is set aside."""
    for path in retention.complete(directory):
        with contextlib.suppress(CheckpointError):
            if is_wanted(load_checkpoint(path).state):
                return path
    return None


def save_snapshot(
    directory: Path, tensors: Tensors, meta: dict[str, Any], *, fence: Callable[[], None] | None = None
) -> Path:
    """Write weights to use: `model`, and `ema` where there is one, with `meta.json`.

    One that exists for this step is kept, unless it is damaged, or is now `selected` and was not; then it goes when the
    new one is written.

    Args:
        fence: see `files.write_directory`.

    Raises:
        OSError: no space or no rights; what was there is untouched.
    """
    path = directory / step_name(meta["step"])
    directory.mkdir(parents=True, exist_ok=True, mode=files.folder_mode())
    if path.exists():
        with contextlib.suppress(CheckpointError):
            if snapshot_meta(path).get("selected") or not meta.get("selected"):
                return path

    def make_way() -> None:
        if fence is not None:
            fence()
        # Only now that the new one is complete: until here the old one is the best there is.
        if path.exists():
            retention.drop(path)

    _check_space(directory, tensors)
    files.write_directory(path, _serialized(tensors), manifest=META, facts=meta, fence=make_way)
    return path


def load_weights(path: str | Path, use: Literal["ema", "model", "auto"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and their facts from a run directory, a snapshot directory, a hub folder or a `.safetensors` file.

    A run directory stands for its selected snapshot, or its newest. `auto` means the moving average where there is one.
    A bare file, also in the hub folder of another tool, has one set of weights, so `use` does not apply, and its facts
    are its path and digest only. A hub folder of ours has one set, too.

    Raises:
        CheckpointError: missing, damaged, malformed, or a pickle, which is refused without being opened.
    """
    file, meta = _locate(Path(path), use)
    if "use" not in meta:
        return _read_bare(file)
    with _refusing(file.parent):
        [(_, data)] = files.read_files(file.parent, {"files": {file.name: meta["files"][file.name]}})
        return parse(data, file.name), meta


def weights_header(path: str | Path, use: Literal["ema", "model", "auto"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `load_weights` would return, with tensors that have names, types and shapes only: no weight is read.

    Raises:
        CheckpointError: as `load_weights`, but for what only reading and hashing the tensors tells.
    """
    file, meta = _locate(Path(path), use)
    with _refusing(file), _plain(file).open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        wanted = meta["files"][file.name]["size"] if "use" in meta else size
        if size != wanted:
            raise DamagedError(f"{file.name} has {size} bytes, its manifest says {wanted}")
        return header(opened, size, file.name), meta


def weights_digest(path: str | Path, use: Literal["ema", "model", "auto"]) -> dict[str, Any]:
    """Size and sha256 of the file that `load_weights` would read: what weights are, wherever they lie."""
    file, meta = _locate(Path(path), use)
    return meta["files"][file.name] if "use" in meta else _digest(file)


def _locate(path: Path, use: Literal["ema", "model", "auto"]) -> tuple[Path, dict[str, Any]]:
    """The file with the weights, and the facts of its snapshot; of a file that lies alone its path only."""
    # By name, before the file is opened: an unpickler would run code on the first byte.
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} may hold code and is not opened; `ddpm-lmk import-weights` makes safetensors of a PyTorch file"
        )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; wanted a run directory, a snapshot or a .safetensors file")
    if not path.is_dir():
        return path, {"path": str(path)}
    if (path / HUB).exists() and (path / HUB_WEIGHTS).exists():
        return _locate_in_hub_folder(path)
    path = path if (path / META).exists() else find_snapshot(path)
    meta = snapshot_meta(path)
    kind = ("ema" if f"ema{SUFFIX}" in meta["files"] else "model") if use == "auto" else use
    wanted = f"{kind}{SUFFIX}"
    if wanted not in meta["files"]:
        raise CheckpointError(
            f"{path} holds {', '.join(meta['files'])} and no {wanted}; choose the other with init.use"
        )
    return path / wanted, {**meta, "path": str(path), "use": kind}


def _locate_in_hub_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """As `_locate`. The hub's own cache holds links to its files; what they lead to is known by its digest."""
    config, weights = (path / HUB).resolve(), (path / HUB_WEIGHTS).resolve()
    if (files.read_json(config) or {}).get("library") != LIBRARY:
        return weights, {"path": str(weights)}
    with _refusing(path):
        record = files.read_manifest(config.parent, config.name)
    return weights, {**record, "path": str(path), "files": {weights.name: record["files"][HUB_WEIGHTS]}}


def snapshot_meta(path: Path) -> dict[str, Any]:
    """The facts of a snapshot directory: step, config, arch, outputs, files; raises `CheckpointError`."""
    with _refusing(path):
        return files.read_manifest(path, META)


def find_snapshot(run: Path) -> Path:
    """The selected snapshot of a run directory, or else its newest."""
    for name, tool in FOREIGN.items():
        if (run / name).exists():
            raise CheckpointError(
                f"{run} is a checkpoint of {tool} ({name}), which may hold code, and is not opened; "
                "wanted a run, a snapshot or a .safetensors file"
            )
    found = retention.complete(run / "snapshots")
    if not found:
        raise CheckpointError(_why_none(run))
    return next((path for path in found if snapshot_meta(path).get("selected")), found[0])


def _why_none(folder: Path) -> str:
    """What to name in place of a folder without snapshots: the runs below it, e.g. the cells of a sweep."""
    places = (path for pattern in ("*/snapshots", "*/*/snapshots", "*/*/*/snapshots") for path in folder.glob(pattern))
    runs = sorted({str(path.parent) for path in places if retention.complete(path)})
    if not runs:
        return f"{folder} has no snapshot yet; wanted a run that has finished, or train.snapshot_every"
    shown = ", ".join(runs[:RUNS_SHOWN]) + (", ..." if len(runs) > RUNS_SHOWN else "")
    return f"{folder} is not a run but holds {len(runs)}, such as the cells of a sweep; name one of them: {shown}"


def _read_bare(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file nobody vouches for: its header is checked against the file before anything large is read."""
    with _refusing(path), _plain(path).open("rb") as file:
        tensors = read(file, os.fstat(file.fileno()).st_size, path.name)
    return tensors, {"path": str(path), "files": {path.name: _digest(path)}}


def _plain(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is no plain file; wanted a run directory, a snapshot or a .safetensors file")
    return path


def _digest(path: Path) -> dict[str, Any]:
    with _refusing(path), _plain(path).open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _parse_state(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"state.json is not JSON ({error})") from None
    if not isinstance(state, dict):
        raise DamagedError("state.json is no mapping")
    return state


@contextmanager
def _refusing(path: Path, damaged: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Turn what can be wrong with a file into the error a user is told."""
    try:
        yield
    except DamagedError as error:
        raise damaged(f"{path}: {error}") from None
    except OtherFormatError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read now ({error.strerror}); it stays as it is, run again") from None


def _serialized(tensors: Tensors) -> Iterator[tuple[str, Content]]:
    return ((f"{name}{SUFFIX}", pieces(group)) for name, group in tensors.items())


def _check_space(directory: Path, tensors: Tensors) -> None:
    """Refuse early when the file system has less than 1.5 times the room that is needed."""
    # Half as much again, for the lines and results of the steps until the next save.
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
