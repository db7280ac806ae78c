"""What a sweep would do, as a table: stages and cells, how long they are and how far they have come."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ddpm_lmk.sweep.plan import Cell, Sweep, state_of

HEADINGS = ("cell", "start", "shots", "seed", "draw", "steps", "images", "state")
NUMBERS = ("shots", "seed", "steps", "images")


def plan_table(sweep: Sweep, out: Path | None) -> Table:
    """What would run: one row per stage and cell with steps and state, and a line of totals."""
    states = [("pending" if out is None else state_of(out, cell)) for cell in sweep.cells]
    left = [cell for cell, state in zip(sweep.cells, states) if state != "done"]
    table = Table(
        title=f"sweep {sweep.name}: {len(sweep.cells)} cells, {len(sweep.cells) - len(left)} done",
        caption=f"to run: {len(left)} cells, {sum(cell.steps or 0 for cell in left):,} steps, "
        f"{sum(cell.images for cell in left):,} images",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in NUMBERS else "left")
    for stage in sweep.stages:
        state = "pending" if out is None else state_of(out, stage)
        row = (f"stage {stage.name}", str(stage.folder), "", str(stage.cfg.seed), "", _count(stage.steps), "", state)
        table.add_row(*row, style="dim" if state == "done" else None, end_section=stage is sweep.stages[-1])
    for cell, state in zip(sweep.cells, states):
        shots = "all" if cell.shots is None else str(cell.shots)
        facts = (cell.name, _start(sweep, cell), shots, str(cell.seed), cell.cfg.data.draw, _count(cell.steps))
        table.add_row(*facts, f"{cell.images:,}", state, style="dim" if state == "done" else None)
    return table


def _start(sweep: Sweep, cell: Cell) -> str:
    """The label of a start, and what is wrong with its weights."""
    weights = cell.cfg.init.weights
    if weights is None or Path(weights).exists():
        return cell.start
    return f"{cell.start} ({'from a stage' if sweep.makes(weights) else f'missing: {weights}'})"


def _count(steps: int | None) -> str:
    return "?" if steps is None else f"{steps:,}"
