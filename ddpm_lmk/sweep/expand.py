"""A sweep: starts x shots x seeds, as a list of cells and of the pre-training runs (stages) they start from.

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
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.rundir.lock import is_finished
from ddpm_lmk.sweep.file import Grid, ReadSweep, RowText, is_stage, read_sweep, stage_of
from ddpm_lmk.system.shipped import find

State = Literal["done", "started", "pending"]


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A run of a sweep, and its directory."""

    name: str
    folder: Path
    cfg: RunConfig
    shots: int | None = None

    @property
    def key(self) -> str:
        """Name among all runs of the sweep; a label has no space, so no cell has the key of a stage."""
        return self.name

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps; None where the length is in epochs of a dataset that is not there to be counted."""
        num_images = self.shots or self._count_images()
        train = self.cfg.train
        if num_images is None and train.duration.unit == "epochs":
            return None
        # A length in steps or images does not depend on the dataset, so any number of images gives it.
        plan = BatchPlan.of(self.cfg, num_images or 1)
        return train.duration.steps(train.global_batch_size, num_images or 1, plan.steps_per_epoch)

    @property
    def images(self) -> int:
        """Image passes of training, teachers included, the measure of a run's length.

        An upper bound when a global batch is cut short.
        """
        batch = self.cfg.train.global_batch_size
        if self.cfg.train.epoch_boundary == "epoch" and self.shots is not None:  # else batches repeat images
            batch = min(batch, self.shots)
        return (self.steps or 0) * batch * (1 + len(self.cfg.teachers))

    def is_done(self) -> bool:
        """Has this very run finished in its folder, its results as they were written? No other settings count."""
        return is_finished(self.folder, self.cfg)

    def state(self) -> State:
        """How far it is."""
        return "done" if self.is_done() else "started" if self.folder.exists() else "pending"

    def _count_images(self) -> int | None:
        """Images of the training splits, where the data is there."""
        try:
            return sum(len(dataset.rows(self.cfg.data.splits)) for dataset in open_datasets(self.cfg))
        except DataError:  # `--dry-run` shows its table first, then the check refuses what is missing
            return None


@dataclass(frozen=True, kw_only=True)
class Cell(SweepRun):
    """A fine-tuning run of the table."""

    start: str
    seed: int

    @cached_property
    def recipe(self) -> str:
        """Equal for cells that differ in shots, seed and starting weights only."""
        return recipe_key(self.cfg)


@dataclass(frozen=True, kw_only=True)
class StageRun(SweepRun):
    """A pre-training run of a sweep."""

    @property
    def key(self) -> str:
        """See `SweepRun.key`."""
        return f"stage {self.name}"


@dataclass(frozen=True)
class Sweep:
    """A name, its folder, its cells, longest first, and the stages they start from."""

    name: str
    out: Path
    cells: tuple[Cell, ...]
    stages: tuple[StageRun, ...] = ()
    rows: Mapping[str, RowText] = field(default_factory=dict)

    def recipes(self) -> list[list[Cell]]:
        """Cells by start and recipe, by number of labels and seed, in the order of the file's `rows`."""
        order = list(dict.fromkeys([*self.rows, *(cell.start for cell in self.cells)]))
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: (order.index(cell.start), *by_labels(cell))):
            groups.setdefault((cell.start, cell.recipe), []).append(cell)
        return list(groups.values())

    def stage_of(self, cell: Cell) -> StageRun | None:
        """The stage that the cell's starting weights come from."""
        weights = cell.cfg.init.weights
        if weights is None:
            return None
        return next((stage for stage in self.stages if Path(weights).is_relative_to(stage.folder)), None)

    def stages_of(self, cells: Sequence[Cell]) -> list[StageRun]:
        """The stages that these cells start from."""
        used = [self.stage_of(cell) for cell in cells]
        return [stage for stage in self.stages if stage in used]


def by_labels(cell: Cell) -> tuple[int, int]:
    """Sorts cells by number of labels (all of them last) and seed."""
    return cell.shots or 10**9, cell.seed


def load_sweep(
    path: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, scale: str | None = None
) -> Sweep:
    """Read a sweep file and expand it.

    Args:
        overrides: `key=value` words. `name`, `run`, `shots`, `seeds`, `packs.NAME` and `start.LABEL` change the sweep,
            `stages.NAME.KEY` its pre-training, `stage.NAME=PATH` gives weights in place of it, `only=[...]` and
            `without=[...]` choose starts; anything else is a key of the cells' run files and wins over every `set`.
        out: the sweep's folder; None: runs/NAME.
        scale: one of the file's `scales`.

    Raises:
        ConfigError: a mistake in the sweep file, in an override or in the run files they make.
    """
    read = read_sweep(path, list(overrides), scale)
    return _Expansion(Path(path), read, out or Path("runs") / read.file.name).sweep()


