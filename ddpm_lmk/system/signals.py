"""Stop signals: training saves and leaves, everything else leaves at once.

SIGTERM, SIGUSR1 and SIGHUP come from schedulers and closed terminals, SIGINT from a keyboard. A launcher passes on what
it gets, so one request can arrive twice within moments; only a signal that comes later than that means "at once", and
then nothing is saved. What is not saved within the time of grace is left: the last checkpoint counts.

Signals are read by a thread, so that a main thread that waits in C for another rank, a server or a disk cannot delay
them. A process that leaves kills those that it has started.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from ddpm_lmk.errors import ConfigError, StoppedError
from ddpm_lmk.system import environment, processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S = 1.0  # a signal of the terminal and the same one passed on by a launcher are one request
GRACE = "DDPM_LMK_GRACE_S"  # environment variable: seconds from a signal to the end of the last process
DEFAULT_GRACE_S = 25.0  # schedulers kill after 30
MARGIN_S = 4.0  # by which ranks leave before their launcher does
SHOW_CURSOR = b"\x1b[?25h"
MARKED = 0x80  # in a byte to the thread: written by the handler, of a signal that the thread may have read itself


class InterruptedRunError(StoppedError):
    """Stopped by Ctrl-C after a clean save."""

    exit_code = 130


def exit_code_of(number: int) -> int:
    """Exit code after the signal `number`."""
    return _error_of(number).exit_code


def _error_of(number: int) -> type[StoppedError]:
    return InterruptedRunError if number == signal.SIGINT else StoppedError


def grace_s() -> float:
    """Seconds from a signal to the end of the last process; raises `ConfigError` where the environment has no such."""
    text = os.environ.get(GRACE, str(DEFAULT_GRACE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MARGIN_S < seconds < math.inf:
        raise ConfigError(f"{GRACE}={text!r}; wanted seconds from a signal to the end of a run, above {MARGIN_S:g}")
    return seconds


class StopRequest:
    """Catches stop signals while a `with` block runs in the main thread; in another thread it does nothing.

    Args:
        on_first: called, in another thread, with the first signal.
        before_leaving: called, in another thread, before this process ends without saving.
        within_s: seconds from the first signal to such an end.
        raises: does a block that ends well in spite of a signal raise `StoppedError`?

    Attributes:
        signal: the first signal, or 0.
    """

    def __init__(
        self,
        *,
        on_first: Callable[[int], None] | None = None,
        before_leaving: Callable[[], None] | None = None,
        within_s: float | None = None,
        raises: bool = True,
    ) -> None:
        self.signal = 0
        self._on_first, self._before_leaving = on_first, before_leaving
        self._within_s = grace_s() - MARGIN_S if within_s is None else within_s
        self._raises = raises
        self._first_at: float | None = None  # when the thread read the first signal
        self._handlers: dict[int, Any] = {}  # those that were there before

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._inlet, self._outlet = os.pipe()
            os.set_blocking(self._outlet, False)
            self._wakeup_before = signal.set_wakeup_fd(self._outlet, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            # Under `nohup` the end of a terminal is no request.
            is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            caught = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_hangup_ignored]
            self._handlers = {number: signal.signal(number, self._mark) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._outlet, b"\0")  # ends the thread
        self._thread.join()
        os.close(self._inlet)
        os.close(self._outlet)
        self._handlers = {}
        if self.signal and error is None and self._raises:
            raise stopped_outside(self.signal)

    @property
    def level(self) -> float:
        """0: no request; 1: of a scheduler; 2: of a keyboard. The largest of all ranks decides."""
        return 0.0 if not self.signal else 2.0 if self.signal == signal.SIGINT else 1.0

    def _mark(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions: the next one sees the signal."""
        self.signal = self.signal or number
        if self._first_at is None:  # the wake-up byte of the interpreter may have been lost in a full pipe
            os.write(self._outlet, bytes([number | MARKED]))

    def _listen(self) -> None:
        """In the thread: note the signal even when the main thread waits in C, and end the process in time."""
        while True:
            left_s = None if self._first_at is None else max(0.0, self._first_at + self._within_s - time.monotonic())
            if not select.select([self._inlet], [], [], left_s)[0]:
                print_status(
                    f"not saved within {self._within_s:.0f} s; the same command continues from the last checkpoint"
                )
                self._leave(exit_code_of(self.signal))
            for byte in os.read(self._inlet, 64):
                if byte == 0:
                    return
                if byte & MARKED and self._first_at is not None:
                    continue  # the thread has read this signal itself: no second request, however late this is read
                if byte & ~MARKED in STOP_SIGNALS:
                    self._note(byte & ~MARKED)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at, self.signal = now, self.signal or number
            if self._on_first is not None:
                self._on_first(number)
        elif now - self._first_at > SAME_REQUEST_S:
            self._leave(128 + number)

    def _leave(self, code: int) -> None:
        if self._before_leaving is not None:
            self._before_leaving()
        _leave(code)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Outside of training there is nothing to save: a signal ends the process with the code of a stop.

    A `StopRequest` inside of the block takes over for as long as it lasts.
    """
    with StopRequest(on_first=leave_at_once, within_s=SAME_REQUEST_S, raises=False):
        yield


def leave_at_once(number: int) -> None:
    """End this process, and those it has started, with the code of a stop."""
    if not environment.is_rank() or os.environ.get("RANK", "0") == "0":
        print_status(f"error[{StoppedError.__name__}]: {stopped_outside(number)}")
    _leave(exit_code_of(number))


def _leave(code: int) -> None:
    """End this process and those it has started; nothing that the main thread may hold is waited for."""
    processes.end_children()
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)  # a progress bar may have hidden it
    os._exit(code)


def stopped(level: float, *, step: int, where: str) -> StoppedError:
    """The error that ends a run stopped at `step`, after its state was saved in `where`."""
    kind, what = (InterruptedRunError, "interrupted") if level == 2.0 else (StoppedError, "asked to stop")
    error = kind(f"{what} after step {step}; saved in {where}, the same command continues")
    error.is_shared = True
    return error


def stopped_outside(number: int) -> StoppedError:
    """The error of a process that was asked to stop where there is nothing to save."""
    error = _error_of(number)(f"{signal.Signals(number).name} outside of training; the same command continues")
    error.is_shared = True
    return error


def check_stopped(code: int) -> None:
    """Raise the error of a stop where a part of this command has ended with the exit code of one."""
    if code == InterruptedRunError.exit_code:
        raise stopped_outside(signal.SIGINT)
    if code == StoppedError.exit_code:
        raise StoppedError("asked to stop, or another process is at the same work; the same command continues")


def print_status(text: str) -> None:
    """One line on standard error where anybody can take it, without a lock that the main thread may hold."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
