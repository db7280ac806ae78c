"""Writes shards: WebDataset tars, the index and the manifest, so that what exists under its final name is complete.

Bytes depend only on what is added and on the settings: no times, no owners, no paths of this machine. Pixels come
encoded, from `images.resize`. What is under way, or was interrupted and can be resumed, lies in the folder
`.NAME.partial` beside the target: the finished shards (`pack/`) and a database of the rows and refusals so far, in
which a transaction ends with every finished shard. What a killed writer had not committed is done again.
"""

from __future__ import annotations

import contextlib
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

from ddpm_lmk.data.duplicates.fingerprints import FILE_NAME as PRINTS
from ddpm_lmk.data.duplicates.fingerprints import prints_file
from ddpm_lmk.data.shards.manifest import TARS
from ddpm_lmk.data.shards.records import (
    EXTENSIONS,
    FORMAT,
    FORMAT_VERSION,
    IN_PLACE_VERSION,
    INDEX_DTYPE,
    Aspect,
    SampleRecord,
    Stored,
    fingerprint_of,
    index_row,
    member_key,
    record_to_json,
)
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError, ResourceError, RunConflictError
from ddpm_lmk.system import locks
from ddpm_lmk.system.files import flush

SHARD_BYTES = 64 << 20  # about a thousand raw 256 x 256 images; the loader shuffles inside a window of shards
_MOST_SPLITS = 20
_ROWS_AT_ONCE = 1 << 16
_SCHEMA = """
BEGIN;
CREATE TABLE packing (identity TEXT);
CREATE TABLE shards (facts TEXT, state TEXT);
CREATE TABLE samples (digest BLOB, row BLOB, fingerprint BLOB);
CREATE INDEX by_digest ON samples (digest);
CREATE TABLE refused (line TEXT);
"""


def is_begun(out: Path) -> bool:
    """Is there a packing into `out` that can be resumed?"""
    return _partial_folder(out).exists()


def _partial_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.partial")


