"""Being asked to stop: a signal sets a flag, the loop agrees on it, saves and leaves.

SIGTERM and SIGUSR1 come from schedulers, SIGINT from a keyboard. A launcher passes on what it gets, so one request can
arrive twice within moments; only a signal that comes later than that means "at once", and then nothing is saved.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ddpm_lmk.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 1.0


class InterruptedRunError(StoppedError):
    """Stopped by Ctrl-C after a clean save."""

    exit_code = 130


class StopRequest:
    """Catches signals while a `with` block runs in the main thread; elsewhere signals do what they always did."""

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def level(self) -> float:
        """0: go on; 1: a scheduler asks; 2: a keyboard asks. The largest of all ranks decides."""
        return 0.0 if not self._signal else 2.0 if self._signal == signal.SIGINT else 1.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and now - self._since > SAME_REQUEST_S:
            os._exit(128 + number)
        if not self._signal:
            self._signal, self._since = number, now


def stopped(level: float, *, step: int, where: str) -> StoppedError:
    """The error that ends a run stopped at `step`, after its state was saved in `where`."""
    kind, what = (InterruptedRunError, "interrupted") if level == 2.0 else (StoppedError, "asked to stop")
    error = kind(f"{what} after step {step}; saved in {where}, the same command continues")
    error.is_shared = True
    return error
