"""Groups for the loop, and one way out for all ranks when one of them cannot be given its part.

A rank whose file system stays away, or whose position has no readable sample, takes part in one more step with a group
it had before. Nothing of that step is kept: the exchange at its end tells all ranks, they save what they have and leave
with the same error. So no rank waits for another, and a healthy step costs nothing. Bad samples travel likewise: only
after a step at which some rank met a new one do the ranks compare lists.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator
from dataclasses import replace
from types import TracebackType

from ddpm_lmk.data.batch import Group
from ddpm_lmk.data.loading.loader import TrainLoader
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import LmkError
from ddpm_lmk.rundir.directory import RunDir

NEWS = 0.5  # levels of the exchange, beside those of `StopRequest`; the largest of all ranks counts
DRY = 3.0


class Supply:
    """The groups of one rank from a step on; a context manager that ends the prefetching."""

    def __init__(self, loader: TrainLoader, parallel: Parallel, run: RunDir, *, start: int) -> None:
        """Take up the list of bad samples, and fetch the first group.

        Raises:
            LmkError: on all ranks alike, if one cannot have it.
        """
        self._parallel, self._run, self._quarantine = parallel, run, loader.quarantine
        self._quarantine.recall(parallel.on_main(lambda: run.journal.rewind_quarantine(start)))
        self._plan, self._step = loader.plan, start
        self._groups: Generator[Group, None, None] = loader.groups(start)
        self._trouble: LmkError | None = None
        began = time.perf_counter()
        with parallel.together():
            self._group = next(self._groups)
        self._waited_s: float | None = time.perf_counter() - began

    def __enter__(self) -> Supply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._groups.close()

    def take(self) -> tuple[Group, float]:
        """The next group, or an old one in its place (`level` then says so), and the seconds it was waited for."""
        if self._waited_s is not None:  # the first group is here already
            waited_s, self._waited_s = self._waited_s, None
            return self._group, waited_s
        began = time.perf_counter()
        self._step += 1
        try:
            self._group = next(self._groups)
        except LmkError as error:
            self._trouble, self._group = error, self._stand_in()
        return self._group, time.perf_counter() - began

    def _stand_in(self) -> Group:
        """The group before, with as many micro-batches as the other ranks have in this step."""
        rank, world, old = self._parallel.rank, self._parallel.world, self._group
        positions, _, micro = self._plan.share(self._step, rank, world)
        batches = itertools.islice(itertools.cycle(old.micro_batches), len(positions) // micro)
        return replace(old, size=self._plan.size(self._step), micro_batches=list(batches))

    @property
    def level(self) -> float:
        """What this rank has to tell the others about the group it took."""
        if self._trouble is not None:
            return DRY
        return NEWS if self._quarantine.news(self._group.bad) else 0.0

    def settle(self, level: float, *, step: int) -> float:
        """After the exchange of the step that made it `step`: list what was met, and return the level that remains.

        It is `DRY` if too many samples are bad.
        """
        if not level:
            return 0.0
        met = [bad for found in self._parallel.gather(self._quarantine.news(self._group.bad)) for bad in found]
        self._run.journal.quarantine(self._quarantine.merge(met, step=step))
        try:
            self._quarantine.check()
        except LmkError as error:
            self._trouble = error
            return DRY
        return 0.0 if level == NEWS else level

    def halt(self, error: LmkError) -> float:
        """Leave with this error, which all ranks have, once the state is saved; returns the level that says so."""
        self._trouble = error
        return DRY

    def leave(self, *, step: int, where: str) -> None:
        """Raise, on all ranks, what ended the supply, if anything did; the state was saved."""
        with self._parallel.together():
            if self._trouble is not None:
                raise type(self._trouble)(f"{self._trouble}; trained to step {step}, saved in {where}")