class _Expansion:
    """Makes cells and stages of a sweep file."""

    def __init__(self, path: Path, read: ReadSweep, out: Path) -> None:
        self._path, self._read, self._file, self._out = path, read, read.file, out

    def sweep(self) -> Sweep:
        """All of it."""
        starts = [start for grid in self._file.grids for start in grid.start.values() if start and is_stage(start)]
        stages = {name: self._stage(name) for name in dict.fromkeys(stage_of(start)[0] for start in starts)}
        weights = {start: self._weights_of(start, stages) for start in starts}
        cells: dict[str, Cell] = {}
        for number, grid in enumerate(self._file.grids):
            for cell in self._cells(number, grid, weights):
                if cell.name in cells:
                    raise ConfigError(
                        f"{self._path}: two grids make the cell {cell.name}; give them other shots, or their starts "
                        "other labels"
                    )
                cells[cell.name] = cell
        # Weights given in place of a stage leave nothing to run for it.
        to_run = tuple(stage for name, stage in stages.items() if name not in self._read.given_stages)
        # Longest first: the last cells to end are then short ones, and few workers wait for them.
        longest_first = tuple(sorted(cells.values(), key=lambda cell: -cell.images))
        return Sweep(self._file.name, self._out, longest_first, to_run, self._file.rows)

    def _stage(self, name: str) -> StageRun:
        stage = self._file.stages[name]
        run = self._find(stage.run)
        cfg = load_run(run, _words(self._data(*(stage.packs or ())) | stage.set | {"name": name}))
        if cfg.task.kind == "landmarks":
            raise ConfigError(f"{run}: stage {name} needs a pre-training run, found task.kind: landmarks")
        return StageRun(name=name, folder=Path(stage.out) if stage.out else self._out / "stages" / name, cfg=cfg)

    def _weights_of(self, start: str, stages: Mapping[str, StageRun]) -> str:
        """Where the weights of `stage:NAME[@STEP]` are, or will be."""
        name, step = stage_of(start)
        folder = Path(self._read.given_stages.get(name, stages[name].folder))
        return str(folder if step is None else folder / "snapshots" / f"step-{step:08}")

    def _cells(self, number: int, grid: Grid, weights_of: Mapping[str, str]) -> Iterator[Cell]:
        all_shots, seeds = grid.shots or self._file.shots, grid.seeds or self._file.seeds
        if all_shots is None or seeds is None:
            missing = "seeds" if all_shots else "shots"
            raise ConfigError(f"{self._path}: grids.{number} has no {missing}, and the sweep has none")
        settings = self._file.set | self._data(*grid.packs)
        settings |= ({} if grid.draw is None else {"data.draw": grid.draw}) | grid.set
        run = self._find(grid.run)
        for start, weights in grid.start.items():
            for shots in all_shots:
                own = {"data.shots": shots, "seed": seeds[0], "init.weights": weights_of.get(weights or "", weights)}
                cfg = self._fine_tuning(run, settings | own)
                for seed in seeds:  # cells of other seeds differ in seed and name only: the run file is read once
                    name = f"{start}-k{'all' if shots is None else shots}-s{seed}"
                    of_seed = cfg.model_copy(update={"seed": seed, "name": name})
                    folder = cell_folder(self._out, name)
                    yield Cell(name=name, folder=folder, cfg=of_seed, shots=shots, start=start, seed=seed)

    def _fine_tuning(self, run: Path, settings: Mapping[str, Any]) -> RunConfig:
        cfg = load_run(run, [*_words(settings), *self._read.run_words])
        if cfg.task.kind != "landmarks":
            raise ConfigError(f"{run}: a sweep needs a fine-tuning run (task.kind: landmarks), found {cfg.task.kind}")
        # The words of the command line come last: these two would make all cells of a row alike.
        if (cfg.data.shots, cfg.seed) != (settings["data.shots"], settings["seed"]):
            raise ConfigError("data.shots and seed are the sweep's own; override shots=[...] and seeds=[...] instead")
        return cfg

    def _find(self, run: str | None) -> Path:
        """The run file of a grid or stage: a name in `runs`, a path relative to the sweep file, or a shipped file."""
        name = run if run is not None else self._file.run
        if name is None:
            raise ConfigError(f"{self._path}: run is missing; give a fine-tuning run file, for all grids or for each")
        file = find(self._file.runs.get(name, name), self._path.parent)
        if not file.is_file():
            raise ConfigError(f"{self._path}: run={name}: there is no file {file}; give a run file or a name in `runs`")
        return file

    def _data(self, *names: str) -> dict[str, Any]:
        """What to set so that a run reads these datasets; without names it reads those of its run file."""
        # `data.weights` of the run file are shares of its own datasets, and their number may be another.
        return {"data.path": [self._file.packs[name] for name in names], "data.weights": None} if names else {}


def _words(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def recipe_key(cfg: RunConfig) -> str:
    """Equal for runs that differ in name, shots, seed, datasets and starting weights only."""
    # What the rows and columns of a table differ in; all else has to be equal for a fair comparison.
    data = cfg.data.model_copy(update={"shots": None, "path": ()})
    init = cfg.init.model_copy(update={"weights": None})
    return config_hash(cfg.model_copy(update={"name": "same", "seed": 0, "data": data, "init": init}))


def cell_folder(out: Path, name: str) -> Path:
    """The run directory of a cell."""
    return out / "cells" / name
