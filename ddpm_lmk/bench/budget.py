"""Seconds that a benchmark may take, and what it leaves out to keep to them.

A benchmark is a row of parts. Each gets a share of what is left, so that what one does not need goes to those after it;
it tries what it repeats once, and repeats it as often as fits (`ratio.alternate`). A part that would not end in time is
left out and named. One that is at work when the time is over is cut off by a timer, and what it has measured stays.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from ddpm_lmk.bench.ratio import FEWEST_PAIRS, Timings, alternate
from ddpm_lmk.system.console import print_status

# To write the file, compare it and draw it, after the last measurement; of a small budget a tenth.
CONCLUDING_S, CONCLUDING_SHARE = 15.0, 0.1


class OutOfTime(BaseException):
    """Raised by the timer inside of the part that is at work."""


class Budget:
    """Seconds from now, of which the last are for writing.

    Args:
        until: the moment of `clock` by which all has to be done, where another process has set it; default: `seconds`
            from now. `time.monotonic` is the same in every process of a machine.

    Attributes:
        left_out: what was not measured, or not as often as wanted, in words.
    """

    def __init__(
        self, seconds: float, *, until: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._began = clock, clock()
        self.seconds = seconds if until is None else max(0.0, until - self._began)
        self._end = self._began + self.seconds
        self.until = self._end - min(CONCLUDING_S, CONCLUDING_SHARE * self.seconds)
        self.left_out: list[str] = []
        self._part, self._part_until = "", self.until

    @property
    def left_s(self) -> float:
        """Seconds left for measuring."""
        return max(0.0, self.until - self._clock())

    @property
    def share_s(self) -> float:
        """Seconds that the part at work should still take."""
        return max(0.0, self._part_until - self._clock())

    def leave_out(self, what: str) -> None:
        """Note and say what is not measured."""
        self.left_out.append(what)
        print_status(f"left out to keep to {self.seconds:.0f} s: {what}")

    def run(
        self,
        what: str,
        part: Callable[[], object],
        *,
        parts: float = 1,
        needs_s: float = 0.0,
        ends_with_share: bool = False,
    ) -> bool:
        """Do a part, if there is time for it; was it done to its end?

        Args:
            parts: equal parts still to come, this one counted: it should take its share of what is left.
            needs_s: what it takes at least.
            ends_with_share: is it cut off when it has used its share, and not only when all is used?
        """
        left_s = self.left_s
        if left_s <= needs_s:
            self.leave_out(what)
            return False
        self._part, self._part_until = what, self._clock() + left_s / parts
        limit_s = left_s / parts if ends_with_share else left_s
        before = signal.signal(signal.SIGALRM, cut_off)
        try:
            signal.setitimer(signal.ITIMER_REAL, limit_s if math.isfinite(limit_s) else 0)
            part()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            self.leave_out(f"{what}, cut off after {limit_s:.0f} s")
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return True

    def alternate(
        self, calls: Mapping[str, Callable[[], object]], *, rounds: int, needs_all: bool = True, **settings: Any
    ) -> dict[str, Timings]:
        """`ratio.alternate` within the share of the part at work; what it has no time for is noted.

        Args:
            needs_all: every call is measured, however seldom; else those are left out whose turn comes too late in a
                first round.
        """
        trial_s = self.share_s / (FEWEST_PAIRS + 2)
        tried, since, last_s = dict(calls), self._clock(), 0.0
        for name, call in {} if needs_all else calls.items():
            begin = self._clock()
            if begin - since + last_s > trial_s:
                self.leave_out(f"{self._part}: {name}")
                del tried[name]
            else:
                call()
                last_s = self._clock() - begin
        timings: dict[str, Timings] = {}
        try:
            alternate(tried, rounds=rounds, budget_s=self.share_s, into=timings, **settings)
        except OutOfTime:
            if not all(each.wall_s for each in timings.values()):
                raise
        count = min(len(each.wall_s) for each in timings.values())
        for each in timings.values():
            each.keep(count)  # of the round that was cut off nothing
        if count < rounds:
            self.leave_out(f"{self._part}: {rounds - count} of {rounds} rounds")
        return timings

    def conclude(self, what: str, part: Callable[[], object]) -> None:
        """Do a part in the time for writing."""
        self.until = self._end
        self.run(what, part)

    def facts(self) -> dict[str, Any]:
        """What a result file keeps."""
        used_s = self._clock() - self._began
        seconds = round(self.seconds, 1) if math.isfinite(self.seconds) else None
        return {"budget_s": seconds, "measured_for_s": round(used_s, 1), "left_out": self.left_out}


def cut_off(number: int, frame: FrameType | None) -> None:
    """What the timer does."""
    raise OutOfTime
