"""What a person sees of a running sweep: live bars on a terminal, one plain line per event elsewhere.

What a sweep would do, as a table: stages and cells, how long they are and how far they have come.

The files that say how a sweep stands: sweep.json, its cells and rows, and results.csv, the scores of those done.

How long a sweep still takes: what its runs were expected to, corrected by what those that ended took.

Without a forecast a run counts by its images, and nothing is known until the first has ended.
"""

from __future__ import annotations

import csv
import heapq
import io
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ddpm_lmk.sweep.expand import Cell, StageRun, State, Sweep, cell_folder, state_of
from ddpm_lmk.system import files
from ddpm_lmk.system.console import Whole, duration, remaining
from ddpm_lmk.system.files import read_json


def stage_key(stage: StageRun) -> str:
    """A stage among the cells of its sweep, whose names have no space."""
    return f"stage {stage.name}"


def span_s(jobs: Iterable[float], workers: int, busy: Iterable[float] = ()) -> float:
    """Seconds until all `jobs` are done, taken in turn by whoever of `workers` is free; `busy`: what some have left."""
    free_at = sorted([*busy, *[0.0] * workers], reverse=True)[:workers]
    heapq.heapify(free_at)
    for seconds in jobs:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at)


class Remaining:
    """What is left of a sweep, told of every run that starts, comes on and ends.

    Args:
        seconds: expected of stages (by `stage_key`) and cells that are not done; empty: not known.
    """

    def __init__(self, sweep: Sweep, seconds: Mapping[str, float], *, workers: int, stages_at_once: int) -> None:
        images = {stage_key(stage): (stage.steps or 1) * stage.cfg.train.global_batch_size for stage in sweep.stages}
        images |= {cell.name: max(1, cell.images) for cell in sweep.cells}
        self._costs = dict(seconds) if seconds else images
        self._order = list(images)  # stages first, then cells as workers take them
        self._stages = {stage_key(stage) for stage in sweep.stages}
        self._workers, self._stages_at_once = workers, stages_at_once
        self._left = dict.fromkeys(self._costs, 1.0)  # share of each run that is to be done
        self._running: set[str] = set()
        # Of the runs that ended; a forecast counts as one more, of which it was right.
        self._expected = self._taken = max(seconds.values(), default=0.0)

    def skip(self, name: str) -> None:
        """A run is done already, or will not be done."""
        self._left.pop(name, None)
        self._running.discard(name)

    def start(self, name: str) -> None:
        """A worker has taken a run."""
        self._running.add(name)

    def advance(self, name: str, share: float) -> None:
        """So much of a run is done."""
        if name in self._left:
            self._left[name] = 1 - min(1.0, share)

    def end(self, name: str, seconds: float | None) -> None:
        """A run has ended; `seconds`: what it took from its beginning, None where that says nothing."""
        if name in self._left and seconds:
            self._expected += self._costs[name]
            self._taken += seconds
        self.skip(name)

    def seconds(self) -> float | None:
        """Until the last run ends; None: not known yet."""
        if not self._expected:
            return None
        factor = self._taken / self._expected
        total = 0.0
        for is_stage, at_once in ((True, self._stages_at_once), (False, self._workers)):
            names = [name for name in self._order if name in self._left and (name in self._stages) == is_stage]
            seconds = {name: factor * self._costs[name] * self._left[name] for name in names}
            busy = [seconds[name] for name in names if name in self._running]
            total += span_s([seconds[name] for name in names if name not in self._running], at_once, busy)
        return total


TAIL_BYTES = 4096
QUIET_S = 300.0  # where nothing is a terminal, there is a line at least so often


