"""How long a step of a run will take on this machine, from results of `ddpm-lmk bench`; never a guess.

The best there is, in this order: this network was measured; a ddpm_unet by its levels, from another one (`levels`); by
operations, from another network of its kind and task (`whole`); the same from results in another precision. An estimate
says which of these it is. Times are of a machine that does nothing else; waiting for data is left out (`bench train`
measures it), and so is the reduction between processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.precision import choose_precision
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.forecast.levels import fit
from ddpm_lmk.forecast.rates import is_here, read_rates, whole_step
from ddpm_lmk.forecast.whole import WholeStep, is_same_kind, is_same_network
from ddpm_lmk.measure import Stored, read_results
from ddpm_lmk.shipped import shipped
from ddpm_lmk.system.cores import threads_per_process
from ddpm_lmk.tasks import Task

__all__ = ["Estimate", "Results", "estimate_step", "is_here", "worst_error_pct"]


@dataclass(frozen=True)
class Estimate:
    """Seconds of one optimizer step of a process.

    Attributes:
        how: in few words, how it was found.
        source: the result files.
        trust: how good such estimates are, as far as that was looked at.
    """

    step_s: float
    how: str
    source: str
    trust: str


@dataclass(frozen=True)
class Results:
    """Results of this machine, the newest first; those of the user before those that came with the package."""

    steps: Sequence[Stored]
    devices: Sequence[Stored]

    @classmethod
    def here(cls, device: str, folders: Iterable[Path] | None = None) -> Results:
        """Those in `bench-results` and those of the package."""
        steps: list[Stored] = []
        devices: list[Stored] = []
        for folder in folders or (Path("bench-results"), shipped("benchmarks") / "results"):
            for kind, into in (("step", steps), ("device", devices)):
                into += [found for found in reversed(read_results(folder, kind)) if is_here(found, device)]
        return cls([step for step in steps if _is_readable(step)], devices)


def estimate_step(
    cfg: RunConfig,
    task: Task,
    device: str,
    *,
    images: int,
    processes: int = 1,
    threads: int | None = None,
    folders: Iterable[Path] | None = None,
) -> Estimate | None:
    """Of a process that has `images` of the group, beside `processes` - 1 others; None where nothing fits."""
    found, precision = Results.here(device, folders), choose_precision(cfg, device).name
    rates = next((each for each in found.devices if read_rates(each, precision).flops), None)
    if rates is None:
        return None
    threads = threads_per_process(processes) if threads is None else threads
    for how, step, own in _ways(cfg, task, precision, found.steps):
        if not read_rates(rates, own).flops:
            continue
        source = f"{step.path.name} and {rates.path.name}"
        if how.startswith("levels"):
            forecast = fit(step, rates).in_precision(precision)
            seconds = forecast.step_s(cfg, task, images=images, processes=processes, threads=threads)
        else:
            whole = WholeStep(step, rates)
            seconds = whole.step_s(cfg, task, precision, images=images, processes=processes, threads=threads)
        return Estimate(seconds, how, source, _trust(how, device, precision))
    return None


def _ways(cfg: RunConfig, task: Task, precision: str, steps: Sequence[Stored]) -> Iterator[tuple[str, Stored, str]]:
    """(how, step result, its precision), the best first."""
    alike = [step for step in steps if whole_step(step).conditions["precision"] == precision]
    others = [step for step in steps if step not in alike]
    yield from (("this network, measured", step, precision) for step in alike if is_same_network(step, cfg))
    flops = task.cost(cfg.model, cfg.data.image_size).flops_train
    for group in (alike, others):
        for step in sorted(group, key=lambda step: _distance(step, flops)):
            own, name = str(whole_step(step).conditions["precision"]), step.facts["settings"]["name"]
            scaled = "" if own == precision else f", scaled from {own}"
            if cfg.model.kind == "ddpm_unet" == step.facts["settings"]["model"]["kind"]:
                yield f"levels of {name}{scaled}", step, own
            elif is_same_kind(step, cfg):
                yield f"operations of {name}{scaled}", step, own


def _distance(step: Stored, flops: int) -> float:
    """How different the networks are in operations of an image, either way."""
    whole = whole_step(step)
    return abs(math.log(flops * whole.conditions["batch_images"] / (1e9 * whole.figures["executed_gflop"])))


def _is_readable(step: Stored) -> bool:
    """Are its settings still those of a run file, and has it what is needed here?"""
    try:
        RunConfig.model_validate(step.facts["settings"])
    except (ValidationError, ConfigError):
        return False
    return any(row.what == "train step" and "executed_gflop" in row.figures for row in step.rows)


def _trust(how: str, device: str, precision: str) -> str:
    """How good such estimates were where they were checked."""
    if how.startswith("this network"):
        return "the step was measured, the run was not"
    checks = [found for found in read_results(shipped("benchmarks") / "results", "forecast") if is_here(found, device)]
    worst = worst_error_pct(checks, precision)
    if not how.startswith("levels") or "scaled" in how or worst is None:
        return "such estimates were not checked"
    return f"{worst[1]} such estimates were off by at most {worst[0]:.0f} %"


def worst_error_pct(checks: Sequence[Stored], precision: str | None = None) -> tuple[float, int] | None:
    """The largest error of forecasts that were checked against measurements, and how many were."""
    rows = [row for found in checks for row in found.rows if "error_pct" in row.figures]
    rows = [row for row in rows if precision in (None, row.conditions["precision"])]
    return (max(abs(row.figures["error_pct"]) for row in rows), len(rows)) if rows else None