class ShardWriter:
    """Context manager: `add` samples in ascending order of id; leaving it without an error makes `out` appear, whole.

    With encoding "in_place" the images stay in tars of others, in whose order samples are added: a shard holds the
    records of one of these tars, and the caller says where it ends (`finish_shard`).

    Whatever stops it, finished shards stay beside `out`, and a writer of the same header and `made_with` resumes after
    them; `resumed` is then the state noted with the last one. An error of the data leaves nothing.

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
        encoding: Stored,
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
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "format_version": IN_PLACE_VERSION if encoding == "in_place" else FORMAT_VERSION,
            "dataset": dataset,
            "spec": spec.model_dump(mode="json"),
            "splits": list(splits),
            "encoding": encoding,
            "bits": bits,
            "stored_size": stored_size,
            "aspect": aspect,
            "settings": settings,
        }
        made = {**self._header, "made_with": made_with, "tables": _SCHEMA}
        self._identity = None if made_with is None else json.dumps(made)
        self._shard_bytes, self._state, self._splits = shard_bytes, state, splits
        self._left_out = sorted(left_out, key=_id_of)  # not in the database: a resumed call brings them again
        self._folder = _partial_folder(out)
        self._lock: int | None = None
        self._db: sqlite3.Connection | None = None
        self._shard: _Shard | None = None
        self._shards: list[dict[str, Any]] = []  # finished
        self._last_id: str | None = None
        self._count = 0

    def __enter__(self) -> ShardWriter:
        refuse_existing(self.out)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = locks.lock(self._folder / "lock")
            if self._lock is None:
                raise RunConflictError(f"another process is packing into {self.out}; wait, or choose another --out")
            self._resume()
        except (OSError, sqlite3.Error) as error:
            self._disconnect()
            self._unlock()
            raise ResourceError(f"cannot write beside {self.out}: {_reason(error)}; choose another --out") from error
        return self

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume(self) -> None:
        """Take up what is there, if it was made of the same; else begin anew."""
        noted: list[tuple[str, str]] = []
        try:
            self._connect()
            is_same = self.db.execute("SELECT identity FROM packing").fetchone() == (self._identity,)
            if is_same and self._identity is not None:
                noted = self.db.execute("SELECT facts, state FROM shards ORDER BY rowid").fetchall()
        except sqlite3.DatabaseError:  # no tables: new; or damaged
            pass
        shards = [json.loads(facts) for facts, _ in noted]
        pack = self._folder / "pack"
        sizes = {path.name: path.stat().st_size for path in pack.iterdir()} if pack.is_dir() else {}
        if not shards or any(sizes.get(shard["name"]) != shard["size"] for shard in shards):
            self.restart()
            return
        for name in sizes.keys() - {shard["name"] for shard in shards}:
            (pack / name).unlink()  # it was being written
        self.db.execute("BEGIN")
        state = json.loads(noted[-1][1])
        self._shards, self._count = shards, sum(shard["count"] for shard in shards)
        self._last_id, self.resumed = state["last_id"], state["caller"]
        self._header["splits"] = state["splits"]

    def restart(self) -> None:
        """Forget what was resumed: the source is another one."""
        self._disconnect()
        for path in self._folder.glob("progress.*"):
            path.unlink()
        shutil.rmtree(self._folder / "pack", ignore_errors=True)
        (self._folder / "pack").mkdir()
        self._shards, self._last_id, self._count, self.resumed = [], None, 0, None
        self._header["splits"] = list(self._splits)
        self._connect()
        self.db.executescript(_SCHEMA)
        self.db.execute("INSERT INTO packing VALUES (?)", (self._identity,))

    @property
    def db(self) -> sqlite3.Connection:
        """The rows and refusals so far; a transaction is open, which ends with a finished shard."""
        assert self._db is not None, "used outside of its `with`"
        return self._db

    def _connect(self) -> None:
        # The folder is locked already, and SQLite's own locks do not work on every network file system.
        where = f"{(self._folder / 'progress.sqlite').as_uri()}?vfs=unix-none"
        self._db = sqlite3.connect(where, uri=True, isolation_level=None)

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()

    def add(self, record: SampleRecord, image: bytes, fingerprint: bytes | None = None) -> None:
        """Append one sample: the encoded image and its record, of which only the record where it is `in_tar`.

        `fingerprint`: its row of `prints.bin`, which is written along with a dataset in place.
        """
        is_packed = record.in_tar is None
        if is_packed and self._last_id is not None and record.id <= self._last_id:
            raise DataError(f"image id {record.id!r} comes twice; ids must differ (rename one of the files or rows)")
        self._last_id = record.id
        number = len(self._shards)
        if self._shard is None:
            self._shard = _Shard(self._folder / "pack" / f"shard-{number:06d}.tar")
        key, text = member_key(record.id), record_to_json(record)
        row = index_row(record, image, len(text), shard=number, split=self._split_code(record.split))
        if is_packed:
            row["offset"] = self._shard.append(f"{key}.{EXTENSIONS[self._header['encoding']]}", image)
        row["json_offset"] = self._shard.append(f"{key}.json", text)
        digest = row["sha256"].tobytes() if is_packed else _digest(image)
        self.db.execute("INSERT INTO samples VALUES (?, ?, ?)", (digest, row.tobytes(), fingerprint))
        self._count += 1
        if is_packed and self._shard.size >= self._shard_bytes:
            self.finish_shard()

    def _split_code(self, split: str) -> int:
        """The place of a split in the header; those that tars of others name are known when they are met."""
        splits = self._header["splits"]
        if split not in splits and self._header["encoding"] == "in_place":
            splits.append(split)
            if len(splits) > _MOST_SPLITS:
                raise DataError(f"more than {_MOST_SPLITS} splits, last {split!r}; name another member of the samples")
        return splits.index(split)

    def refuse(self, line: dict[str, Any]) -> None:
        """Note one image that is left out: its `id`, in ascending order, and the reason."""
        self.db.execute("INSERT INTO refused VALUES (?)", (json.dumps(line),))

    def holds(self, image: bytes) -> bool:
        """Was the very same encoded image added before?"""
        found = self.db.execute("SELECT 1 FROM samples WHERE digest = ? LIMIT 1", (_digest(image),)).fetchone()
        return found is not None

    def rows(self) -> Iterator[np.ndarray]:
        """Index rows of what is written so far, in blocks."""
        cursor = self.db.execute("SELECT row FROM samples ORDER BY rowid")
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            yield np.frombuffer(b"".join(row for (row,) in rows), INDEX_DTYPE)

    def refusals(self) -> Iterator[dict[str, Any]]:
        """Every line of `refused.jsonl` so far, in order of id."""
        lines = (json.loads(line) for (line,) in self.db.execute("SELECT line FROM refused ORDER BY rowid"))
        return heapq.merge(self._left_out, lines, key=_id_of)

    @property
    def splits(self) -> list[str]:
        """Names of the splits so far."""
        return self._header["splits"]

    def finish_shard(self, tar: dict[str, Any] | None = None) -> None:
        """End a shard; `tar` is the name, size, sha256 and place of the tar its images are in, if they are in one."""
        assert self._shard is not None
        shard, self._shard = self._shard.finish(), None
        if tar is not None:
            shard["tar"] = tar
        self._shards.append(shard)
        state = {"last_id": self._last_id, "splits": self.splits, "caller": self._state()}
        self.db.execute("INSERT INTO shards VALUES (?, ?)", (json.dumps(shard), json.dumps(state)))
        self.db.execute("COMMIT")  # only now, when the shard is on the disk
        self.db.execute("BEGIN")

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
                with contextlib.suppress(OSError):  # what is left in its buffer does not fit either
                    self._shard.file.close()
            self._disconnect()
            if not (keep and self._shards):  # before the lock is released: nobody may have begun there
                shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()
        if isinstance(value, (OSError, sqlite3.Error)):
            raise ResourceError(
                f"cannot write {self.out}: {_reason(value)}; make room and give the same command: packing continues"
            ) from value

    def _complete(self) -> None:
        if not self._count:
            raise DataError("no image could be packed; see the reasons above or give another source")
        if self._shard is not None:
            self.finish_shard()
        pack = self._folder / "pack"
        lines = (json.dumps(line).encode("ascii") + b"\n" for line in self.refusals())
        self._header["refused_sha256"] = _write_durably(pack / "refused.jsonl", lines)
        self._header["count"] = self._count
        is_in_place = self._header["encoding"] == "in_place"
        if is_in_place:  # in a file of their own: a set whose tars were moved is the same set
            places = [os.fsencode(shard["tar"].pop("place")) + b"\n" for shard in self._shards]
            _write_durably(pack / TARS, places)
        self._header["shards"] = self._shards
        blocks = (block.tobytes() for block in self.rows())
        self._header["index_sha256"] = _write_durably(pack / "index.npy", chain([_npy_header(self._count)], blocks))
        self._header["fingerprint"] = fingerprint_of(self._header)
        if is_in_place:  # now, while they are known: to decode every image again costs as much as all of this
            rows = self.db.execute("SELECT fingerprint FROM samples ORDER BY rowid")
            _write_durably(pack / PRINTS, prints_file(self._header["fingerprint"], b"".join(row for (row,) in rows)))
        _write_durably(pack / "manifest.json", [json.dumps(self._header, indent=1).encode("ascii")])
        flush(pack)  # names before the rename that makes them visible
        refuse_existing(self.out)
        pack.rename(self.out)
        flush(self.out.parent)


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
        self._count += name.endswith(".json")  # every sample has one
        return offset

    def finish(self) -> dict[str, Any]:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())  # before it is noted as finished
        self.file.close()
        return {"name": self._path.name, "size": self.size, "sha256": self._hash.hexdigest(), "count": self._count}

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


def _reason(error: OSError | sqlite3.Error) -> str:
    return getattr(error, "strerror", None) or str(error)


def _id_of(line: dict[str, Any]) -> str:
    return line["id"]


def _digest(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()[:16]


def _npy_header(count: int) -> bytes:
    """What `numpy.save` puts before the rows of the index."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def _write_durably(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write blocks, one after the other; returns their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
