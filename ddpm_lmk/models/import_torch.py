"""Foreign PyTorch files to safetensors: a `.pt` or `.pth` is read without running what it may hold.

A PyTorch file is a pickle, and a pickle is a program. So its opcodes are listed first, without running them (of a plain
archive, or of the form before PyTorch 1.6, which torchvision's ImageNet files still have). Then PyTorch's restricted
reader reads it in a sandbox without network. Only dense tensors that are really in the file come out. Nothing else in
this package opens such files (docs/faults.md, D8).

Trainers write more than tensors: numpy numbers, settings, objects of their own. None of that is imported: wherever the
file names a class that is not PyTorch's or Python's, an empty stand-in takes its place. A name of Python or PyTorch
that tensors do not need is no setting of anybody, and the file is refused unopened.

Which of several sets of weights in a file is meant is decided in `state_dicts`.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import re
import sys
import uuid
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ddpm_lmk.errors import CheckpointError, ResourceError, RunConflictError
from ddpm_lmk.system import files
from ddpm_lmk.system.sandbox import Answer, Limits, Sandbox, serve

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PICKLE = 64 << 20  # bytes; names and shapes only, the numbers lie beside it
SECONDS = 900
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file older than PyTorch 1.6
OLD_PICKLES = 5  # it, the protocol, facts of the machine, the tensors, the order of their numbers
NAMED_DIGEST = re.compile(r"-([0-9a-f]{8})\.pth$")
ALLOWED = {
    *("collections OrderedDict", "collections Counter", "_codecs encode", "torch device"),
    *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    *(f"torch {kind}" for kind in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64")),
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char")),
    *(f"torch {kind}Storage" for kind in ("Byte", "Bool")),
}
# Whose names get no stand-in: Python's (also those of version 2) and PyTorch's, but for plain values.
OURS = {*sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING, "exceptions", "torch"}
PLAIN_VALUES = {"argparse", "datetime", "decimal", "pathlib", "uuid"}
REMEDY = "where it was written, save the weights alone: torch.save(model.state_dict(), FILE)"


def import_weights(file: Path, out: Path, take: str | None = None) -> dict[str, Any]:
    """Write the tensors of the PyTorch file `file` to the new safetensors file `out`; returns facts about them.

    Args:
        take: which of several sets of weights, by its name in the file; None: as `state_dicts.choose` does.

    Raises:
        CheckpointError: not a plain archive of tensors, it asks for code, or holds no such set.
        RunConflictError: `out` exists.
        ResourceError: no room or no rights.
    """
    if out.exists():
        raise RunConflictError(f"{out} exists and is kept; name another --out, or remove it")
    inspect(file)
    temporary = out.with_name(f".tmp-{uuid.uuid4().hex[:12]}")  # in the same folder: a rename is then atomic
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        answer = _convert_in_sandbox(file, temporary, take)
        with temporary.open("rb") as content:
            answer["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
        temporary.chmod(0o600)
        temporary.rename(out)
        files.flush(out.parent)
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror}; free or unlock the disk and run again") from error
    finally:
        with contextlib.suppress(OSError):  # what stands in the way was told above
            temporary.unlink(missing_ok=True)
    return answer


def inspect(file: Path) -> None:
    """Raise `CheckpointError` for names that its pickles ask for and tensors do not need; nothing is run."""
    if file.suffix == ".safetensors":
        raise CheckpointError(f"{file} is a safetensors file already; init.weights={file} takes it as it is")
    try:
        _check_named_digest(file)
        requested = _requested_names(file)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} is not a PyTorch file ({error}); wanted one written by torch.save, whole"
        ) from None
    if refused := sorted(name for name in requested - ALLOWED if not _has_stand_in(name)):
        raise CheckpointError(
            f"{file} asks for {', '.join(refused)}, which tensors do not need; it is not opened; {REMEDY}"
        )


def _requested_names(file: Path) -> set[str]:
    """What the pickles of a file would import."""
    if not zipfile.is_zipfile(file):
        return _globals_of_old_form(file)
    with zipfile.ZipFile(file) as archive:
        return _globals(io.BytesIO(archive.read(_the_pickle(archive, file))))


def _has_stand_in(name: str) -> bool:
    """May an empty object take the place of what `module name` would be?"""
    root = name.partition(" ")[0].partition(".")[0]
    return root not in OURS or root in PLAIN_VALUES


def _the_pickle(archive: zipfile.ZipFile, file: Path) -> zipfile.ZipInfo:
    """The one small pickle of an archive that holds nothing but tensors."""
    members = archive.infolist()
    # torch.save never compresses; what it would expand to cannot be larger than the file.
    packed = [info.filename for info in members if info.compress_type != zipfile.ZIP_STORED]
    size = sum(info.file_size for info in members)
    pickles = [info for info in members if PurePosixPath(info.filename).name == "data.pkl"]
    strange = [info.filename for info in members if info.filename.startswith("/") or ".." in info.filename]
    # TorchScript keeps code beside its tensors.
    code = [info.filename for info in members if info.filename.endswith(".pkl") or "/code/" in info.filename]
    if packed or strange or len(pickles) != 1 or len(code) != 1 or size > file.stat().st_size:
        raise CheckpointError(
            f"{file} is not a plain archive of tensors (compressed, scripted, or names beyond its folder); "
            f"it is not opened; {REMEDY}"
        )
    if pickles[0].file_size > LARGEST_PICKLE:
        raise CheckpointError(f"{file} describes its tensors in {pickles[0].file_size} bytes, over {LARGEST_PICKLE}")
    if damaged := archive.testzip():
        raise CheckpointError(f"{file} is damaged: {damaged} does not match its checksum; fetch or copy it again")
    return pickles[0]


def _check_named_digest(file: Path) -> None:
    """Raise where a name ends with the beginning of a digest, as torchvision's do, and the file has another."""
    named = NAMED_DIGEST.search(file.name)
    if named is None:
        return
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not digest.startswith(named[1]):
        raise CheckpointError(
            f"{file} is named after digest {named[1]}, but has {digest[:8]}: it is not the file that was published; "
            "fetch it again"
        )


