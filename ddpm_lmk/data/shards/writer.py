"""Writes shards: WebDataset tars, the index and the manifest, so that what exists under its final name is complete.

Bytes depend only on what is added and on the settings: no times, no owners, no paths of this machine. Pixels come
encoded, from `images.resize`. What is under way, or was interrupted and can be resumed, lies in the folder
`.NAME.partial` beside the target: the finished shards (`pack/`) and a database of the rows and refusals so far, in
which a transaction ends with every finished shard. What a killed writer had not committed is done again.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from ddpm_lmk.data.shards.records import (
    EXTENSIONS,
    FORMAT,
    FORMAT_VERSION,
    INDEX_DTYPE,
    Aspect,
    Encoding,
    SampleRecord,
    fingerprint_of,
    index_row,
    member_key,
    record_to_json,
)
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError, ResourceError, RunConflictError
from ddpm_lmk.system.files import flush_directory

SHARD_BYTES = 64 << 20  # about a thousand raw 256 x 256 images; the loader shuffles inside a window of shards
_ROWS_AT_ONCE = 1 << 16
_SCHEMA = """
BEGIN;
CREATE TABLE packing (identity TEXT);
CREATE TABLE shards (facts TEXT, state TEXT);
CREATE TABLE samples (digest BLOB, row BLOB);
CREATE INDEX by_digest ON samples (digest);
CREATE TABLE refused (line TEXT);
"""


class Partial:
    """The locked folder of a packing that is under way.

    Raises:
        RunConflictError: another process is packing there.
        ResourceError: it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._root = _partial_folder(out)
        self.pack = self._root / "pack"
        self.shards: list[dict[str, Any]] = []
        self._db: sqlite3.Connection | None = None
        self._lock = FileLock(self._root / "lock", blocking=False)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise RunConflictError(f"another process is packing into {out}; wait, or choose another --out") from None
        except OSError as error:
            raise ResourceError(f"cannot write beside {out}: {error.strerror}; choose another --out") from error

    @property
    def db(self) -> sqlite3.Connection:
        """The database, inside a transaction."""
        assert self._db is not None, "neither resumed nor restarted"
        return self._db

    def resume(self, identity: str | None) -> dict[str, Any] | None:
        """Take up what is there, if it is of the same `identity`; else begin anew. Returns the last state noted."""
        try:
            self._db = self._open()
            is_same = identity is not None and self._db.execute("SELECT identity FROM packing").fetchone() == (
                identity,
            )
            noted = self._db.execute("SELECT facts, state FROM shards ORDER BY rowid").fetchall() if is_same else []
        except sqlite3.DatabaseError:  # no tables: new; or damaged
            noted = []
        self.shards = [json.loads(facts) for facts, _ in noted]
        sizes = {path.name: path.stat().st_size for path in self.pack.iterdir()} if self.pack.is_dir() else {}
        if not noted or any(sizes.get(shard["name"]) != shard["size"] for shard in self.shards):
            self.restart(identity)
            return None
        for name in sizes.keys() - {shard["name"] for shard in self.shards}:
            (self.pack / name).unlink()  # was being written
        self.db.execute("BEGIN")
        return json.loads(noted[-1][1])

    def restart(self, identity: str | None) -> None:
        """Forget everything."""
        self._close()
        for path in self._root.iterdir():
            if path.name.startswith("progress."):
                path.unlink()
        shutil.rmtree(self.pack, ignore_errors=True)
        self.pack.mkdir()
        self.shards = []
        self._db = self._open()
        self._db.executescript(_SCHEMA)
        self._db.execute("INSERT INTO packing VALUES (?)", (identity,))

    def add(self, row: np.ndarray) -> None:
        """Append a row of the index."""
        self.db.execute("INSERT INTO samples VALUES (?, ?)", (row["sha256"].tobytes(), row.tobytes()))

    def refuse(self, line: dict[str, Any]) -> None:
        """Append a line about an image that is left out."""
        self.db.execute("INSERT INTO refused VALUES (?)", (json.dumps(line),))

    def finish_shard(self, shard: dict[str, Any], state: dict[str, Any]) -> None:
        """Note a shard that is on the disk; from here on it is kept."""
        self.shards.append(shard)
        self.db.execute("INSERT INTO shards VALUES (?, ?)", (json.dumps(shard), json.dumps(state)))
        self.db.execute("COMMIT")
        self.db.execute("BEGIN")

    def rows(self) -> Iterator[np.ndarray]:
        """The index so far, in blocks."""
        cursor = self.db.execute("SELECT row FROM samples ORDER BY rowid")
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            yield np.frombuffer(b"".join(row for (row,) in rows), INDEX_DTYPE)

    def refusals(self) -> Iterator[dict[str, Any]]:
        """The refusals so far, in order."""
        for (line,) in self.db.execute("SELECT line FROM refused ORDER BY rowid"):
            yield json.loads(line)

    def holds(self, digest: bytes) -> bool:
        """Is there a sample with this digest (the first 16 bytes of its sha256)?"""
        return self.db.execute("SELECT 1 FROM samples WHERE digest = ? LIMIT 1", (digest,)).fetchone() is not None

    def leave(self, *, keep: bool) -> None:
        """Unlock; without `keep`, or where no shard was finished, nothing stays."""
        self._close()
        if not (keep and self.shards):
            shutil.rmtree(self._root, ignore_errors=True)
        self._lock.release()

    def _open(self) -> sqlite3.Connection:
        # The folder is locked already, and SQLite's own locks do not work on every network file system.
        where = f"{(self._root / 'progress.sqlite').as_uri()}?vfs=unix-none"
        return sqlite3.connect(where, uri=True, isolation_level=None)

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()


