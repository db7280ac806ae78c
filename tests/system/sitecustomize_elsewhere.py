"""Put on a path as `sitecustomize.py`, it takes away what only Linux has, from a process and from all that it starts.

What is left is what macOS has: no affinity, no /proc, no control groups, no prctl and unshare, no larger pipes, a limit
of addresses that cannot be set, and no `waitid`.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import io
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

GONE = ("prctl", "unshare")
for module, names in (
    (os, ("sched_getaffinity", "sched_setaffinity", "waitid", "posix_fadvise", "pidfd_open")),
    (fcntl, ("F_SETPIPE_SZ", "F_GETPIPE_SZ")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

_setrlimit, _library = resource.setrlimit, ctypes.CDLL


def setrlimit(number: int, limits: tuple[int, int]) -> None:
    if number == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    _setrlimit(number, limits)


class Library(_library):
    def __getattr__(self, name: str) -> Any:
        if name in GONE:
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return super().__getattr__(name)


def without_linux(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a path, for which the files of Linux are not there; psutil, which has its own ways, sees them."""

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        is_linux = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(("/proc", "/sys/fs/cgroup"))
        if is_linux and not sys._getframe(1).f_globals.get("__name__", "").startswith("psutil"):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **options)

    return call


resource.setrlimit = setrlimit
ctypes.CDLL = Library
builtins.open = without_linux(builtins.open)
io.open = without_linux(io.open)
os.open = without_linux(os.open)
os.stat = without_linux(os.stat)
os.listdir = without_linux(os.listdir)
os.scandir = without_linux(os.scandir)
