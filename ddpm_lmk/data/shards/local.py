"""Reads pieces of shards in a local folder."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import DataError

_MAX_OPEN = 256


class LocalShards:
    """The shards of a folder; safe from many threads. `RemoteShards` answers the same calls."""

    is_remote = False

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._handles: dict[int, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._handles)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on; fewer where it was cut off."""
        handle = self._handles.get(shard)
        if handle is not None:
            return os.pread(handle, size, offset)
        path = self.path(shard)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; is the folder still there?") from error
        keep = len(self._handles) < _MAX_OPEN
        try:
            return os.pread(handle, size, offset)
        finally:
            if not keep or self._handles.setdefault(shard, handle) != handle:
                os.close(handle)

    def read_origin(self, shard: int, offset: int, size: int) -> bytes | None:
        """The same bytes from where they come from, if `read` gives a copy; None: it does not."""
        return None

    def forget(self, shard: int) -> None:
        """Drop the copy of a shard, which is damaged."""

    def expect(self, shards: Iterable[int]) -> None:
        """These will be read soon; the kernel needs no telling."""

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._folder / self._shards[shard]["name"]

    def beside(self, name: str) -> Path | None:
        """A file beside the shards, where there is one."""
        path = self._folder / name
        return path if path.is_file() else None

    def names(self) -> set[str] | None:
        """What lies in the folder; None: that cannot be told."""
        return {path.name for path in self._folder.iterdir()}

    def close(self) -> None:
        """Close the files."""
        _close_all(self._handles)


def _close_all(handles: dict[int, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])
