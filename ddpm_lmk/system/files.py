"""Files and directories that are whole or absent, readable by their owner only, and checked when they are read.

Everything is written under a temporary name in the same folder, flushed to the disk, and given its name in one rename;
then the parent is flushed. So a reader sees the old content or the new, whatever kills the writer. A loss of power is
covered as far as the file system honours fsync: the order of the flushes is tested, a real loss of power is not
(tests/faults/README.md, D16).

A checkpoint is a directory with a manifest: a JSON file that lists size and sha256 of every other file and a digest of
itself. The digest is made in the same way in every format, so that a newer format and a damaged manifest can be told
apart. The bytes that are hashed are the bytes that are handed on, and no symbolic link is followed.
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
from typing import Any, BinaryIO

from ddpm_lmk.errors import ResourceError

SHARE = "DDPM_LMK_SHARE_GROUP"  # an environment variable, so that ranks and workers inherit it

FORMAT = 1
LARGEST_MANIFEST = 16 << 20  # bytes; a manifest has some 100 per file, so a larger one was not written by us
PART = 4 << 20  # bytes hashed and written at once, while they are still in the cache of the processor
NAME_PART = 40  # characters of a name in its temporary name: at four bytes each it stays below the 255 of file systems
DAMAGE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EIO}

Content = Iterable[bytes | memoryview]


class DamagedError(Exception):
    """Something on the disk is not what its manifest says; the message says what."""


class OtherFormatError(Exception):
    """An intact manifest of a format that this version does not read; the message says which, and what to do."""


def is_shared() -> bool:
    """May the group read and write?"""
    return os.environ.get(SHARE) == "1"


def folder_mode() -> int:
    """Mode of new folders. Images of patients are behind every output, and weights can reproduce them."""
    return 0o770 if is_shared() else 0o700


def file_mode() -> int:
    """Mode of new files."""
    return 0o660 if is_shared() else 0o600


def protect(*, share_group: bool | None = None) -> None:
    """Make what this process and its children write private, and keep them offline; called where a process begins."""
    if share_group is not None:
        os.environ[SHARE] = "1" if share_group else "0"
    os.umask(0o007 if is_shared() else 0o077)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # libraries that could ask a hub must not


@contextmanager
def write_whole(path: Path, *, fence: Callable[[], None] | None = None, may_replace: bool = True) -> Iterator[Path]:
    """Yield a temporary name; the file or directory that the block makes there becomes `path`, or leaves no trace.

    Args:
        fence: called when everything is on the disk and not yet in its place; raises to forbid that.
        may_replace: of a file; without it one that is there already is kept, and FileExistsError raised.

    Raises:
        OSError: the disk refuses, or a directory of this name exists.
    """
    temporary = path.with_name(f".tmp-{path.name[:NAME_PART]}-{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        flush(temporary)  # before the rename: else a loss of power could leave the name and not the content
        if fence is not None:
            fence()
        if temporary.is_dir():
            temporary.rename(path)
        elif may_replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # a rename would replace what another process has put there meanwhile
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_whole(path: Path, *, may_replace: bool = True) -> Iterator[BinaryIO]:
    """As `write_whole`, of a file that is open for writing; ResourceError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path, may_replace=may_replace) as temporary, _create(temporary) as file:
            yield file
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; free or unlock the disk and run again") from error


def _create(path: Path) -> BinaryIO:
    # Exclusive: nobody can have prepared a file or a link of this name in a shared folder.
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode()), "wb")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file; ResourceError when the disk refuses."""
    with open_whole(Path(path)) as file:
        file.write(content)


def to_utf8(text: str) -> bytes:
    """UTF-8 that every reader takes.

    A file name that is no UTF-8 comes from the system with lone surrogates; each is written as `\\udcff`, which in JSON
    is the character again, and elsewhere is legible.
    """
    return text.encode("utf-8", "backslashreplace")


def to_json(value: Any) -> bytes:
    """Indented JSON; NaN and infinity raise ValueError, because JSON has neither."""
    return to_utf8(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a whole file of text, as `to_utf8`."""
    write_bytes(path, to_utf8(content))


def write_json(path: Path, content: Any) -> None:
    """Write a whole file of JSON, as `to_json`."""
    write_bytes(path, to_json(content))


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
        fence: as in `write_whole`.

    Raises:
        OSError: no space, or `path` exists; nothing of the attempt stays behind.
    """
    with write_whole(path, fence=fence) as temporary:
        temporary.mkdir(parents=True, mode=folder_mode())
        listed = {}
        for name, content in files:
            listed[name] = _write_and_hash(temporary / name, content)
        record = {"format": FORMAT, **facts, "files": listed}
        _write_and_hash(temporary / manifest, [to_json({**record, "digest": digest(record)})])


def _write_and_hash(path: Path, content: Content) -> dict[str, Any]:
    """Write and flush a new file; returns its size and sha256."""
    hashed, size = hashlib.sha256(), 0
    with _create(path) as file:
        for piece in content:
            for begin in range(0, len(piece), PART):
                part = piece[begin : begin + PART]
                hashed.update(part)
                file.write(part)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": hashed.hexdigest()}


def digest(record: dict[str, Any]) -> str:
    """What a manifest says of itself: sha256 of its compact JSON with sorted keys, without the digest."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path, name: str) -> dict[str, Any]:
    """Read and check the manifest `name` of the directory `path`.

    Raises:
        DamagedError: it is not there, or not as it was written.
        OtherFormatError: it is intact, and too new or too old to be read.
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
    # Only now: a damaged file could hold any number here.
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
        for name, listed in record["files"].items():
            data = _read(name, folder=folder, size=listed["size"])
            if hashlib.sha256(data).hexdigest() != listed["sha256"]:
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
        # O_NONBLOCK: opening a pipe that somebody has put there must not wait for its other end.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, dir_fd=folder)
    except OSError as error:
        raise _as_damage(error, name) from None


def _read(name: str, *, folder: int | None = None, size: int | None = None, largest: int | None = None) -> bytes:
    """All bytes of a plain file; nothing is read of one whose length cannot be right."""
    with os.fdopen(_open(name, 0, folder), "rb") as file:
        status = os.fstat(file.fileno())  # of the open file: its name may be exchanged between check and use
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{name} is no plain file")
        if size is not None and status.st_size != size:
            raise DamagedError(f"{name} has {status.st_size} bytes, its manifest says {size}")
        if largest is not None and status.st_size > largest:
            raise DamagedError(f"{name} has {status.st_size} bytes, at most {largest} can be right")
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
        isinstance(listed, dict)
        and isinstance(listed.get("size"), int)
        and isinstance(listed.get("sha256"), str)
        and name not in ("", ".", "..")
        and "/" not in name
        for name, listed in files.items()
    )
