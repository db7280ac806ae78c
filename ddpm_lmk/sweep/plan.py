"""A sweep: shots × seeds × starting weights of one fine-tuning run file, as a list of cells.

A sweep file names a run file, what to set in it, and grids:

    name: ceph
    run: ../finetune/ceph.yaml          # relative to this file
    set: {train.length: 600 steps}
    grids:
      - shots: [1, 5, 10]               # null: all training images
        seeds: [0, 1, 2]
        start: {scratch: null, isbi: runs/pretrain-isbi}   # label: weights, relative to the current folder
        draw: random                    # optional; set: {...} optional as well

Every cell is an ordinary run directory OUT/cells/START-kSHOTS-sSEED. This file reads, expands and shows sweeps; running
them is in `sweep.run`. It never imports torch, so that `--dry-run` answers at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints
from rich.table import Table

from ddpm_lmk.config import RunConfig, Section
from ddpm_lmk.data.order import GroupPlan
from ddpm_lmk.data.shards import Manifest
from ddpm_lmk.durable import DamagedError, read_json, read_no_follow
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.runfile import config_hash, load_run, load_yaml, validate
from ddpm_lmk.yamlfile import parse

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=40)]
State = Literal["done", "started", "pending"]


class Grid(Section):
    """One block of a sweep: every combination of its three lists is a cell."""

    shots: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(
        min_length=1, description="labelled images; null: all"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="root of all randomness of a cell")
    start: dict[Label, str | None] = Field(min_length=1, description="label and starting weights; null: random weights")
    draw: Literal["first", "random"] | None = Field(None, description="how the shots are chosen; null: as the run file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted run keys for this grid")


class SweepFile(Section):
    """A sweep file as written."""

    name: Label = Field(description="shown in reports")
    run: str = Field(description="fine-tuning run file, relative to the sweep file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted run keys for all cells")
    grids: tuple[Grid, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    start: str
    shots: int | None
    seed: int
    cfg: RunConfig

    @cached_property
    def hash(self) -> str:
        """What `done.json` must carry for the cell to count as finished."""
        return config_hash(self.cfg)

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps; None where the length is in epochs of a set that is not there to be counted."""
        num_images = self.shots or _count_images(self.cfg)
        if num_images is None and self.cfg.train.length.unit == "epochs":
            return None
        train = self.cfg.train
        plan = GroupPlan(num_images or 1, train.group_size, train.micro_batch, train.windows, drop_last=False)
        return train.length.steps(train.group_size, num_images or 1, plan.steps_per_epoch)

    @property
    def images(self) -> int:
        """Image passes of training, the measure of a cell's length (upper bound when a group is cut short)."""
        return (self.steps or 0) * min(self.cfg.train.group_size, self.shots or self.cfg.train.group_size)


@dataclass(frozen=True)
class Sweep:
    """A name and its cells, longest first."""

    name: str
    cells: tuple[Cell, ...]

    def starts(self) -> dict[str, str | None]:
        """Starting weights by label."""
        return {cell.start: cell.cfg.init.weights for cell in self.cells}


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and expand it.

    `overrides` are `key=value` words: `name`, `run`, `shots`, `seeds` and `start.LABEL` change the sweep (all grids);
    anything else is a key of the run file and wins over every `set`.

    Raises:
        ConfigError: a mistake in the sweep file, in an override or in the run file they make.
    """
    data = load_yaml(path)
    run_words = [word for word in overrides if not _override_sweep(data, word)]
    sweep = validate(SweepFile, data, source=str(path))
    run = Path(path).parent / sweep.run
    if not run.is_file():
        raise ConfigError(f"{path}: run={sweep.run}: there is no file {run}; give a fine-tuning run file")
    cells: dict[str, Cell] = {}
    for grid in sweep.grids:
        for start, weights in grid.start.items():
            for shots in grid.shots:
                for seed in grid.seeds:
                    settings = {"data.shots": shots, "seed": seed, "init.weights": weights}
                    cell = _cell(run, sweep.set | _draw(grid) | grid.set | settings, run_words, start)
                    if cell.name in cells:
                        raise ConfigError(
                            f"{path}: two grids make the cell {cell.name}; give their starts different labels"
                        )
                    cells[cell.name] = cell
    return Sweep(sweep.name, tuple(sorted(cells.values(), key=lambda cell: -cell.images)))


def _draw(grid: Grid) -> dict[str, Any]:
    return {} if grid.draw is None else {"data.draw": grid.draw}


def _cell(run: Path, settings: dict[str, Any], words: list[str], start: str) -> Cell:
    """The cell of one combination; the command line's `words` come last."""
    shots, seed = settings["data.shots"], settings["seed"]
    name = f"{start}-k{'all' if shots is None else shots}-s{seed}"
    lines = [f"{key}={json.dumps(value)}" for key, value in (settings | {"name": name}).items()]
    cfg = load_run(run, [*lines, *words])
    if cfg.task.kind != "landmarks":
        raise ConfigError(f"{run}: a sweep needs a fine-tuning run (task.kind: landmarks), found {cfg.task.kind}")
    if (cfg.data.shots, cfg.seed) != (shots, seed):
        raise ConfigError("data.shots and seed are the sweep's own; override shots=[...] and seeds=[...] instead")
    return Cell(name, start, shots, seed, cfg)


