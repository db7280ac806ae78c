"""Writes shards: WebDataset tars, the index and the manifest, so that what exists under its final name is complete.

Bytes depend only on what is added and on the settings: no times, no owners, no paths of this machine. Pixels come
encoded, from `decode`.

A packing that is under way, or was interrupted and can go on: the folder `.NAME.partial` beside the pack.

It holds the finished shards (`pack/`), the index and the refusals so far, and a journal with a line for every finished
shard. What was not in the journal when the writer was killed is cut off and done again. One process at a time.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np

from ddpm_lmk.data.shards.records import (
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
from ddpm_lmk.errors import ConfigError, DataError, ResourceError, RunConflictError
from ddpm_lmk.system import locks
from ddpm_lmk.system.files import flush

_ROWS_AT_ONCE = 1 << 16


class Unfinished:
    """The folder, locked.

    Raises:
        RunConflictError: another process is packing there.
        ResourceError: it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._root = _folder(out)
        self.pack = self._root / "pack"
        self.shards: list[dict[str, Any]] = []
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = locks.lock(self._root / "lock")
        except OSError as error:
            raise ResourceError(f"cannot write beside {out}: {error.strerror}; choose another --out") from error
        if lock is None:
            raise RunConflictError(f"another process is packing into {out}; wait, or choose another --out")
        self._lock = lock
        self._journal: BinaryIO | None = None
        self._rows: BinaryIO | None = None
        self._refused: BinaryIO | None = None

    def resume(self, identity: dict[str, Any] | None) -> dict[str, Any] | None:
        """Take up what is there, if it is of the same `identity`; else begin anew. Returns the last state noted."""
        lines = [] if identity is None else self._read_journal()
        done = self._whole(lines[1:]) if lines and lines[0] == {"identity": identity} else []
        if not done:
            self.restart(identity)
            return None
        self._open("r+b")
        assert self._rows is not None
        assert self._refused is not None
        self._rows.truncate(done[-1]["rows"] * INDEX_DTYPE.itemsize)
        self._refused.truncate(done[-1]["refused_bytes"])
        self._rewrite_journal([lines[0], *done])
        self.shards = [line["shard"] for line in done]
        for path in self.pack.iterdir():
            if path.name not in {shard["name"] for shard in self.shards}:
                path.unlink()
        for file in (self._rows, self._refused):
            file.seek(0, os.SEEK_END)
        return done[-1]["state"]

    def restart(self, identity: dict[str, Any] | None) -> None:
        """Forget everything."""
        self._close()
        shutil.rmtree(self.pack, ignore_errors=True)
        self.pack.mkdir()
        self.shards = []
        self._rewrite_journal([{"identity": identity}])
        self._open("w+b")

    def add_row(self, row: bytes) -> None:
        """Append a row of the index."""
        assert self._rows is not None
        self._rows.write(row)

    def refuse(self, line: dict[str, Any]) -> None:
        """Append a line about a picture that was left out."""
        assert self._refused is not None
        self._refused.write(json.dumps(line).encode("ascii") + b"\n")

    def note(self, shard: dict[str, Any], state: dict[str, Any]) -> None:
        """Say that a shard is finished; from here on it is kept."""
        assert self._rows is not None
        assert self._refused is not None
        assert self._journal is not None
        for file in (self._rows, self._refused):
            _flush(file)
        self.shards.append(shard)
        rows = self._rows.tell() // INDEX_DTYPE.itemsize
        line = {"shard": shard, "rows": rows, "refused_bytes": self._refused.tell(), "state": state}
        self._journal.write(json.dumps(line).encode("ascii") + b"\n")
        _flush(self._journal)

    def rows(self) -> Iterator[np.ndarray]:
        """The index so far, in blocks."""
        assert self._rows is not None
        self._rows.flush()
        with open(self._root / "index.part", "rb") as file:
            while block := file.read(_ROWS_AT_ONCE * INDEX_DTYPE.itemsize):
                yield np.frombuffer(block, INDEX_DTYPE)

    def refusals(self) -> Iterator[dict[str, Any]]:
        """The refusals so far, in order."""
        assert self._refused is not None
        self._refused.flush()
        with open(self._root / "refused.part", "rb") as file:
            for line in file:
                yield json.loads(line)

    def leave(self, *, keep: bool) -> None:
        """Unlock; without `keep`, or where no shard was finished, nothing stays."""
        self._close()
        if not (keep and self.shards):
            shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)

    def _read_journal(self) -> list[dict[str, Any]]:
        """Whole lines; the last may have been cut off."""
        lines: list[dict[str, Any]] = []
        try:
            with open(self._root / "journal.jsonl", "rb") as file:
                lines.extend(json.loads(line) for line in file if line.endswith(b"\n"))
        except (FileNotFoundError, ValueError):
            pass
        return lines

    def _whole(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those whose shard, rows and refusals are all there."""
        try:
            sizes = {path.name: path.stat().st_size for path in self.pack.iterdir()}
            rows = (self._root / "index.part").stat().st_size // INDEX_DTYPE.itemsize
            refused_bytes = (self._root / "refused.part").stat().st_size
        except OSError:
            return []
        whole: list[dict[str, Any]] = []
        for line in lines:
            if sizes.get(line["shard"]["name"]) != line["shard"]["size"]:
                break
            if line["rows"] > rows or line["refused_bytes"] > refused_bytes:
                break
            whole.append(line)
        return whole

    def _rewrite_journal(self, lines: list[dict[str, Any]]) -> None:
        temporary = self._root / "journal.tmp"
        self._journal = open(temporary, "wb")  # noqa: SIM115 - lives as long as the folder
        self._journal.writelines(json.dumps(line).encode("ascii") + b"\n" for line in lines)
        _flush(self._journal)
        temporary.replace(self._root / "journal.jsonl")
        flush(self._root)

    def _open(self, mode: Literal["r+b", "w+b"]) -> None:
        self._rows = open(self._root / "index.part", mode)  # noqa: SIM115 - they live as long as the folder
        self._refused = open(self._root / "refused.part", mode)  # noqa: SIM115

    def _close(self) -> None:
        for file in (self._journal, self._rows, self._refused):
            if file is not None:
                file.close()


def is_begun(out: Path) -> bool:
    """Is there a packing into `out` that can go on?"""
    return _folder(out).exists()


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


FORMAT = "ddpm-lmk-shards"
FORMAT_VERSION = 1
SHARD_BYTES = 64 << 20  # about a thousand raw 256 x 256 images; the loader shuffles inside a window of shards


class ShardWriter:
    """Context manager: `add` samples in ascending order of id; leaving it without an error makes `out` appear, whole.

    Whatever stops it, finished shards stay beside `out`, and a writer of the same `identity` goes on after them;
    `resumed` is then the state noted with the last one. An error of the data leaves nothing.

    Args:
        left_out: lines for `refused.jsonl` that are known before, in any order.
        made_with: what else decides the bytes, such as versions; None: an interrupted writing is begun anew.
        state: what the caller wants to have back when it goes on after the last finished shard; plain JSON.

    Raises:
        RunConflictError: `out` exists and is not an empty directory, or another process is writing it.
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
        left_out: Iterable[dict[str, Any]] = (),
        made_with: dict[str, Any] | None = None,
        state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.out = out.absolute()
        self.resumed: dict[str, Any] | None = None
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
        self._identity = None if made_with is None else json.loads(json.dumps({**self._header, "made_with": made_with}))
        self._state = state
        self._left_out = sorted(left_out, key=_id_of)
        self._last_id: str | None = None
        self._shard: _Shard | None = None
        self._under_way: Unfinished | None = None
        self._count = 0

    def __enter__(self) -> ShardWriter:
        refuse_existing(self.out)
        self._under_way = Unfinished(self.out)
        noted = self._under_way.resume(self._identity)
        if noted is not None:
            self._last_id, self.resumed = noted["last_id"], noted["caller"]
            self._count = sum(shard["count"] for shard in self._under_way.shards)
        return self

    def restart(self) -> None:
        """Forget what was taken up: the source is another one."""
        self._unfinished.restart(self._identity)
        self.resumed, self._last_id, self._count = None, None, 0

    def rows(self) -> Iterator[np.ndarray]:
        """Index rows of what is written so far, in blocks."""
        return self._unfinished.rows()

    def all_refusals(self) -> Iterator[dict[str, Any]]:
        """Every line of `refused.jsonl` so far, in order of id."""
        return heapq.merge(self._left_out, self._unfinished.refusals(), key=_id_of)

    def add(self, record: SampleRecord, image: bytes) -> None:
        """Append one sample: the encoded image and its record."""
        if self._last_id is not None and record.id <= self._last_id:
            raise DataError(f"image id {record.id!r} comes twice; ids must differ (rename one of the files or rows)")
        self._last_id = record.id
        number = len(self._unfinished.shards)
        if self._shard is None:
            self._shard = _Shard(self._unfinished.pack / f"shard-{number:06d}.tar")
        key = member_key(record.id)
        text = record_to_json(record)
        row = index_row(record, image, len(text), shard=number, split=self._splits.index(record.split))
        row["offset"] = self._shard.append(f"{key}.{self._extension}", image)
        row["json_offset"] = self._shard.append(f"{key}.json", text)
        self._unfinished.add_row(row.tobytes())
        self._count += 1
        if self._shard.tell() >= self._shard_bytes:
            self._finish_shard()

    def refuse(self, line: dict[str, Any]) -> None:
        """Note one image that is left out: its `id`, in ascending order, and the reason."""
        self._unfinished.refuse(line)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = not isinstance(value, (DataError, ConfigError))
        try:
            if kind is None:
                keep = False
                self._complete()
        except OSError as error:
            keep, value = True, error
        finally:
            if self._shard is not None:
                self._shard.abandon()
            self._unfinished.leave(keep=keep)
        if isinstance(value, OSError):
            raise ResourceError(
                f"cannot write {self.out}: {value.strerror}; make room and give the same command: packing continues"
            ) from value

    @property
    def _unfinished(self) -> Unfinished:
        assert self._under_way is not None, "used outside of its `with`"
        return self._under_way

    def _complete(self) -> None:
        if not self._count:
            raise DataError("no image could be packed; see the reasons above or give another source")
        if self._shard is not None:
            self._finish_shard()
        pack = self._unfinished.pack
        lines = (json.dumps(line).encode("ascii") + b"\n" for line in self.all_refusals())
        self._header["refused_sha256"] = _write_durably(pack / "refused.jsonl", lines)
        self._header["count"] = self._count
        self._header["shards"] = self._unfinished.shards
        blocks = (block.tobytes() for block in self.rows())
        self._header["index_sha256"] = _write_durably(pack / "index.npy", [_npy_header(self._count)], blocks)
        self._header["fingerprint"] = fingerprint_of(self._header)
        _write_durably(pack / "manifest.json", [json.dumps(self._header, indent=1).encode("ascii")])
        flush(pack)
        refuse_existing(self.out)
        pack.rename(self.out)
        flush(self.out.parent)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        shard, self._shard = self._shard, None
        self._unfinished.note(shard.finish(), {"last_id": self._last_id, "caller": self._state()})


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


def _id_of(line: dict[str, Any]) -> str:
    return line["id"]


def _npy_header(count: int) -> bytes:
    """What `numpy.save` puts before the rows of the index."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def _write_durably(path: Path, *parts: Iterable[bytes]) -> str:
    """Write all parts, one after the other; returns their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in chain(*parts):
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