class SweepView:
    """Progress of a sweep; a context manager while it runs.

    Args:
        left: how long it takes, of which this view tells what starts, comes on and ends.
        whole: what the sweep is a stage of; elsewhere than on a terminal its tenths are told then, and not every cell.
    """

    def __init__(
        self, sweep: Sweep, out: Path, console: Console, *, done: int, left: Remaining, whole: Whole | None = None
    ) -> None:
        self.sweep, self.out, self.console, self.left, self.whole = sweep, out, console, left, whole
        self.cells = {cell.name: cell for cell in sweep.cells}
        self.finished = done
        self.running: dict[str, TaskID | None] = {}
        self.lengths = {cell.name: cell.steps for cell in sweep.cells}
        self.metrics = {cell.name: cell_folder(out, cell.name) / "metrics.jsonl" for cell in sweep.cells}
        for stage in sweep.stages:
            self.lengths[stage_key(stage)] = stage.steps
            self.metrics[stage_key(stage)] = stage.folder / "metrics.jsonl"
        self.first: dict[str, int] = {}  # where a run that goes on was when it started
        self.said = time.monotonic()
        self.bars: Progress | None = None
        self.total: TaskID | None = None

    def __enter__(self) -> SweepView:
        self.say(f"sweep {self.sweep.name}: {len(self.cells)} cells, {self.finished} done before")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console)
            self.bars.start()
            self.total = self.bars.add_task("all cells", total=len(self.cells), completed=self.finished, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.said = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, event: dict[str, Any]) -> None:
        """Show what a worker reported."""
        name = event["cell"]
        if event["event"] == "start":
            self._begin(name)
            return
        self._end(name)
        if event["event"] == "stopped":
            self.say(f"{name} stopped; the same command continues it")
            return
        if event["event"] == "lost":
            self.say(f"{name}: {event['error']}; a new worker tries it once more")
            return
        self.finished += 1
        self.left.end(name, event.get("wall_s"))
        left = remaining(self.left.seconds())
        if self.bars is not None and self.total is not None:
            self.bars.update(self.total, completed=self.finished, left=left)
        if event["event"] == "failed":
            self.say(f"[{self.finished}/{len(self.cells)}] {name} FAILED: {event['error']}")
        elif self.whole is None or self.bars is not None:
            more = f", {left}" if left and self.bars is None and self.finished < len(self.cells) else ""
            told = f"{name} {duration(event['wall_s'])}{self._score(name)}{more}"
            self.say(f"[{self.finished}/{len(self.cells)}] {told}")

    def begin_stage(self, stage: StageRun) -> None:
        """A stage has been started."""
        self._begin(stage_key(stage))

    def end_stage(self, stage: StageRun, seconds: float | None) -> None:
        """A stage has ended, after so many seconds if it is done."""
        self._end(stage_key(stage))
        self.left.end(stage_key(stage), seconds)

    def _begin(self, name: str) -> None:
        bar = None if self.bars is None else self.bars.add_task(name, total=self.lengths[name], left="")
        self.running[name] = bar
        self.first[name] = last_step(self.metrics[name])
        self.left.start(name)

    def _end(self, name: str) -> None:
        bar = self.running.pop(name, None)
        if self.bars is not None and bar is not None:
            self.bars.remove_task(bar)

    def refresh(self) -> None:
        """Move the bars of what runs to the steps in the metrics files, and say what is left where it is time to."""
        for name, bar in self.running.items():
            step, length = last_step(self.metrics[name]), self.lengths[name]
            if length is not None and length > self.first[name]:
                self.left.advance(name, max(0, step - self.first[name]) / (length - self.first[name]))
            if self.bars is not None and bar is not None:
                self.bars.update(bar, completed=step)
        left = self.left.seconds()
        if self.bars is not None and self.total is not None:
            words = remaining(left) if left is None or self.whole is None else self.whole.words(left)
            self.bars.update(self.total, left=words)
        elif self.whole is not None and left is not None:
            line = self.whole.line(left, f"{self.finished} of {len(self.cells)} cells")
            if line is not None:
                self.say(line)
        elif time.monotonic() - self.said > QUIET_S:
            words = f", {remaining(left)}" if left is not None else ""
            self.say(f"sweep {self.sweep.name}: {self.finished} of {len(self.cells)} cells{words}")

    def summary(self, done: int, failed: dict[str, str]) -> None:
        """The last words: counts, and every failure with its reason."""
        self.say(f"sweep {self.sweep.name}: {done} of {len(self.cells)} cells done, {len(failed)} failed; {self.out}")
        for name, error in failed.items():
            self.say(f"  {name}: {error}")
        self.say("the same command tries these again" if failed else f"next: `ddpm-lmk report {quote(str(self.out))}`")

    def _score(self, name: str) -> str:
        results = read_json(cell_folder(self.out, name) / "results.json") or {}
        scores = results.get("protocols", {}).get("original")
        leak = (results.get("leakage") or {}).get("pretraining", {})
        if leak.get("status") == "overlap":
            return f", scored on {leak['images']} images that pre-training saw: see `ddpm-lmk report`"
        return f", MRE {scores['mre']:.2f} {scores['unit']}" if scores else ""


