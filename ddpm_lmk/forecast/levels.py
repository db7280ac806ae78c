"""How long a step will take that nobody has run: the network's counts, the device's measured rates, one step result.

A step is three kinds of work, level by level (`models.cost.level_costs`): operations, at the device's measured rate of
arithmetic; activations, moved a number of times at its measured bandwidth; and weights, likewise. How many times its
ideal each of them takes is fitted, non-negative, to the levels of one result of `bench step`, and their sum is scaled
to its whole step. Processes on one CPU share its rates, as `bench device` measured them for several threads.

Times are of a machine that does nothing else; waiting for data is left out (`bench train` measures it).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.machine import cpu_name
from ddpm_lmk.measure.result import Row, Stored, read_results
from ddpm_lmk.models.cost import LevelCost, level_costs
from ddpm_lmk.shipped import shipped
from ddpm_lmk.tasks import Task


@dataclass(frozen=True)
class Rates:
    """What a device does per second when `concurrency` threads of it work, by `bench device`."""

    flops: Mapping[int, float]
    bytes: Mapping[int, float]

    def share(self, processes: int, threads: int) -> tuple[float, float]:
        """Arithmetic and bandwidth of one of `processes` with `threads` each."""
        return tuple(_at(table, processes * threads) / processes for table in (self.flops, self.bytes))  # type: ignore[return-value]


@dataclass(frozen=True)
class Forecast:
    """Predicts steps on one kind of machine, in one precision.

    Attributes:
        times: how many times the ideal operations, activations and weights take.
        update_s_per_parameter: of the optimizer and the average.
        step, device: the results it comes from.
    """

    times: tuple[float, float, float]
    update_s_per_parameter: float
    whole: float
    rates: Rates
    threads: int
    step: Stored
    device: Stored

    def step_s(
        self, cfg: RunConfig, task: Task, *, images: int, processes: int = 1, threads: int | None = None
    ) -> float:
        """Seconds of one optimizer step of a process that has `images` of the group, as one micro-batch or several."""
        is_cuda = self.step.facts["hardware"]["device"] == "cuda"
        rates = self.rates.share(1, 1) if is_cuda else self.rates.share(processes, threads or self.threads)
        micro = min(cfg.train.given_micro_batch or images, images)
        work = sum(_work(cfg, task, micro, rates).values())
        parameters = _parameters(cfg, task)
        seconds = float(np.dot(work, self.times)) * images / micro
        slower = self.rates.share(1, self.threads)[1] / rates[1]
        return self.whole * seconds + self.update_s_per_parameter * parameters * slower

    def __str__(self) -> str:
        return f"{self.step.path.name} and {self.device.path.name}"


def this_machine(device: str) -> str | None:
    """The device as result files name it."""
    if device != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def find_forecast(device: str, precision: str, folders: Iterable[Path] | None = None) -> Forecast | None:
    """From the newest results of this machine: those in `bench-results`, else those that came with the package."""
    for folder in folders or (Path("bench-results"), shipped("benchmarks") / "results"):
        steps = [found for found in read_results(folder, "step") if is_here(found, device) and _is_counted(found)]
        devices = [found for found in read_results(folder, "device") if is_here(found, device)]
        fitting = [found for found in steps if _whole_step(found).conditions["precision"] == precision]
        if fitting and devices:
            return fit(fitting[-1], devices[-1])
    return None


def fit(step: Stored, device: Stored) -> Forecast:
    """The forecast that one step result and the rates of its device make."""
    whole = _whole_step(step)
    cfg = RunConfig.model_validate({**step.facts["settings"]})
    threads = 1 if step.facts["hardware"]["device"] == "cuda" else whole.conditions["threads"]
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


def read_rates(device: Stored, precision: str) -> Rates:
    """The fastest matrix product or convolution, and the triad, by threads."""
    flops: dict[int, float] = {}
    moved: dict[int, float] = {}
    for row in device.rows:
        threads = row.conditions.get("threads", 1)
        if row.what == "matrix product" and row.conditions["precision"] == precision:
            flops[threads] = max(flops.get(threads, 0.0), 1e9 * median(row.samples["gflop_per_s"]))
        if row.what == "triad":
            moved[threads] = 1e9 * median(row.samples["gbyte_per_s"])
    return Rates(flops, moved)


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


def _at(table: Mapping[int, float], threads: int) -> float:
    """The rate at a number of threads: measured, or between the nearest that were."""
    counts = sorted(table)
    return float(np.interp(threads, counts, [table[count] for count in counts]))


def _is_counted(found: Stored) -> bool:
    """Is it of the kind of network whose levels `models.cost` counts?"""
    return bool(found.facts["settings"]["model"]["kind"] == "ddpm_unet")


def is_here(found: Stored, device: str) -> bool:
    """Was this measured on the kind of device that is here?"""
    hardware: Mapping[str, Any] = found.facts["hardware"]
    return hardware["device"] == device and (hardware["device_name"] or hardware["cpu"]) == this_machine(device)


def _whole_step(found: Stored) -> Row:
    return next(row for row in found.rows if row.what == "train step")


def threads_of_a_process(processes: int) -> int:
    """Threads a process of a run will use on this CPU: those asked for, else its share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() else max(1, (os.cpu_count() or 1) // processes)


def worst_error_pct(checks: Sequence[Stored]) -> tuple[float, int] | None:
    """The largest error of forecasts that were checked against measurements, and how many were."""
    rows = [row for found in checks for row in found.rows if "error_pct" in row.figures]
    return (max(abs(row.figures["error_pct"]) for row in rows), len(rows)) if rows else None
