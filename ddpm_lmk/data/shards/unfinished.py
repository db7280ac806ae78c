"""A packing that is under way, or was interrupted and can go on: the folder `.NAME.partial` beside the pack.

It holds the finished shards (`pack/`), the index and the refusals so far, and a journal with a line for every finished
shard. What was not in the journal when the writer was killed is cut off and done again. One process at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ddpm_lmk.data.shards.records import INDEX_DTYPE
from ddpm_lmk.errors import ResourceError, RunConflictError
from ddpm_lmk.system.durable import flush_directory

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
            self._lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ResourceError(f"cannot write beside {out}: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunConflictError(f"another process is packing into {out}; wait, or choose another --out") from None
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
        flush_directory(self._root)

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