def last_step(path: Path) -> int:
    """The step of the last whole line of a metrics file; 0 where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


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
        images = _count(None if stage.steps is None else stage.steps * stage.cfg.train.global_batch_size)
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


def write_summary(sweep: Sweep, out: Path, *, done: Collection[str], failed: Mapping[str, str]) -> None:
    """Write OUT/sweep.json and OUT/results.csv from what lies in the cells; `done` and `failed` are names of cells.

    `recipe` is equal for cells that were trained alike but for shots, seed, packs and starting weights.
    """
    rows, scores = [], []
    dataset = None
    for cell in sorted(sweep.cells, key=lambda cell: (cell.start, cell.shots or 10**9, cell.seed)):
        status = "done" if cell.name in done else "failed" if cell.name in failed else "pending"
        facts = {"cell": cell.name, "start": cell.start, "shots": cell.shots, "seed": cell.seed}
        facts |= {"draw": cell.cfg.data.draw, "weights": cell.cfg.init.weights, "recipe": cell.recipe}
        rows.append({**facts, "status": status, "error": failed.get(cell.name)})
        results = read_json(cell_folder(out, cell.name) / "results.json") if status == "done" else None
        if results is not None:
            parts = results["parts"] if results["kind"] == "mixture" else [results]
            dataset = ", ".join(part["dataset"] for part in parts)
            scores += [facts | flat_scores(part) for part in parts if "protocols" in part]  # else it was not scored
    texts = {label: text.model_dump(exclude_none=True) for label, text in sweep.rows.items()}
    stages = {stage.name: str(stage.folder) for stage in sweep.stages}
    facts = {"kind": "sweep", "name": sweep.name, "dataset": dataset}
    summary = {**facts, "rows": texts, "stages": stages, "cells": rows}
    files.write_json(out / "sweep.json", summary)
    files.write_text(out / "results.csv", to_csv(scores))


def flat_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers of a results.json as one flat row."""
    row: dict[str, Any] = {"dataset": results["dataset"], "split": results["split"], "images": results["num_images"]}
    row |= {f"labels_{kind}": count for kind, count in results["labels"].items()}
    for stage, leak in results.get("leakage", {}).items():
        row[f"leaked_{stage}_images"] = leak.get("images")
    for protocol, scores in results["protocols"].items():
        row |= {f"{protocol}_{key}": scores[key] for key in ("unit", "mre", "median", "failed")}
        row |= {f"{protocol}_sdr_{threshold}": rate for threshold, rate in scores["sdr"].items()}
        shape = (results.get("mean_shape") or {}).get(protocol)
        row[f"{protocol}_mean_shape_mre"] = shape["mre"] if shape else None
    train = results.get("train") or {}
    return row | {f"train_{key}": value for key, value in train.items() if key != "wall_s"}  # the same at every run


def to_csv(rows: list[dict[str, Any]]) -> str:
    """CSV text of rows that may have different keys; numbers keep six digits."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