def _globals_of_old_form(file: Path) -> set[str]:
    """What the pickles at the head of a file older than PyTorch 1.6 would import; numbers follow them."""
    with file.open("rb") as content:
        head = io.BytesIO(content.read(LARGEST_PICKLE))
    # `genops` stops after one pickle and leaves the position behind it.
    first = [argument for _, argument, _ in pickletools.genops(head) if argument is not None]
    if OLD_MAGIC not in first:
        raise ValueError("neither an archive nor the older form")
    return set().union(*(_globals(head) for _ in range(OLD_PICKLES - 1)))


def _globals(data: io.BytesIO) -> set[str]:
    """What the next pickle would import, as `module name`; the opcodes are read, not run."""
    names: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif opcode.name == "STACK_GLOBAL":  # its module and name are the last two strings, if nobody hides them
            names.add(" ".join(strings[-2:]) or "an unnamed object")
        elif opcode.name.startswith("EXT"):
            names.add(f"extension {argument}")
        elif isinstance(argument, str):
            strings.append(argument)
    return names


def _convert_in_sandbox(file: Path, out: Path, take: str | None) -> dict[str, Any]:
    """Have `_convert` run under limits; what it cannot do in time and memory is a refusal."""
    size = file.stat().st_size
    limits = Limits(
        memory_bytes=3 * size + (8 << 30),  # the file, its tensors, their copies; 8 GiB may PyTorch map for itself
        file_bytes=2 * size + (16 << 20),
        deadline_s=SECONDS,
        cpu_s=SECONDS,
        has_network=False,
        tries=1,
    )
    with Sandbox("ddpm_lmk.models.import_torch", limits) as sandbox:
        answer, _ = sandbox.ask({"file": str(file.absolute()), "out": str(out.absolute()), "take": take})
    if "refused" in answer:
        raise CheckpointError(f"{file} could not be read within its limits ({answer['refused']}); it is refused")
    if "error" in answer:
        raise CheckpointError(f"{file}: {answer['error']}")
    return answer


def _convert(job: dict[str, Any]) -> Answer:
    """In the sandbox: read `file`, write `out`, and answer with what it holds, or with an error."""
    import safetensors.torch

    from ddpm_lmk.models.state_dicts import choose, describe

    file, out = Path(job["file"]), Path(job["out"])
    try:
        chosen = choose(read(file), job["take"])
        tensors = dense(chosen.tensors, file)
        answer = describe(tensors) | chosen.summary()
        safetensors.torch.save_file(tensors, out, metadata={"source": file.name})
        with out.open("rb") as written:
            os.fsync(written.fileno())
    except (CheckpointError, OSError, safetensors.SafetensorError) as error:  # the others: no room for `out`
        return {"error": str(error)}, b""
    return answer, b""


class _PassedOver:
    """The empty stand-in for whatever a file holds beside tensors."""

    def __new__(cls, *arguments: Any) -> _PassedOver:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(file: Path) -> Any:
    """What is in a file, every object that is no tensor of PyTorch a stand-in; raises `CheckpointError`."""
    import torch

    names = [name.replace(" ", ".", 1) for name in _requested_names(file) - ALLOWED if _has_stand_in(name)]
    try:
        is_archive = zipfile.is_zipfile(file)  # only these can be mapped
        with torch.serialization.safe_globals([(_PassedOver, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # the restricted reader has no error of its own
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"PyTorch's restricted reader refuses it ({reason}); {REMEDY}") from None


def dense(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Tensors with memory of their own; raises `CheckpointError` unless all are dense and really in the file."""
    import torch

    if any(value.layout != torch.strided or value.is_quantized for value in tensors.values()):
        raise CheckpointError("it holds sparse or quantised tensors; wanted dense ones")
    views = {
        (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride()): value
        for value in tensors.values()  # weights that are tied are in the file once
    }
    claimed = sum(value.numel() * value.element_size() for value in views.values())
    if claimed > file.stat().st_size:
        raise CheckpointError(f"its tensors claim {claimed} bytes, the file has {file.stat().st_size}")
    # safetensors refuses tensors that share memory
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


if __name__ == "__main__":
    serve(_convert)
