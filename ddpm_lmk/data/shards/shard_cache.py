"""Copies of remote shards on a local disk: bounded, least recently used first out, shared by all processes there.

A copy that exists is whole: it is written under another name and renamed. Who wants a shard that another process is
fetching waits for it. Readers open a copy for each read, so a dropped one frees its space at once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCKS = ".locks"
_UNFINISHED = ".unfinished-"
_TOUCH_EVERY_S = 10.0


class ShardCache:
    """The copies of one pack in `folder`; the limit holds for all packs beside it.

    Args:
        folder: made if it is not there; its parent is the cache.
        limit_bytes: of all shards in the cache together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self._limit = folder, limit_bytes
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        self._touched: dict[str, float] = {}

    def has(self, name: str, size: int) -> bool:
        """Is there a whole copy?"""
        try:
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def get(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The path of a copy, fetched if need be; `fetch` writes one to the path it is given.

        Raises:
            Whatever `fetch` raises; OSError if the disk refuses.
        """
        if not self.has(name, size):
            with _locked(self.folder / _LOCKS / name):
                if not self.has(name, size):
                    unfinished = self.folder / f"{_UNFINISHED}{size}-{name}"
                    self._make_room(size, unfinished)
                    fetch(unfinished)
                    unfinished.replace(self.folder / name)
        self._touch(name)
        return self.folder / name

    def drop(self, name: str) -> None:
        """Remove a copy."""
        (self.folder / name).unlink(missing_ok=True)

    def _touch(self, name: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:
            self._touched[name] = now
            try:
                os.utime(self.folder / name)
            except FileNotFoundError:
                del self._touched[name]  # dropped by another process; whoever reads it will see

    def _make_room(self, size: int, unfinished: Path) -> None:
        """Drop copies until one of `size` fits, and claim its place: `unfinished` counts from now on."""
        root = self.folder.parent
        with _locked(root / ".lock"):
            # In this order, so that one that is being renamed is seen twice rather than never.
            used = size + sum(_claimed(path) for path in root.glob(f"*/{_UNFINISHED}*") if path != unfinished)
            copies = sorted(_stats(path for path in root.glob("*/*.tar") if not path.name.startswith(_UNFINISHED)))
            used += sum(length for _, length, _ in copies)
            for _, length, path in copies:
                if used <= self._limit:
                    break
                path.unlink(missing_ok=True)
                used -= length
            unfinished.touch()


def _claimed(unfinished: Path) -> int:
    """Bytes of a copy that is being fetched; one whose process died is removed."""
    size, _, name = unfinished.name.removeprefix(_UNFINISHED).partition("-")
    descriptor = os.open(unfinished.parent / _LOCKS / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(size)
    finally:
        os.close(descriptor)
    unfinished.unlink(missing_ok=True)
    return 0


def _stats(paths: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, size and path of files that are still there."""
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        yield found.st_mtime_ns, found.st_size, path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
