"""Directories that are complete when they exist.

What is written here goes to a temporary name first, is hashed while it is written, flushed to the disk, and then takes
its name in one rename; the parent is flushed as well. A reader therefore sees the old thing or the new one, whatever
kills the writer. Single small files are `atomic`'s. Limit: a power loss is
covered as far as the file system honours fsync.

A directory carries a manifest, a JSON file that lists size and sha256 of every other file and a digest of itself.
Reading hashes the same bytes that are handed on, and follows no symbolic link.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FORMAT = 1


class DamagedError(Exception):
    """Something on the disk is not what its manifest says; the message says what."""


def to_json(value: Any) -> bytes:
    """Readable JSON with a final newline; NaN and infinity are refused because JSON has neither."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogateescape")


def write_directory(path: Path, files: Iterable[tuple[str, bytes]], *, manifest: str, facts: dict[str, Any]) -> None:
    """Write `files` and a manifest holding `facts` as the new directory `path`.

    Args:
        files: names and contents, consumed one at a time, so that only one content is in memory.

    Raises:
        OSError: no space, or `path` exists; nothing of the attempt stays behind.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True, mode=0o700)
        listed = {}
        for name, data in files:
            _write_and_flush(temporary / name, data)
            listed[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record = {"format": FORMAT, **facts, "files": listed}
        _write_and_flush(temporary / manifest, to_json({**record, "digest": _digest(record)}))
        flush_directory(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_directory(path.parent)


def read_manifest(path: Path, name: str) -> dict[str, Any]:
    """Read and check the manifest `name` of the directory `path`; raises `DamagedError`."""
    try:
        record = json.loads(read_no_follow(path / name))
    except ValueError as error:
        raise DamagedError(f"{name} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise DamagedError(f"{name} lists no files")
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise DamagedError(f"{name} has format {record['format']}, this version reads up to {FORMAT}; update ddpm-lmk")
    found = record.pop("digest", None)
    if found != _digest(record):
        raise DamagedError(f"{name} does not match its own digest")
    return record


def read_files(path: Path, record: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and verified content of every file that the manifest `record` lists; raises `DamagedError`."""
    for name, wanted in record["files"].items():
        data = read_no_follow(path / name)
        if len(data) != wanted["size"]:
            raise DamagedError(f"{name} has {len(data)} bytes, its manifest says {wanted['size']}")
        if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
            raise DamagedError(f"{name} does not match its sha256")
        yield name, data


def read_no_follow(path: Path) -> bytes:
    """The bytes of a plain file; a symbolic link or anything unreadable is a `DamagedError`."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            return file.read()
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file or it is not one."""
    try:
        content = json.loads(read_no_follow(path))
    except (DamagedError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def flush_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_and_flush(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
