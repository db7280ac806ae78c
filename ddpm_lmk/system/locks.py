"""Locks on files, held by the kernel (flock): one is free the moment its holder is dead, however it died.

Not `filelock`: where a file system has no locks it falls back to a file whose existence is the lock, which a dead
holder keeps for ever, and versions before 3.21 empty the file that names the holder. A file system without locks is an
error here, which says so (NFS: version 4, or without nolock).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_lmk.system.files import file_mode


def lock(path: Path, *, waits: bool = False) -> int | None:
    """Lock a file, made where it is missing, for as long as the returned descriptor is open; None: another holds it.

    Args:
        waits: for the other, however long it takes.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode())
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path, *, waits: bool = False) -> Iterator[bool]:
    """Hold the lock while the block lasts; yields False where another holds it. Raises as `lock`."""
    descriptor = lock(path, waits=waits)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
