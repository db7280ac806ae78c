"""Global batches for the loop, and one way out for all ranks when one of them cannot be given its part.

A rank whose file system stays away, or whose position has no readable sample, takes part in one more step with a batch
it had before. Nothing of that step is kept: the exchange at its end tells all ranks, they save what they have and leave
with the same error. So no rank waits for another, and a healthy step costs nothing. Bad samples travel likewise: only
after a step at which some rank met a new one do the ranks compare lists.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator
from dataclasses import replace

from ddpm_lmk.data.batch import GlobalBatch
from ddpm_lmk.data.loading.loader import TrainLoader
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import LmkError
from ddpm_lmk.rundir.directory import RunDir

# Levels of the exchange at the end of a step, beside those of `StopRequest`; the largest of all ranks counts.
NEW_BAD_SAMPLES = 0.5
NO_DATA = 3.0


class DataFeed:
    """The global batches of one rank from a step on; a context manager that ends the prefetching."""

    def __init__(self, loader: TrainLoader, parallel: Parallel, run: RunDir, *, start: int) -> None:
        """Take up the list of bad samples, and fetch the first batch.

        Raises:
            LmkError: on all ranks alike, if one cannot have it.
        """
        self._parallel, self._run, self._quarantine = parallel, run, loader.quarantine
        self._quarantine.recall(parallel.on_main(lambda: run.log.rewind_quarantine(start)))
        self._plan, self._step = loader.plan, start
        self._batches: Generator[GlobalBatch, None, None] = loader.global_batches(start)
        self._error: LmkError | None = None
        began = time.perf_counter()
        # The first batch tells most of what can be wrong with data, and no rank has begun a collective yet.
        with parallel.together():
            self._batch = next(self._batches)
        self._waited_s: float | None = time.perf_counter() - began

    def __enter__(self) -> DataFeed:
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()

    def take(self) -> tuple[GlobalBatch, float]:
        """The next global batch, or an old one in its place (`level` then says so), and the seconds waited for it."""
        if self._waited_s is not None:  # the first is here already
            waited_s, self._waited_s = self._waited_s, None
            return self._batch, waited_s
        began = time.perf_counter()
        self._step += 1
        try:
            self._batch = next(self._batches)
        except LmkError as error:
            # Leaving here would let the others wait in their reduction until the launcher calls it a hang.
            self._error, self._batch = error, self._stand_in()
        return self._batch, time.perf_counter() - began

    def _stand_in(self) -> GlobalBatch:
        """The batch before, with as many micro-batches as the other ranks have in this step: collectives must match."""
        positions, _, micro = self._plan.share(self._step, self._parallel.rank, self._parallel.world)
        batches = itertools.islice(itertools.cycle(self._batch.micro_batches), len(positions) // micro)
        return replace(self._batch, size=self._plan.size(self._step), micro_batches=list(batches))

    @property
    def level(self) -> float:
        """What this rank has to tell the others about the batch it took."""
        if self._error is not None:
            return NO_DATA
        return NEW_BAD_SAMPLES if self._quarantine.news(self._batch.bad) else 0.0

    def end_step(self, level: float, *, step: int) -> float:
        """After the exchange of the step that made it `step`: list bad samples, and return the level that remains.

        It is `NO_DATA` if too many samples are bad.
        """
        # The largest level of all ranks: where it is 0 no rank has news, and nothing is exchanged.
        if not level:
            return 0.0
        # In the order of ranks, so that the list has the same bytes whoever met a sample first.
        met = [bad for each in self._parallel.gather(self._quarantine.news(self._batch.bad)) for bad in each]
        self._run.log.quarantine(self._quarantine.merge(met, step=step))
        try:
            self._quarantine.check()
        except LmkError as error:
            self._error = error
            return NO_DATA
        return 0.0 if level == NEW_BAD_SAMPLES else level

    def halt(self, error: LmkError) -> float:
        """Leave with this error, which all ranks have, once the state is saved; returns the level that says so."""
        self._error = error
        return NO_DATA

    def raise_if_halted(self, *, step: int, where: str) -> None:
        """Raise, on all ranks, what ended the data, if anything did; the state was saved."""
        with self._parallel.together():
            if self._error is not None:
                raise type(self._error)(f"{self._error}; trained to step {step}, saved in {where}")
