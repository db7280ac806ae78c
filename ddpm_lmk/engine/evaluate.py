"""Validation on the way: `evaluate`, and what becomes of one that fails (docs/faults.md, C14).

A validation changes no weights, so one that fails does not end days of training: all ranks agree that it failed, the
event is recorded, and training goes on. The rules that look at scores (plateau, patience, the best weights) learn
nothing of that step. With `--strict` the error ends the run. A file system that stays away is no failure of a
validation: the state is saved and the run leaves, as it does when training meets it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm_lmk.data.loading.loader import EvalLoader
from ddpm_lmk.engine.parallel import Parallel, Precision
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import LmkError, StoppedError
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.system.signals import print_status
from ddpm_lmk.tasks.task import Task

log = logging.getLogger(__name__)


class EvaluationError(LmkError):
    """An evaluation met an error that is none of ours; its traceback was written where it happened."""


class Validation:
    """The evaluations of one run on the way.

    Args:
        is_strict: does a failed one end the run?
    """

    def __init__(
        self, task: Task, loader: EvalLoader, parallel: Parallel, run: RunDir, precision: Precision, *, is_strict: bool
    ) -> None:
        self._task, self._loader, self._parallel, self._run = task, loader, parallel, run
        self._precision, self._is_strict = precision, is_strict
        self._failed_in_a_row = 0

    def score(self, state: TrainState) -> dict[str, float] | None:
        """Figures of the weights in use, or None, with an event, where they could not be had.

        Raises:
            StoppedError: the file system stays away. LmkError: any other error, of a strict run.
        """
        try:
            with state.ema.applied() as model:
                # The average is what will be used, so it is what is scored.
                figures = evaluate(self._task, model, self._loader, self._parallel, self._precision)
        except StoppedError:
            raise
        except LmkError as error:
            if self._is_strict:
                raise
            self._failed_in_a_row += 1
            facts = {"error": type(error).__name__, "reason": str(error), "in_a_row": self._failed_in_a_row}
            effect = "training goes on; plateau, patience and the choice of weights do not see this step"
            self._run.event("validation.failed", step=state.step, **facts, effect=effect)
            if self._parallel.is_main:
                log.warning("validation at step %d failed (%s): %s", state.step, error, effect)
            return None
        self._failed_in_a_row = 0
        return figures


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, loader: EvalLoader, parallel: Parallel, precision: Precision = "auto"
) -> dict[str, float]:
    """Figures of `task` over every sample of `loader`, the same on all ranks; `score` is the one that selects.

    Sums are added in the order of ranks and batches, so they do not depend on who computed which batch.

    Raises:
        LmkError: on all ranks alike, what the first of them met; `EvaluationError` for what is no error of ours.
    """
    was_training = model.training
    model.eval()
    parts: list[dict[str, Tensor]] = []
    try:
        with parallel.together(), _shareable_errors(parallel):
            for batch in loader:
                beat("evaluate")
                with parallel.autocast(precision):
                    parts.append(task.evaluate(model, batch.to(parallel.device)))
            # One read from the device for all batches.
            columns = {key: torch.stack([part[key] for part in parts]).tolist() for key in (parts[0] if parts else ())}
    finally:
        model.train(was_training)
    sums: dict[str, float] = {}
    for of_rank in parallel.gather(columns):
        for key, values in of_rank.items():
            for value in values:
                # Python floats, batch by batch: the order is that of the data, whatever the number of ranks.
                sums[key] = sums.get(key, 0.0) + value
    figures: dict[str, float] = {}
    with parallel.together(), _shareable_errors(parallel):
        figures |= task.summarize(sums)
    return figures


@contextmanager
def _shareable_errors(parallel: Parallel) -> Iterator[None]:
    """Turn an error that is none of ours into one that all ranks can share, after writing its traceback."""
    try:
        yield
    except LmkError:
        raise
    except Exception as error:
        print_status(f"rank {parallel.rank}, in an evaluation:\n{traceback.format_exc()}")
        # Not its message: that may hold a path or more of a patient, and events are kept.
        raise EvaluationError(f"{type(error).__name__} on rank {parallel.rank}, see its traceback above") from None
