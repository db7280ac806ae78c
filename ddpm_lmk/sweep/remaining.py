"""How long a sweep still takes: what its runs were expected to, corrected by what those that ended took.

Without a forecast a run counts by its images, and nothing is known until the first has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from ddpm_lmk.sweep.expand import StageRun, Sweep


def stage_key(stage: StageRun) -> str:
    """A stage among the cells of its sweep, whose names have no space."""
    return f"stage {stage.name}"


def span_s(jobs: Iterable[float], workers: int, busy: Iterable[float] = ()) -> float:
    """Seconds until all `jobs` are done, taken in turn by whoever of `workers` is free; `busy`: what some have left."""
    free_at = sorted([*busy, *[0.0] * workers], reverse=True)[:workers]
    heapq.heapify(free_at)
    for seconds in jobs:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at)


class Remaining:
    """What is left of a sweep, told of every run that starts, comes on and ends.

    Args:
        seconds: expected of stages (by `stage_key`) and cells that are not done; empty: not known.
    """

    def __init__(self, sweep: Sweep, seconds: Mapping[str, float], *, workers: int, stages_at_once: int) -> None:
        images = {stage_key(stage): (stage.steps or 1) * stage.cfg.train.group_size for stage in sweep.stages}
        images |= {cell.name: max(1, cell.images) for cell in sweep.cells}
        self._costs = dict(seconds) if seconds else images
        self._order = list(images)  # stages first, then cells as workers take them
        self._stages = {stage_key(stage) for stage in sweep.stages}
        self._workers, self._stages_at_once = workers, stages_at_once
        self._left = dict.fromkeys(self._costs, 1.0)  # share of each run that is to be done
        self._running: set[str] = set()
        # Of the runs that ended; a forecast counts as one more, of which it was right.
        self._expected = self._taken = max(seconds.values(), default=0.0)

    def skip(self, name: str) -> None:
        """A run is done already, or will not be done."""
        self._left.pop(name, None)
        self._running.discard(name)

    def start(self, name: str) -> None:
        """A worker has taken a run."""
        self._running.add(name)

    def advance(self, name: str, share: float) -> None:
        """So much of a run is done."""
        if name in self._left:
            self._left[name] = 1 - min(1.0, share)

    def end(self, name: str, seconds: float | None) -> None:
        """A run has ended; `seconds`: what it took from its beginning, None where that says nothing."""
        if name in self._left and seconds:
            self._expected += self._costs[name]
            self._taken += seconds
        self.skip(name)

    def seconds(self) -> float | None:
        """Until the last run ends; None: not known yet."""
        if not self._expected:
            return None
        factor = self._taken / self._expected
        total = 0.0
        for is_stage, at_once in ((True, self._stages_at_once), (False, self._workers)):
            names = [name for name in self._order if name in self._left and (name in self._stages) == is_stage]
            seconds = {name: factor * self._costs[name] * self._left[name] for name in names}
            busy = [seconds[name] for name in names if name in self._running]
            total += span_s([seconds[name] for name in names if name not in self._running], at_once, busy)
        return total