def _override_sweep(data: dict[str, Any], word: str) -> bool:
    """Apply `word` to the raw sweep file if it is one of the sweep's own keys; False leaves it to the run file."""
    key, equals, text = word.partition("=")
    if not equals or key.partition(".")[0] not in ("name", "run", "shots", "seeds", "start"):
        return False
    value, _ = parse(text, f"command line: {key}")
    if key in ("name", "run"):
        data[key] = value
        return True
    grids = [grid for grid in data.get("grids") or [] if isinstance(grid, dict)]
    section, _, label = key.partition(".")
    if section == "start":
        changed = [grid for grid in grids if label in (grid.get("start") or {})]
        if not changed:
            known = ", ".join(dict.fromkeys(name for grid in grids for name in grid.get("start") or {}))
            raise ConfigError(f"command line: {key}: no grid has a start of that label; known: {known}")
        for grid in changed:
            grid["start"][label] = value
    else:
        for grid in grids:
            grid[key] = value if isinstance(value, list) else [value]
    return True


def _count_images(cfg: RunConfig) -> int | None:
    """Images of the training splits, where the data is there."""
    try:
        return sum(len(Manifest.open(path).rows(cfg.data.splits)) for path in cfg.data.path)
    except DataError:
        return None


def is_done(folder: Path, cell: Cell) -> bool:
    """Has this very run finished in `folder`, its results as they were written? No other configuration counts."""
    done = read_json(folder / "done.json")
    if done is None or done.get("config_hash") != cell.hash:
        return False
    try:
        return hashlib.sha256(read_no_follow(folder / "results.json")).hexdigest() == done.get("results_sha256")
    except DamagedError:
        return False


def state_of(out: Path, cell: Cell) -> State:
    """How far a cell of the sweep folder `out` is."""
    folder = cell_folder(out, cell.name)
    if is_done(folder, cell):
        return "done"
    return "started" if folder.exists() else "pending"


def cell_folder(out: Path, name: str) -> Path:
    """The run directory of a cell."""
    return out / "cells" / name


def plan_table(sweep: Sweep, out: Path | None) -> Table:
    """What would run: one row per cell with steps and state, and a line of totals."""
    states = [("pending" if out is None else state_of(out, cell)) for cell in sweep.cells]
    left = [cell for cell, state in zip(sweep.cells, states) if state != "done"]
    table = Table(
        title=f"sweep {sweep.name}: {len(sweep.cells)} cells, {len(sweep.cells) - len(left)} done",
        caption=f"to run: {len(left)} cells, {sum(cell.steps or 0 for cell in left):,} steps, "
        f"{sum(cell.images for cell in left):,} images",
    )
    for heading in ("cell", "start", "shots", "seed", "draw", "steps", "images", "state"):
        table.add_column(heading, justify="right" if heading in ("shots", "seed", "steps", "images") else "left")
    for cell, state in zip(sweep.cells, states):
        weights = cell.cfg.init.weights
        start = cell.start if weights is None or Path(weights).exists() else f"{cell.start} (missing: {weights})"
        steps = "?" if cell.steps is None else f"{cell.steps:,}"
        shots = "all" if cell.shots is None else str(cell.shots)
        row = (cell.name, start, shots, str(cell.seed), cell.cfg.data.draw, steps, f"{cell.images:,}", state)
        table.add_row(*row, style="dim" if state == "done" else None)
    return table


def check_starts(sweep: Sweep) -> None:
    """Refuse a sweep whose starting weights are not there, before anything runs."""
    for label, weights in sweep.starts().items():
        if weights is not None and not Path(weights).exists():
            raise ConfigError(
                f"start {label}: there is nothing at {weights}; pre-train it first, or give start.{label}=PATH"
            )
