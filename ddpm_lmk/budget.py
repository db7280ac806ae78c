"""What a sweep will cost, before it starts: operations, memory of a worker and, where rates are known, hours.

A row is a stage, or the cells of a start and recipe that are not done. Operations are those of training and of
everything that is scored on the way and at the end. Hours come from cells of the same start that are done in the
folder, else from results of `ddpm-lmk bench` on this machine (see `forecast`), never from a guess.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.data.order import GroupPlan
from ddpm_lmk.data.spec import mixture
from ddpm_lmk.durable import read_json
from ddpm_lmk.forecast import estimate_step
from ddpm_lmk.launcher import Device
from ddpm_lmk.models import model_cost
from ddpm_lmk.plan import memory_gib
from ddpm_lmk.sweep import Cell, Sweep, cell_folder, is_done, listed_shots
from ddpm_lmk.tasks import Task, build_task

ONE_PASS = ("denoise", "landmarks")  # tasks that pass the network once per image; others are not counted


@dataclass(frozen=True)
class Need:
    """What one row of the table still needs; None where it is not known."""

    what: str
    runs: int
    images: int
    tflop: float | None
    memory_gib: float
    hours: float | None
    source: str


def needs(sweep: Sweep, out: Path, device: Device, *, workers: int) -> list[Need]:
    """Rows of stages and starts that are not done; raises what opening their packs raises."""
    rows = [
        _need(
            f"stage {stage.name}", [stage.cfg], [(stage.steps or 0) * stage.cfg.train.group_size], [], device, workers
        )
        for stage in sweep.stages
        if not is_done(stage.folder, stage)
    ]
    starts = [cells[0].start for cells in sweep.recipes()]
    for cells in sweep.recipes():
        start = cells[0].start
        name = start if starts.count(start) == 1 else f"{start}, {listed_shots(cells)} labels"
        left = [cell for cell in cells if not is_done(cell_folder(out, cell.name), cell)]
        if left:
            rates = _measured(out, [cell for cell in cells if cell not in left])
            images = [(cell.steps or 0) * cell.cfg.train.group_size for cell in left]
            rows.append(_need(name, [cell.cfg for cell in left], images, rates, device, workers))
    return rows


def budget_table(sweep: Sweep, out: Path, device: Device, *, workers: int) -> Table:
    """The rows as a table, with their sum shared out over the workers."""
    found = needs(sweep, out, device, workers=workers)
    known = [need.hours for need in found if need.hours is not None]
    unknown = len(found) - len(known)
    total = (
        f"{sum(known) / workers:,.2f} h on {workers} worker{'' if workers == 1 else 's'}"
        if known
        else "hours not known"
    )
    missing = f"; {unknown} rows not known, run `ddpm-lmk bench` or some of their cells" if unknown else ""
    table = Table(title="what it needs", caption=f"together {total} of training{missing}")
    for heading in ("what", "runs", "images", "TFLOP", "GiB a worker", "worker-hours", "hours from"):
        table.add_column(heading, justify="left" if heading in ("what", "hours from") else "right")
    for need in found:
        tflop = "–" if need.tflop is None else f"{need.tflop:,.4g}"
        hours = "–" if need.hours is None else f"{need.hours:,.2f}"
        facts = (need.what, str(need.runs), f"{need.images:,}", tflop, f"{need.memory_gib:,.2f}", hours, need.source)
        table.add_row(*facts)
    return table


def _need(
    what: str, runs: Sequence[RunConfig], images: Sequence[int], rates: list[float], device: Device, workers: int
) -> Need:
    """Runs that differ in shots and seed only."""
    cfg = runs[0]
    manifests = [Manifest.open(path) for path in cfg.data.path]
    specs = [manifest.spec for manifest in manifests]
    task = build_task(cfg, specs[0] if cfg.task.stage == "pretrain" else mixture(specs))
    scored = sum(_scored(run, manifests, count) for run, count in zip(runs, images, strict=True))
    micro_batch = cfg.train.given_micro_batch or cfg.train.group_size
    memory = memory_gib(cfg, task, device=device, micro_batch=micro_batch)
    seconds, source = (statistics.median(rates), "its own cells") if rates else _forecast(cfg, task, device, workers)
    hours = None if seconds is None else seconds * sum(images) / 3600
    return Need(what, len(runs), sum(images), _tflop(cfg, task, sum(images), scored), memory, hours, source)


def _scored(cfg: RunConfig, manifests: Sequence[Manifest], images: int) -> int:
    """Forward passes of validation and of the score at the end."""
    if cfg.task.stage == "pretrain":
        return 0
    count = {split: sum(len(manifest.rows([split])) for manifest in manifests) for split in _splits(cfg)}
    steps = images // cfg.train.group_size
    times = 1
    if cfg.train.evaluate_every is not None:
        learnt = cfg.data.shots or images
        plan = GroupPlan(learnt, cfg.train.group_size, cfg.train.given_micro_batch, cfg.train.windows, drop_last=False)
        every = cfg.train.evaluate_every.steps(cfg.train.group_size, learnt, plan.steps_per_epoch)
        times = max(1, steps // max(1, every))
    validation = 0 if cfg.data.validation_split is None else count[cfg.data.validation_split] * times
    views = cfg.task.views if cfg.task.kind == "landmarks" else 1
    return validation + (0 if cfg.evaluate.split is None else count[cfg.evaluate.split] * views)


def _splits(cfg: RunConfig) -> list[str]:
    return [split for split in (cfg.data.validation_split, cfg.evaluate.split) if split is not None]


def _tflop(cfg: RunConfig, task: Task, images: int, scored: int) -> float | None:
    if cfg.task.kind not in ONE_PASS:
        return None
    cost = model_cost(cfg.model, cfg.data.image_size, task.out_channels, full_size=task.full_size, domains=task.domains)
    return (cost.flops_train * images + cost.flops_forward * scored) / 1e12


def _measured(out: Path, done: Sequence[Cell]) -> list[float]:
    """Seconds per training image of cells that are done."""
    found = [(read_json(cell_folder(out, cell.name) / "results.json") or {}).get("train") or {} for cell in done]
    return [train["wall_s"] / train["images"] for train in found if train.get("images") and train.get("wall_s")]


def _forecast(cfg: RunConfig, task: Task, device: Device, workers: int) -> tuple[float | None, str]:
    """Seconds per training image of one of the workers, and where that is from."""
    found = estimate_step(cfg, task, device, images=cfg.train.group_size, processes=workers)
    return (None, "not measured") if found is None else (found.step_s / cfg.train.group_size, found.how)
