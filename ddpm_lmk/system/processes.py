"""Processes: ending with a parent, what became of a child, and leaving for good."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

ORPHANED = 75
PR_SET_PDEATHSIG = 1
LOOK_S = 1.0


def die_with_parent(parent: int) -> None:
    """End this process when `parent` goes, so that no orphan works on; call it first thing.

    The kernel sends SIGKILL where it can; elsewhere a thread looks for the parent once a second, which a library that
    holds Python's lock can delay.
    """
    if can_follow_parent():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_follow, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:
        os._exit(ORPHANED)


def can_follow_parent() -> bool:
    """Does the kernel end a child with its parent?"""
    return hasattr(ctypes.CDLL(None), "prctl")


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T, Z; empty where it is gone, or the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def exit_code(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs.

    Where the system can tell without it (macOS before Python 3.13 cannot), the child is left for its owner to collect,
    so that its number stays its own.
    """
    if process.returncode is None and hasattr(os, "waitid"):
        with suppress(ChildProcessError):
            found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return None
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    return process.poll()


def end_children(within_s: float = 2.0) -> None:
    """Kill everything this process has started, and what that has started; called before it leaves in a hurry."""
    # In a thread: an import that hangs, in the main thread, may hold what is needed here.
    thread = threading.Thread(target=_kill_children, name="children", daemon=True)
    thread.start()
    thread.join(within_s)


def leave(code: int) -> NoReturn:
    """End this process now, with everything it wrote, and without the interpreter taking itself down.

    What counts is on disk. Threads and communicators of torch now and then abort while they are being destroyed, or
    wait for ever for processes that are gone.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _kill_children() -> None:
    import psutil  # type: ignore[import-untyped]

    with suppress(psutil.Error, OSError):  # a system that does not say who they are
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(ORPHANED)
