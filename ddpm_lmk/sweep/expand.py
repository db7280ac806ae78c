"""A sweep: methods × shots × seeds, as a list of cells and of the pre-training runs (stages) they start from.

Every cell is an ordinary run directory OUT/cells/START-kSHOTS-sSEED, every stage one at OUT/stages/NAME. How a sweep is
written is in `sweep.file`, running it in `sweep.run`. Nothing here imports torch, so that `--dry-run` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash, load_run
from ddpm_lmk.data.loading.order import GroupPlan
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.rundir.lock import is_finished
from ddpm_lmk.sweep.file import Grid, RowText, SweepFile, is_stage, read_sweep, stage_of
from ddpm_lmk.system.shipped import find

State = Literal["done", "started", "pending"]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    start: str
    shots: int | None
    seed: int
    cfg: RunConfig

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps; None where the length is in epochs of a set that is not there to be counted."""
        return count_steps(self.cfg, self.shots)

    @cached_property
    def recipe(self) -> str:
        """Equal for cells that differ in shots, seed and starting weights only."""
        return recipe_key(self.cfg)

    @property
    def images(self) -> int:
        """Image passes of training, the measure of a cell's length (upper bound when a group is cut short)."""
        group = self.cfg.train.global_batch_size
        if self.cfg.train.epoch_boundary == "epoch" and self.shots is not None:  # else groups repeat images
            group = min(group, self.shots)
        return (self.steps or 0) * group


@dataclass(frozen=True)
class StageRun:
    """A pre-training run of a sweep, and its directory."""

    name: str
    folder: Path
    cfg: RunConfig

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps, as those of a cell."""
        return count_steps(self.cfg, None)


@dataclass(frozen=True)
class Sweep:
    """A name, its cells, longest first, and the stages they start from."""

    name: str
    cells: tuple[Cell, ...]
    stages: tuple[StageRun, ...] = ()
    rows: Mapping[str, RowText] = field(default_factory=dict)

    def starts(self) -> dict[str, str | None]:
        """Starting weights by label."""
        return {cell.start: cell.cfg.init.weights for cell in self.cells}

    def recipes(self) -> list[list[Cell]]:
        """Cells by start and recipe, by number of labels and seed, in the order of the file's `rows`."""
        order = list(dict.fromkeys([*self.rows, *(cell.start for cell in self.cells)]))
        cells = sorted(self.cells, key=lambda cell: (order.index(cell.start), cell.shots or 10**9, cell.seed))
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            found.setdefault((cell.start, cell.recipe), []).append(cell)
        return list(found.values())

    def makes(self, weights: str) -> bool:
        """Do these weights come from a stage?"""
        return any(Path(weights).is_relative_to(stage.folder) for stage in self.stages)


def load_sweep(
    path: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, scale: str | None = None
) -> Sweep:
    """Read a sweep file and expand it.

    Args:
        overrides: `key=value` words. `name`, `run`, `shots`, `seeds`, `packs.NAME` and `start.LABEL` change the sweep,
            `stages.NAME.KEY` its pre-training, `stage.NAME=PATH` gives weights in place of it, `only=[...]` and
            `without=[...]` choose starts; anything else is a key of the cells' run files and wins over every `set`.
        out: the sweep's folder, where stages are kept; None: runs/NAME.
        scale: one of the file's `scales`.

    Raises:
        ConfigError: a mistake in the sweep file, in an override or in the run files they make.
    """
    sweep, given, run_words = read_sweep(path, list(overrides), scale)
    files = _RunFiles(Path(path), sweep)
    out = out or Path("runs") / sweep.name
    used = [start for grid in sweep.grids for start in grid.start.values() if start is not None and is_stage(start)]
    stages = {name: _stage(files, name, out) for name in dict.fromkeys(stage_of(start)[0] for start in used)}
    places = {start: _place(stages, start, given) for start in used}
    cells: dict[str, Cell] = {}
    for number, grid in enumerate(sweep.grids):
        for cell in _cells(files, number, grid, places, run_words):
            if cell.name in cells:
                raise ConfigError(
                    f"{path}: two grids make the cell {cell.name}; give them other shots, or their starts other labels"
                )
            cells[cell.name] = cell
    needed = tuple(stage for name, stage in stages.items() if name not in given)
    return Sweep(sweep.name, tuple(sorted(cells.values(), key=lambda cell: -cell.images)), needed, sweep.rows)


@dataclass(frozen=True)
class _RunFiles:
    """The run files and packs a sweep names."""

    path: Path
    sweep: SweepFile

    def find(self, run: str | None) -> Path:
        """The run file of a grid or stage: a name in `runs`, a path relative to the sweep file, or a shipped file."""
        name = run if run is not None else self.sweep.run
        if name is None:
            raise ConfigError(f"{self.path}: run is missing; give a fine-tuning run file, for all grids or for each")
        file = find(self.sweep.runs.get(name, name), self.path.parent)
        if not file.is_file():
            raise ConfigError(f"{self.path}: run={name}: there is no file {file}; give a run file or a name in `runs`")
        return file

    def pack(self, *names: str) -> dict[str, Any]:
        """What to set so that a run reads these packs; without names it reads its own."""
        paths = [self.sweep.packs[name] for name in names]
        return {"data.path": paths, "data.weights": None} if paths else {}


