"""What a process that reads foreign files gives up, as far as this system lets it; `absent` says how far that is."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ddpm_lmk.system.processes import can_follow_parent, die_with_parent

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
STATM = Path("/proc/self/statm")


def confine(*, memory_bytes: int, file_bytes: int, cpu_s: int | None = None, has_network: bool = True) -> None:
    """Make this process a sandbox for foreign files: it dies with its parent and can take only so much.

    Addresses are not limited where the system does not count them, or refuses the limit (macOS).

    Args:
        memory_bytes: addresses beyond those it has mapped now.
        file_bytes: size of a file that it writes; pipes do not count.
        cpu_s: seconds of processor time.
        has_network: without, it gets a network of its own with nobody in it, where the kernel allows that.
    """
    die_with_parent(os.getppid())
    if not has_network:
        leave_network()
    mapped = mapped_bytes()
    if mapped is not None:
        limit = mapped + memory_bytes
        given = resource.getrlimit(resource.RLIMIT_AS)[1]  # a batch system's or the user's own
        limit = limit if given == resource.RLIM_INFINITY else min(limit, given)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the image of a patient
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))


def mapped_bytes() -> int | None:
    """Addresses this process has mapped; None where the system does not say."""
    try:
        return int(STATM.read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def leave_network() -> bool:
    """Give this process a network of its own, with nobody in it; False where the kernel does not allow it."""
    unshare: Callable[[int], int] | None = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    return unshare is not None and unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def widen_pipe(descriptor: int, size: int) -> None:
    """Let a pipe hold `size` bytes, where it can; one that cannot is slower and nothing else."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # a user's pipes have a limit
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, size)


def absent() -> list[str]:
    """Protections that this system does not have, one line each."""
    missing = []
    if mapped_bytes() is None or not _can_limit_addresses():
        missing.append("no limit of memory for decoders: a crafted file can take all there is")
    if not can_follow_parent():
        missing.append("children of a killed process are noticed after a second, not by the kernel")
    if not hasattr(ctypes.CDLL(None), "unshare"):
        missing.append("import-weights reads foreign files with the network in reach")
    if not hasattr(os, "sched_getaffinity"):
        missing.append("cores granted to a process are not known: all of the machine are used; export OMP_NUM_THREADS")
    return missing


def _can_limit_addresses() -> bool:
    """May the limit that holds now be set once more?"""
    try:
        resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))
    except (ValueError, OSError):
        return False
    return True
