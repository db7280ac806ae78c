"""Breaking a process from outside its code: at the n-th call of a function it is killed, waits, or the disk refuses.

Calls of the system are met through `os` (`os.fsync`, `os.rename`), anything else through its dotted name. A child of
`forge` is told by `arm`, a real command, and every process it starts, by `environment`. Calls that Python makes in C,
such as `write`, are strace's (`syscalls`).
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypedDict

HERE = Path(__file__).parent
VARIABLE = "LMK_TEST_BREAKS"
PAUSE_S, FOR_EVER_S = 1.0, 1e6

_saving = threading.local()  # `number`: of the checkpoint that this thread is saving


class Break(TypedDict, total=False):
    """One place. `at`: the n-th call counts, None: each; `save`: only calls while that checkpoint is saved count."""

    call: str
    at: int | None
    how: Literal["kill", "kill after", "ENOSPC", "EIO", "pause", "hang"]
    save: int


def environment(*breaks: Break) -> dict[str, str]:
    """Variables with which a command, and all it starts, break there."""
    return {"PYTHONPATH": f"{HERE / 'site'}:{HERE.parents[1]}", VARIABLE: json.dumps(breaks)}


def arm(breaks: Iterable[Break]) -> None:
    """Break this process there, whether the modules are imported already or will be."""
    for each in breaks:
        module, _, name = each["call"].rpartition(".")
        if "save" in each:
            _when_imported("ddpm_lmk.rundir.directory", _count_saves)
        _when_imported(module, functools.partial(_replace, name=name, place=each))


def _replace(module: ModuleType, *, name: str, place: Break) -> None:
    original, counting, calls = getattr(module, name), threading.Lock(), 0

    @functools.wraps(original)
    def breaking(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        if "save" in place and getattr(_saving, "number", 0) != place["save"]:
            return original(*arguments, **more)
        with counting:
            calls += 1
            is_due = place.get("at", 1) in (None, calls)
        if is_due and place["how"] == "kill after":
            original(*arguments, **more)
        if is_due:
            _act(place)
        return original(*arguments, **more)

    setattr(module, name, breaking)


def _act(place: Break) -> None:
    how = place["how"]
    sys.stderr.write(f"broken at {place['call']}: {how}\n")
    sys.stderr.flush()
    if how.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif how in ("pause", "hang"):
        time.sleep(PAUSE_S if how == "pause" else FOR_EVER_S)
    else:
        raise OSError(getattr(errno, how), f"broken at {place['call']}")


def _count_saves(module: ModuleType) -> None:
    """Have every thread know which checkpoint it saves."""
    original, begun = module.RunDir.save_checkpoint, 0
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal begun
        begun += 1
        _saving.number = begun
        try:
            return original(*arguments, **more)
        finally:
            _saving.number = 0

    module.RunDir.save_checkpoint = counted


def _when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, change))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets one module be imported as ever, and changes it before anybody has it."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name, self._change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute, change = spec.loader.exec_module, self._change

        def changed(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec
