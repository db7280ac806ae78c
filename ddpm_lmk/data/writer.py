"""Writes shards: WebDataset tars, the index and the manifest, so that what exists under its final name is complete.

Bytes depend only on what is added and on the settings: no times, no owners, no paths of this machine. Pixels come
encoded, from `decode`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from ddpm_lmk.data.records import (
    EXTENSIONS,
    INDEX_DTYPE,
    Aspect,
    Encoding,
    SampleRecord,
    index_row,
    member_key,
    record_to_json,
)
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.durable import flush_directory
from ddpm_lmk.errors import DataError, ResourceError, RunConflictError

FORMAT = "ddpm-lmk-shards"
FORMAT_VERSION = 1
SHARD_BYTES = 64 << 20  # about a thousand raw 256 x 256 images; the loader shuffles inside a window of shards


class ShardWriter:
    """Context manager: `add` samples in ascending order of id; leaving it without an error makes `out` appear, whole.

    Raises:
        RunConflictError: `out` exists and is not an empty directory.
        ResourceError: `out` cannot be written.
        DataError: two samples have one id, or none was added.
    """

    def __init__(
        self,
        out: Path,
        *,
        dataset: str,
        spec: DatasetSpec,
        splits: Sequence[str],
        encoding: Encoding,
        bits: int,
        stored_size: int,
        aspect: Aspect,
        settings: dict[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out = out.absolute()
        self._splits = tuple(splits)
        self._extension = EXTENSIONS[encoding]
        self._shard_bytes = shard_bytes
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dataset": dataset,
            "spec": spec.model_dump(mode="json"),
            "splits": list(self._splits),
            "encoding": encoding,
            "bits": bits,
            "stored_size": stored_size,
            "aspect": aspect,
            "settings": settings,
        }
        self._tmp = self.out.with_name(f".{self.out.name}.tmp-{os.getpid()}")
        self._shards: list[dict[str, Any]] = []
        self._rows = bytearray()
        self._last_id: str | None = None
        self._shard: _Shard | None = None

    def __enter__(self) -> ShardWriter:
        refuse_existing(self.out)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._tmp.mkdir()
        except OSError as error:
            raise ResourceError(f"cannot write beside {self.out}: {error.strerror}; choose another --out") from error
        return self

    def add(self, record: SampleRecord, image: bytes) -> None:
        """Append one sample: the encoded image and its record."""
        if self._last_id is not None and record.id <= self._last_id:
            raise DataError(f"image id {record.id!r} comes twice; ids must differ (rename one of the files or rows)")
        self._last_id = record.id
        if self._shard is None:
            self._shard = _Shard(self._tmp / f"shard-{len(self._shards):06d}.tar")
        key = member_key(record.id)
        text = record_to_json(record)
        split = self._splits.index(record.split)
        row = index_row(record, image, len(text), shard=len(self._shards), split=split)
        row["offset"] = self._shard.append(f"{key}.{self._extension}", image)
        row["json_offset"] = self._shard.append(f"{key}.json", text)
        self._rows += row.tobytes()
        if self._shard.tell() >= self._shard_bytes:
            self._finish_shard()

    def refuse(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write `refused.jsonl`: one line for each image that was left out, with the reason."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        _write_durably(self._tmp / "refused.jsonl", text.encode("ascii"))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._complete()
        except OSError as error:
            raise ResourceError(f"cannot write {self.out}: {error.strerror}; nothing was left there") from error
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self._tmp, ignore_errors=True)

    def _complete(self) -> None:
        if not self._rows:
            raise DataError("no image could be packed; see the reasons above or give another source")
        if self._shard is not None:
            self._finish_shard()
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(self._rows, INDEX_DTYPE), allow_pickle=False)
        _write_durably(self._tmp / "index.npy", buffer.getvalue())
        self._header["count"] = len(self._rows) // INDEX_DTYPE.itemsize
        self._header["shards"] = self._shards
        self._header["index_sha256"] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        self._header["fingerprint"] = fingerprint_of(self._header)
        _write_durably(self._tmp / "manifest.json", json.dumps(self._header, indent=1).encode("ascii"))
        flush_directory(self._tmp)
        refuse_existing(self.out)
        self._tmp.rename(self.out)
        flush_directory(self.out.parent)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.finish())
        self._shard = None


class _Shard:
    """One tar being written: hashes while it writes, and tells where each member's content begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - lives as long as the shard
        self._hash = hashlib.sha256()
        self._size = 0
        self._count = 0

    def append(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._size
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        self._count += 1
        return offset

    def tell(self) -> int:
        return self._size

    def finish(self) -> dict[str, Any]:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"name": self.path.name, "size": self._size, "sha256": self._hash.hexdigest(), "count": self._count // 2}

    def abandon(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def refuse_existing(out: Path) -> None:
    """Raise RunConflictError unless `out` is absent or an empty directory; ResourceError when it is a file."""
    if out.exists() and not out.is_dir():
        raise ResourceError(f"{out} is a file; --out wants a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        held = "packed shards" if (out / "manifest.json").is_file() else "other files"
        raise RunConflictError(f"{out} already holds {held}; nothing was changed: use them, or choose another --out")


def fingerprint_of(header: dict[str, Any]) -> str:
    """sha256 over settings, spec, index and shard digests: equal for equal data, whoever packed it."""
    covered = {key: value for key, value in header.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode("ascii")).hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
