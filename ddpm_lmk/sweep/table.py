"""What a sweep would do, as a table: stages and cells, how long they are and how far they have come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from ddpm_lmk.sweep.expand import Cell, State, Sweep, state_of

NUMBERS = ("shots", "seed", "cells", "steps", "images")
LONG = 24  # cells; a table of more has a row per start and recipe


def plan_table(sweep: Sweep, out: Path | None) -> Table:
    """What would run: stages, then cells, one by one where they are few; and a line of totals."""
    states = {cell.name: "pending" if out is None else state_of(out, cell) for cell in sweep.cells}
    left = [cell for cell in sweep.cells if states[cell.name] != "done"]
    table = Table(
        title=f"sweep {sweep.name}: {len(sweep.cells)} cells, {len(sweep.cells) - len(left)} done",
        caption=f"to run: {len(left)} cells, {sum(cell.steps or 0 for cell in left):,} steps, "
        f"{sum(cell.images for cell in left):,} images",
    )
    is_long = len(sweep.cells) > LONG
    name = ("cells of", "starts from", "labels", "seeds", "cells") if is_long else ("cell", "start", "shots", "seed")
    for heading in (*name, "draw", "steps", "images", "state"):
        table.add_column(heading, justify="right" if heading in NUMBERS else "left")
    for stage in sweep.stages:
        state = "pending" if out is None else state_of(out, stage)
        images = _count(None if stage.steps is None else stage.steps * stage.cfg.train.group_size)
        row = [f"stage {stage.name}", str(stage.folder), "", str(stage.cfg.seed), *[""] * (len(name) - 3)]
        style = "dim" if state == "done" else None
        table.add_row(*row, _count(stage.steps), images, state, style=style, end_section=stage is sweep.stages[-1])
    for row, is_done in _groups(sweep, states) if is_long else _cells(sweep, states):
        table.add_row(*row, style="dim" if is_done else None)
    return table


def _cells(sweep: Sweep, states: dict[str, State]) -> Iterator[tuple[list[str], bool]]:
    """One row per cell, and whether it is done."""
    for cell in sweep.cells:
        facts = [cell.name, f"{cell.start}{_remark(sweep, cell)}", _shots(cell), str(cell.seed), cell.cfg.data.draw]
        yield [*facts, _count(cell.steps), f"{cell.images:,}", states[cell.name]], states[cell.name] == "done"


def _groups(sweep: Sweep, states: dict[str, State]) -> Iterator[tuple[list[str], bool]]:
    """One row per start and recipe; images are those of all its cells."""
    for cells in sweep.recipes():
        first = cells[0]
        steps = sorted({cell.steps for cell in cells if cell.steps is not None})
        length = "?" if not steps else _count(steps[0]) + (f" to {_count(steps[-1])}" if len(steps) > 1 else "")
        counts = Counter(states[cell.name] for cell in cells)
        told = ", ".join(f"{count} {state}" for state, count in counts.items()) if len(counts) > 1 else min(counts)
        seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
        weights = _weights(sweep, first)
        facts = [first.start, weights, listed_shots(cells), seeds, str(len(cells)), first.cfg.data.draw, length]
        yield [*facts, f"{sum(cell.images for cell in cells):,}", told], counts["done"] == len(cells)


def listed_shots(cells: Sequence[Cell]) -> str:
    """The different numbers of labels of cells, as words."""
    return ", ".join(dict.fromkeys(map(_shots, cells)))


def _shots(cell: Cell) -> str:
    return "all" if cell.shots is None else str(cell.shots)


def _weights(sweep: Sweep, cell: Cell) -> str:
    """Where the weights of a start are from, in a table."""
    weights = cell.cfg.init.weights
    if weights is None:
        return "random weights"
    for stage in sweep.stages:
        if Path(weights).is_relative_to(stage.folder):
            rest = Path(weights).relative_to(stage.folder).name
            return f"stage {stage.name}" + (f", {rest}" if rest else "")
    return weights if Path(weights).exists() else f"missing: {weights}"


def _remark(sweep: Sweep, cell: Cell) -> str:
    """What is to say of the weights of a cell whose name is its start."""
    weights = cell.cfg.init.weights
    if weights is None or Path(weights).exists():
        return ""
    return " (from a stage)" if sweep.makes(weights) else f" (missing: {weights})"


def _count(steps: int | None) -> str:
    return "?" if steps is None else f"{steps:,}"