def is_begun(out: Path) -> bool:
    """Is there a packing into `out` that can be resumed?"""
    return _partial_folder(out).exists()


def _partial_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.partial")


class ShardWriter:
    """Context manager: `add` samples in ascending order of id; leaving it without an error makes `out` appear, whole.

    Whatever stops it, finished shards stay beside `out`, and a writer of the same `identity` resumes after them;
    `resumed` is then the state noted with the last one. An error of the data leaves nothing.

    Args:
        left_out: lines for `refused.jsonl` that are known before, in any order.
        made_with: what else decides the bytes, such as versions; None: an interrupted writing is begun anew.
        state: what the caller wants to have back when it resumes after the last finished shard; plain JSON.

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
        self._identity = None if made_with is None else json.dumps({**self._header, "made_with": made_with})
        self._state = state
        self._left_out = sorted(left_out, key=_id_of)
        self._last_id: str | None = None
        self._shard: _Shard | None = None
        self._opened: Partial | None = None
        self._count = 0

    def __enter__(self) -> ShardWriter:
        refuse_existing(self.out)
        self._opened = Partial(self.out)
        try:
            noted = self._opened.resume(self._identity)
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(f"cannot write beside {self.out}: {error}; choose another --out") from error
        if noted is not None:
            self._last_id, self.resumed = noted["last_id"], noted["caller"]
            self._count = sum(shard["count"] for shard in self._opened.shards)
        return self

    def restart(self) -> None:
        """Forget what was resumed: the source is another one."""
        self._partial.restart(self._identity)
        self.resumed, self._last_id, self._count = None, None, 0

    def rows(self) -> Iterator[np.ndarray]:
        """Index rows of what is written so far, in blocks."""
        return self._partial.rows()

    def holds(self, image: bytes) -> bool:
        """Was the very same encoded image added before?"""
        return self._partial.holds(hashlib.sha256(image).digest()[:16])

    def refusals(self) -> Iterator[dict[str, Any]]:
        """Every line of `refused.jsonl` so far, in order of id."""
        return heapq.merge(self._left_out, self._partial.refusals(), key=_id_of)

    def add(self, record: SampleRecord, image: bytes) -> None:
        """Append one sample: the encoded image and its record."""
        if self._last_id is not None and record.id <= self._last_id:
            raise DataError(f"image id {record.id!r} comes twice; ids must differ (rename one of the files or rows)")
        self._last_id = record.id
        number = len(self._partial.shards)
        if self._shard is None:
            self._shard = _Shard(self._partial.pack / f"shard-{number:06d}.tar")
        key = member_key(record.id)
        text = record_to_json(record)
        row = index_row(record, image, len(text), shard=number, split=self._splits.index(record.split))
        row["offset"] = self._shard.append(f"{key}.{self._extension}", image)
        row["json_offset"] = self._shard.append(f"{key}.json", text)
        self._partial.add(row)
        self._count += 1
        if self._shard.size >= self._shard_bytes:
            self._finish_shard()

    def refuse(self, line: dict[str, Any]) -> None:
        """Note one image that is left out: its `id`, in ascending order, and the reason."""
        self._partial.refuse(line)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = kind is not None and not isinstance(value, (DataError, ConfigError))
        try:
            if kind is None:
                self._complete()
        except (OSError, sqlite3.Error) as error:
            keep, value = True, error
        finally:
            if self._shard is not None:
                self._shard.file.close()
            self._partial.leave(keep=keep)
        if isinstance(value, (OSError, sqlite3.Error)):
            reason = getattr(value, "strerror", None) or value
            raise ResourceError(
                f"cannot write {self.out}: {reason}; make room and give the same command: packing continues"
            ) from value

    @property
    def _partial(self) -> Partial:
        assert self._opened is not None, "used outside of its `with`"
        return self._opened

    def _complete(self) -> None:
        if not self._count:
            raise DataError("no image could be packed; see the reasons above or give another source")
        if self._shard is not None:
            self._finish_shard()
        pack = self._partial.pack
        lines = (json.dumps(line).encode("ascii") + b"\n" for line in self.refusals())
        self._header["refused_sha256"] = _write_durably(pack / "refused.jsonl", lines)
        self._header["count"] = self._count
        self._header["shards"] = self._partial.shards
        blocks = (block.tobytes() for block in self.rows())
        self._header["index_sha256"] = _write_durably(pack / "index.npy", chain([_npy_header(self._count)], blocks))
        self._header["fingerprint"] = fingerprint_of(self._header)
        _write_durably(pack / "manifest.json", [json.dumps(self._header, indent=1).encode("ascii")])
        flush_directory(pack)  # names before the rename that makes them visible
        refuse_existing(self.out)
        pack.rename(self.out)
        flush_directory(self.out.parent)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        shard, self._shard = self._shard, None
        self._partial.finish_shard(shard.finish(), {"last_id": self._last_id, "caller": self._state()})


class _Shard:
    """One tar being written: hashes while it writes, and tells where each member's content begins.

    `tarfile` writes no digest, and puts the time and the owner into every header unless each is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 - lives as long as the shard
        self.size = 0
        self._path, self._count, self._hash = path, 0, hashlib.sha256()

    def append(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        self._count += 1
        return offset

    def finish(self) -> dict[str, Any]:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())  # before it is noted as finished
        self.file.close()
        return {"name": self._path.name, "size": self.size, "sha256": self._hash.hexdigest(), "count": self._count // 2}

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self.size += len(data)


def refuse_existing(out: Path) -> None:
    """Raise RunConflictError unless `out` is absent or an empty directory; ResourceError when it is a file."""
    if out.exists() and not out.is_dir():
        raise ResourceError(f"{out} is a file; --out wants a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        held = "packed shards" if (out / "manifest.json").is_file() else "other files"
        raise RunConflictError(f"{out} already holds {held}; nothing was changed: use them, or choose another --out")


def _id_of(line: dict[str, Any]) -> str:
    return line["id"]


def _npy_header(count: int) -> bytes:
    """What `numpy.save` puts before the rows of the index."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def _write_durably(path: Path, blocks: Iterable[bytes]) -> str:
    """Write blocks, one after the other; returns their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
