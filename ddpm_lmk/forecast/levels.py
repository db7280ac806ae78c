"""How long a step of a ddpm_unet will take that nobody has run, from one step result of another.

A step is three kinds of work, level by level (`models.cost.level_costs`): operations, at the device's measured rate of
arithmetic; activations, moved a number of times at its measured bandwidth; and weights, likewise. How many times its
ideal each of them takes is fitted, non-negative, to the levels of one result of `bench step`, and their sum is scaled
to its whole step. For another precision than the result's, arithmetic goes at the rate of that precision and
activations at the size it keeps them in; the factors stay.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.forecast.rates import Rates, read_rates, threads_of, whole_step
from ddpm_lmk.measure import Stored
from ddpm_lmk.models.cost import LevelCost, level_costs
from ddpm_lmk.tasks import Task

ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Forecast:
    """Predicts steps on one kind of machine, in one precision.

    Attributes:
        times: how many times the ideal operations, activations and weights take.
        update_s_per_parameter: of the optimizer and the average.
        whole: the whole step over the sum of its levels.
        kept: size of what is kept for the backward pass over that in the precision of the result.
        step, device: the results it comes from.
    """

    times: tuple[float, float, float]
    update_s_per_parameter: float
    whole: float
    rates: Rates
    threads: int
    step: Stored
    device: Stored
    kept: float = 1.0

    def in_precision(self, precision: str) -> Forecast:
        """The same for another precision: with its rate of arithmetic, and its size of activations."""
        own = str(whole_step(self.step).conditions["precision"])
        if own == precision:
            return self
        kept = ACTIVATION_BYTES[precision] / ACTIVATION_BYTES[own]
        return replace(self, rates=read_rates(self.device, precision), kept=kept)

    def step_s(
        self, cfg: RunConfig, task: Task, *, images: int, processes: int = 1, threads: int | None = None
    ) -> float:
        """Seconds of one optimizer step of a process that has `images` of the group, as one micro-batch or several."""
        is_cuda = self.step.facts["hardware"]["device"] == "cuda"
        rates = self.rates.share(1, 1) if is_cuda else self.rates.share(processes, threads or self.threads)
        micro = min(cfg.train.given_micro_batch or images, images)
        work = sum(_work(cfg, task, micro, rates).values())
        parameters = _parameters(cfg, task)
        seconds = float(np.dot(work * (1.0, self.kept, 1.0), self.times)) * images / micro
        slower = self.rates.share(1, self.threads)[1] / rates[1]
        return self.whole * seconds + self.update_s_per_parameter * parameters * slower


def fit(step: Stored, device: Stored) -> Forecast:
    """The forecast that one step result and the rates of its device make."""
    whole = whole_step(step)
    cfg = RunConfig.model_validate({**step.facts["settings"]})
    threads = threads_of(step)
    rates = read_rates(device, whole.conditions["precision"])
    task = _TaskShape(whole.figures.get("out_channels", 1), whole.figures.get("full_size", True))
    ideal = _work(cfg, task, whole.conditions["batch_images"], rates.share(1, threads))
    rows = {row.what.removeprefix("level "): row for row in step.rows if row.what.startswith("level ")}
    seconds = {level: median(row.busy_s) / threads for level, row in rows.items() if level in ideal}
    times = _nonnegative(np.array([ideal[level] for level in seconds]), np.array(list(seconds.values())))
    update_s = median(next(row for row in step.rows if row.what == "update").busy_s) / threads
    parameters = _parameters(cfg, task)
    predicted = float(np.dot(sum(ideal.values()), times))
    scale = (median(whole.busy_s) / threads - update_s) / predicted
    return Forecast(tuple(times), update_s / parameters, scale, rates, threads, step, device)


@dataclass(frozen=True)
class _TaskShape:
    """What counting needs to know of a task."""

    out_channels: int
    full_size: bool


def _work(
    cfg: RunConfig, task: Task | _TaskShape, images: int, rates: tuple[float, float]
) -> dict[str, NDArray[np.float64]]:
    """Ideal seconds of a level's operations, activations and weights, for a micro-batch."""
    flops_per_s, bytes_per_s = rates
    levels = _levels(cfg, task)
    return {
        level: np.array(
            [
                cost.flops_train * images / flops_per_s,
                cost.kept_bytes * images / bytes_per_s,
                cost.weight_bytes / bytes_per_s,
            ]
        )
        for level, cost in levels.items()
    }


def _parameters(cfg: RunConfig, task: Task | _TaskShape) -> float:
    return sum(cost.weight_bytes for cost in _levels(cfg, task).values()) / 4


def _levels(cfg: RunConfig, task: Task | _TaskShape) -> dict[str, LevelCost]:
    if cfg.model.kind != "ddpm_unet":
        raise ConfigError(f"a forecast needs model.kind=ddpm_unet, found {cfg.model.kind}; measure it with bench train")
    return level_costs(cfg.model, cfg.data.image_size, task.out_channels, full_size=task.full_size)


def _nonnegative(ideal: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative least squares of relative errors: the best of all sets of columns that need no negative factor."""
    best, best_error = np.zeros(ideal.shape[1]), math.inf
    for count in range(1, ideal.shape[1] + 1):
        for columns in itertools.combinations(range(ideal.shape[1]), count):
            relative = ideal[:, columns] / seconds[:, None]
            found, *_ = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)
            error = float(np.square(relative @ found - 1).sum())
            if (found >= 0).all() and error < best_error:
                best_error, best = error, np.zeros(ideal.shape[1])
                best[list(columns)] = found
    return best
