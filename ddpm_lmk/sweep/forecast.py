"""How long a sweep takes here, before it starts: its stages and cells that are not done, by timed steps of each kind.

Runs that differ in name, shots, seed, packs and starting weights only take as long for an image, so one of them is
timed, with as many others beside it as the sweep will have workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import BUDGET_S, Forecast, Timing, Work, steps_done
from ddpm_lmk.launcher import Device, Placement
from ddpm_lmk.launcher.time_runs import AFTER_DAYS, DAYS_S, spec_of, time_apart, time_run
from ddpm_lmk.sweep import Cell, StageRun, Sweep, cell_folder, is_done, listed_shots
from ddpm_lmk.sweep.expand import recipe_key
from ddpm_lmk.sweep.progress import span_s, stage_key
from ddpm_lmk.system.console import about, duration

MOST_S = 30.0  # for the timed steps of a sweep, about, however many networks it has


@dataclass(frozen=True)
class Budget:
    """What is left of a sweep.

    Attributes:
        runs: what is known of every run that is not done; or why nothing is.
        start_s: until a worker has begun.
    """

    sweep: Sweep
    out: Path
    workers: int
    device: Device
    runs: Mapping[str, Forecast | str] = field(default_factory=dict)
    start_s: float = 0.0

    @property
    def is_known(self) -> bool:
        """Could every run be timed?"""
        return len(self.seconds()) == len(self.runs)

    def seconds(self) -> dict[str, float]:
        """Of every run that is not done and is known, by the name of the cell, or `stage NAME`."""
        return {name: found.total_s for name, found in self.runs.items() if not isinstance(found, str)}

    @property
    def total_s(self) -> float:
        """From the start of the stages to the end of the last cell."""
        seconds = self.seconds()
        stages = [seconds[stage_key(stage)] for stage in self.sweep.stages if stage_key(stage) in seconds]
        cells = [seconds[cell.name] for cell in self.sweep.cells if cell.name in seconds]
        parts = [(stages, self.workers if self.device == "cpu" else 1), (cells, self.workers)]
        return sum(span_s(jobs, at_once) + self.start_s for jobs, at_once in parts if jobs)

    def __str__(self) -> str:
        if not self.runs:
            return "nothing is left to do"
        why = next((found for found in self.runs.values() if isinstance(found, str)), "")
        if not self.seconds():
            return f"how long it takes is not known: {why}"
        cells = sum(cell.name in self.runs for cell in self.sweep.cells)
        stages = len(self.runs) - cells
        what = [f"{stages} stage{'s' if stages > 1 else ''}"] if stages else []
        what += [f"{cells} cell{'s' if cells > 1 else ''}"] if cells else []
        on = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        how_long = f"more than {duration(self.total_s)}" if why else about(self.total_s)
        more = f"; not all of them: {why}" if why else ""
        return f"{how_long} here: {' and '.join(what)} on {on} (from steps timed here{more})"


def budget(
    sweep: Sweep,
    out: Path,
    device: Device,
    *,
    workers: int,
    devices: int | None = None,
    specs: Mapping[str, DatasetSpec] | None = None,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    budget_s: float = BUDGET_S,
) -> Budget:
    """Time one run of each kind that is left; raises what opening the packs raises.

    Args:
        devices: GPUs that the workers share in turn; None: one each.
        budget_s: for the timed steps of one kind.
        specs, counts: facts, and images by split, of packs that are not made yet.
    """
    left: dict[str, RunConfig] = {}
    folders: dict[str, Path] = {}
    for stage in sweep.stages:
        if not is_done(stage.folder, stage):
            left[stage_key(stage)], folders[stage_key(stage)] = stage.cfg, stage.folder
    stages = list(left)
    for cell in sweep.cells:
        if not is_done(cell_folder(out, cell.name), cell):
            left[cell.name], folders[cell.name] = cell.cfg, cell_folder(out, cell.name)
    cells = [name for name in left if name not in stages]
    works: dict[str, Work] = {}
    kinds: dict[str, list[str]] = {}  # runs by what makes them alike; the first of each is timed
    facts: dict[str, DatasetSpec] = {}
    for name, cfg in left.items():
        path = cfg.data.path[0]
        works[name] = Work.of(cfg, done=steps_done(folders[name]), counts=(counts or {}).get(path))
        facts[name] = spec_of(cfg) if path not in (specs or {}) else (specs or {})[path]
        kinds.setdefault(f"{recipe_key(_without_length(cfg))} {facts[name].num_landmarks}", []).append(name)
    found: dict[str, Forecast | str] = {}
    start_s = 0.0
    for names in (stages, cells):
        alike = [[name for name in kind if name in names] for kind in kinds.values()]
        firsts = [kind[0] for kind in alike if kind]
        if any(isinstance(each, Forecast) and each.total_s > DAYS_S for each in found.values()):
            found |= dict.fromkeys(names, AFTER_DAYS)
        elif firsts:
            each_s = min(budget_s, MOST_S / len(kinds))
            if names is stages and device == "cuda":  # one after the other, each on all GPUs
                place = Placement(device, devices or workers)
                how: dict[str, Any] = {"budget_s": each_s, "is_apart": True}
                timings = [time_run(left[name], facts[name], place, **how) for name in firsts]
            else:
                timings = time_apart(
                    [left[name] for name in firsts],
                    processes=min(workers, len(names)),
                    device=device,
                    devices=devices,
                    specs=[facts[name] for name in firsts],
                    budget_s=each_s,
                    steps=[works[name].steps for name in firsts],
                )
            for kind, timing in zip([kind for kind in alike if kind], timings, strict=True):
                start_s = max(start_s, timing.start_s) if isinstance(timing, Timing) else start_s
                found |= {name: timing.forecast(works[name]) if isinstance(timing, Timing) else timing for name in kind}
    return Budget(sweep, out, workers, device, found, start_s)


def budget_table(found: Budget) -> Table:
    """A row for each stage, and for the cells of a start and recipe, and their sum shared out over the workers."""
    table = Table(title="what is left", caption=str(found))
    for heading in ("what", "runs", "time of a run", "worker time"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    starts = [cells[0].start for cells in found.sweep.recipes()]
    rows: list[tuple[str, Sequence[Cell | StageRun]]] = [(stage_key(stage), [stage]) for stage in found.sweep.stages]
    for cells in found.sweep.recipes():
        start = cells[0].start
        rows.append((start if starts.count(start) == 1 else f"{start}, {listed_shots(cells)} labels", cells))
    for what, runs in rows:
        names = [stage_key(run) if isinstance(run, StageRun) else run.name for run in runs]
        seconds = [found.runs[name] for name in names if name in found.runs]
        totals = [each.total_s for each in seconds if isinstance(each, Forecast)]
        if not seconds:
            continue
        least, most = (duration(pick(totals)) if totals else "not known" for pick in (min, max))
        of_a_run = least if least == most else f"{least} to {most}"
        table.add_row(what, str(len(seconds)), of_a_run, duration(sum(totals)) if totals else "not known")
    return table


def _without_length(cfg: RunConfig) -> RunConfig:
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"length": 1})})