def _stage(files: _RunFiles, name: str, out: Path) -> StageRun:
    stage = files.sweep.stages[name]
    settings = files.pack(*(stage.packs or ())) | stage.set | {"name": name}
    run = files.find(stage.run)
    cfg = load_run(run, _words(settings))
    if cfg.task.kind == "landmarks":
        raise ConfigError(f"{run}: stage {name} needs a pre-training run, found task.kind: landmarks")
    return StageRun(name, Path(stage.out) if stage.out else out / "stages" / name, cfg)


def _place(stages: Mapping[str, StageRun], start: str, given: Mapping[str, str]) -> str:
    """Where the weights of `stage:NAME[@STEP]` are, or will be."""
    name, step = stage_of(start)
    folder = Path(given.get(name, stages[name].folder))
    return str(folder if step is None else folder / "snapshots" / f"step-{step:08}")


def _draw(grid: Grid) -> dict[str, Any]:
    return {} if grid.draw is None else {"data.draw": grid.draw}


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _cells(
    files: _RunFiles, number: int, grid: Grid, places: Mapping[str, str], words: Sequence[str]
) -> Iterator[Cell]:
    """The cells of a grid; the command line's `words` come last."""
    sweep = files.sweep
    shots_, seeds = grid.shots or sweep.shots, grid.seeds or sweep.seeds
    if shots_ is None or seeds is None:
        missing = "seeds" if shots_ else "shots"
        raise ConfigError(f"{files.path}: grids.{number} has no {missing}, and the sweep has none")
    settings = sweep.set | files.pack(*grid.packs) | _draw(grid) | grid.set
    run = files.find(grid.run)
    for start, weights in grid.start.items():
        for shots in shots_:
            own = {"data.shots": shots, "seed": seeds[0], "init.weights": places.get(weights or "", weights)}
            cfg = _tuning(run, settings | own, words)
            for seed in seeds:
                name = f"{start}-k{'all' if shots is None else shots}-s{seed}"
                yield Cell(name, start, shots, seed, cfg.model_copy(update={"seed": seed, "name": name}))


def _tuning(run: Path, settings: Mapping[str, Any], words: Sequence[str]) -> RunConfig:
    """The fine-tuning run of a cell; those of other seeds differ in seed and name only."""
    cfg = load_run(run, [*_words(settings), *words])
    if cfg.task.kind != "landmarks":
        raise ConfigError(f"{run}: a sweep needs a fine-tuning run (task.kind: landmarks), found {cfg.task.kind}")
    if (cfg.data.shots, cfg.seed) != (settings["data.shots"], settings["seed"]):
        raise ConfigError("data.shots and seed are the sweep's own; override shots=[...] and seeds=[...] instead")
    return cfg


def count_steps(cfg: RunConfig, shots: int | None) -> int | None:
    """Optimizer steps of a run; None where the length is in epochs of a set that is not there to be counted."""
    num_images = shots or _count_images(cfg)
    if num_images is None and cfg.train.duration.unit == "epochs":
        return None
    train = cfg.train
    plan = GroupPlan.of(cfg, num_images or 1)
    return train.duration.steps(train.global_batch_size, num_images or 1, plan.steps_per_epoch)


def _count_images(cfg: RunConfig) -> int | None:
    """Images of the training splits, where the data is there."""
    try:
        return sum(len(dataset.rows(cfg.data.splits)) for dataset in open_datasets(cfg))
    except DataError:
        return None


def recipe_key(cfg: RunConfig) -> str:
    """Equal for runs that differ in name, shots, seed, packs and starting weights only."""
    data = cfg.data.model_copy(update={"shots": None, "path": ()})
    init = cfg.init.model_copy(update={"weights": None})
    return config_hash(cfg.model_copy(update={"name": "same", "seed": 0, "data": data, "init": init}))


def is_done(folder: Path, cell: Cell | StageRun) -> bool:
    """Has this very run finished in `folder`, its results as they were written? No other configuration counts."""
    return is_finished(folder, cell.cfg)


def state_of(out: Path, cell: Cell | StageRun) -> State:
    """How far a cell of the sweep folder `out`, or a stage, is."""
    folder = cell.folder if isinstance(cell, StageRun) else cell_folder(out, cell.name)
    if is_done(folder, cell):
        return "done"
    return "started" if folder.exists() else "pending"


def cell_folder(out: Path, name: str) -> Path:
    """The run directory of a cell."""
    return out / "cells" / name
