"""Whole files or none: a reader never sees half of a result.

Small outputs (JSON, CSV, HTML, PNG) are written under a temporary name in the same folder, flushed to the disk and
renamed. Checkpoints, which are folders with checksums, are `durable`'s.

Directories that are complete when they exist.

What is written here goes to a temporary name first, is hashed while it is written, flushed to the disk, and then takes
its name in one rename; the parent is flushed as well. A reader therefore sees the old thing or the new one, whatever
kills the writer. Single small files are `atomic`'s. Limit: a power loss is covered as far as the file system honours
fsync; the order of the flushes is tested, a real loss of power is not (tests/faults/README.md).

A directory carries a manifest, a JSON file that lists size and sha256 of every other file and a digest of itself. How
the digest is made is the same in every format, so that a newer format and a damaged manifest can be told apart. Reading
hashes the same bytes that are handed on, and follows no symbolic link.

Outputs are for their owner only: images of patients are behind all of them, and weights can reproduce them.

Folders of runs are 0700 and files 0600 unless the owner shares them with the group on purpose. Nothing is sent
anywhere: libraries that could ask a hub are told not to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import ResourceError

SHARE = "DDPM_LMK_SHARE_GROUP"  # environment, so that ranks and workers know


def is_shared() -> bool:
    """May the group read and write?"""
    return os.environ.get(SHARE) == "1"


def folder_mode() -> int:
    """Mode of new folders."""
    return 0o770 if is_shared() else 0o700


def file_mode() -> int:
    """Mode of new files."""
    return 0o660 if is_shared() else 0o600


def protect(*, share_group: bool | None = None) -> None:
    """Set the mask of this process, and of those it starts; call it where a process begins."""
    if share_group is not None:
        os.environ[SHARE] = "1" if share_group else "0"
    os.umask(0o007 if is_shared() else 0o077)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one move; ResourceError when the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode())
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; free or unlock the disk and run again") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_utf8(text: str) -> bytes:
    """UTF-8 that every reader takes.

    A name that is no UTF-8 on the disk comes with lone surrogates; each is written as `\\udcff`, which in JSON is the
    character again, and elsewhere is legible.
    """
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, content: str) -> None:
    """Put text at `path` in one move, as `to_utf8`."""
    write_bytes(path, to_utf8(content))


def write_json(path: Path, content: Any) -> None:
    """Put `content` at `path` as indented JSON in one move; NaN and infinities are a bug and raise ValueError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


FORMAT = 1
LARGEST_MANIFEST = 16 << 20  # bytes
PART = 4 << 20  # bytes hashed and written at once
DAMAGE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EIO}

Content = Iterable[bytes | memoryview]


class DamagedError(Exception):
    """Something on the disk is not what its manifest says; the message says what."""


class OtherFormatError(Exception):
    """A manifest that is whole, of a format this version does not read; the message says which, and what to do."""


def to_json(value: Any) -> bytes:
    """Readable JSON with a final newline; NaN and infinity are refused because JSON has neither."""
    return to_utf8(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_directory(
    path: Path,
    files: Iterable[tuple[str, Content]],
    *,
    manifest: str,
    facts: dict[str, Any],
    fence: Callable[[], None] | None = None,
) -> None:
    """Write `files` and a manifest holding `facts` as the new directory `path`.

    Args:
        files: names and contents, consumed one piece at a time.
        fence: called when all is written and before it takes its name; raises to forbid that.

    Raises:
        OSError: no space, or `path` exists; nothing of the attempt stays behind.
    """
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True, mode=folder_mode())
        listed = {}
        for name, content in files:
            listed[name] = _write_and_flush(temporary / name, content)
        record = {"format": FORMAT, **facts, "files": listed}
        _write_and_flush(temporary / manifest, [to_json({**record, "digest": digest(record)})])
        flush_directory(temporary)
        if fence is not None:
            fence()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(path.parent)


def read_manifest(path: Path, name: str) -> dict[str, Any]:
    """Read and check the manifest `name` of the directory `path`.

    Raises:
        DamagedError: it is not there, or not as it was written.
        OtherFormatError: it is whole, and too new or too old to be read.
        OSError: the disk does not answer.
    """
    with _opened(path) as folder:
        text = _read(name, folder=folder, largest=LARGEST_MANIFEST)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not JSON ({error})") from None
    if not isinstance(record, dict) or record.pop("digest", None) != digest(record):
        raise DamagedError(f"{name} does not match its own digest")
    if record.get("format") != FORMAT:
        raise OtherFormatError(
            f"{name} has format {record.get('format')!r}, this version of ddpm-lmk reads format {FORMAT}; use the "
            "version that wrote it, or a later one"
        )
    if not _is_listing(record.get("files")):
        raise DamagedError(f"{name} lists no files")
    return record


def read_files(path: Path, record: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and verified content of every file that the manifest `record` lists; raises `DamagedError`."""
    with _opened(path) as folder:
        for name, wanted in record["files"].items():
            data = _read(name, folder=folder, size=wanted["size"])
            if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
                raise DamagedError(f"{name} does not match its sha256")
            yield name, data


def read_no_follow(path: Path) -> bytes:
    """The bytes of a plain file; what is missing, a symbolic link or no plain file is a `DamagedError`."""
    return _read(str(path))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it is not one."""
    try:
        content = json.loads(read_no_follow(path))
    except (DamagedError, OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest(record: dict[str, Any]) -> str:
    """What a manifest says of itself: sha256 of its compact JSON with sorted keys, without the digest."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def flush_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_and_flush(path: Path, content: Content) -> dict[str, Any]:
    """Write a new file, and say its size and sha256."""
    hashed, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode())
    with os.fdopen(descriptor, "wb") as file:
        for piece in content:
            for begin in range(0, len(piece), PART):
                part = piece[begin : begin + PART]
                hashed.update(part)
                file.write(part)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": hashed.hexdigest()}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The directory `path` itself, not what a link of this name points to, for as long as the block lasts."""
    descriptor = _open(str(path), os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, folder: int | None = None) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, dir_fd=folder)
    except OSError as error:
        raise _as_damage(error, name) from None


def _read(name: str, *, folder: int | None = None, size: int | None = None, largest: int | None = None) -> bytes:
    """All bytes of a plain file, of which nothing is read where its length is not as wanted."""
    with os.fdopen(_open(name, 0, folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{name} is no plain file")
        if size is not None and found.st_size != size:
            raise DamagedError(f"{name} has {found.st_size} bytes, its manifest says {size}")
        if largest is not None and found.st_size > largest:
            raise DamagedError(f"{name} has {found.st_size} bytes, at most {largest} can be right")
        try:
            return file.read()
        except OSError as error:
            raise _as_damage(error, name) from None


def _as_damage(error: OSError, name: str) -> Exception:
    """`DamagedError` where a file is not what it should be; the error itself where the disk does not answer."""
    return DamagedError(f"{Path(name).name}: {error.strerror}") if error.errno in DAMAGE else error


def _is_listing(files: Any) -> bool:
    """Plain names, each with a size and a hash: no path leads out of the directory."""
    return isinstance(files, dict) and all(
        isinstance(wanted, dict)
        and isinstance(wanted.get("size"), int)
        and isinstance(wanted.get("sha256"), str)
        and name not in ("", ".", "..")
        and "/" not in name
        for name, wanted in files.items()
    )
