"""Processes: ending with the parent, the exit code of a child, killing children, and leaving."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

ORPHANED = 75  # the exit code of a stop: whoever started the parent may start it again
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
POLL_S = 1.0


def die_with_parent(parent: int) -> None:
    """End this process when `parent` goes, so that no orphan trains on; call it first thing.

    The kernel sends SIGKILL where it can; elsewhere a thread checks once a second, which a library that holds Python's
    lock can delay.
    """
    if can_follow_parent():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_follow, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it went before the kernel was asked
        os._exit(ORPHANED)


def can_follow_parent() -> bool:
    """Does the kernel end a child with its parent?"""
    return hasattr(ctypes.CDLL(None), "prctl")


def exit_code(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> int | None:
    """Exit code of a child, negative for a signal; None while it runs."""
    if process.returncode is None and hasattr(os, "waitid"):  # macOS has it from Python 3.13 on
        with suppress(ChildProcessError):
            # Left for its owner to collect: until then no other process can get its number.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return process.poll()


def end_children(within_s: float = 2.0, *, of: int | None = None) -> None:
    """Kill all descendants of this process, before it leaves in a hurry, or those of its child `of`."""
    # In a thread: the main thread may hang in an import, and hold the lock that importing psutil needs.
    thread = threading.Thread(target=_kill_descendants, args=(of,), name="children", daemon=True)
    thread.start()
    thread.join(within_s)


def leave(code: int) -> NoReturn:
    """End this process now, with everything it wrote, and without the interpreter's own shutdown.

    What counts is on disk. Threads and communicators of torch sometimes abort while they are being destroyed, or wait
    for ever for processes that are gone.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _kill_descendants(of: int | None) -> None:
    import psutil  # type: ignore[import-untyped]

    with suppress(psutil.Error, OSError):  # a system that does not say who they are
        for child in psutil.Process(of).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(ORPHANED)
