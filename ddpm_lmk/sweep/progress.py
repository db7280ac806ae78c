"""How a sweep stands: the table of what it would do, its progress on a terminal or as lines, and its summary files.

Progress shows how long the sweep still takes: what its runs were expected to take, corrected by what those that ended
took. OUT/sweep.json lists the cells and how they stand, OUT/results.csv the scores of those that are done.
"""

from __future__ import annotations

import csv
import heapq
import io
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from ddpm_lmk.sweep.expand import Cell, Sweep, SweepRun, by_labels
from ddpm_lmk.system import files
from ddpm_lmk.system.console import Whole, duration, remaining
from ddpm_lmk.system.files import read_json

TAIL_BYTES = 4096  # of a metrics file: more than its longest line
QUIET_S = 300.0  # where nothing is a terminal, there is a line at least so often
LONG_TABLE = 24  # cells; a table of more has a row per start and recipe


def span_s(jobs: Iterable[float], workers: int, busy: Iterable[float] = ()) -> float:
    """Seconds until all `jobs` are done, taken in turn by whoever of `workers` is free; `busy`: what some have left."""
    free_at = sorted([*busy, *[0.0] * workers], reverse=True)[:workers]
    heapq.heapify(free_at)
    for seconds in jobs:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at)


class Remaining:
    """How long the rest of a sweep takes, updated as its runs start, advance and end.

    Args:
        seconds: expected of runs that are not done, by key. Empty where there is no forecast: then a run counts by its
            images, and nothing is known until the first has ended.
    """

    def __init__(self, sweep: Sweep, seconds: Mapping[str, float], *, workers: int, stages_at_once: int) -> None:
        images = {run.key: max(1, run.images) for run in (*sweep.stages, *sweep.cells)}  # in the order they are run
        self._costs = dict(seconds) if seconds else images
        self._order = list(images)
        self._stages = {stage.key for stage in sweep.stages}
        self._workers, self._stages_at_once = workers, stages_at_once
        self._left = dict.fromkeys(self._costs, 1.0)  # share of each run that is to be done
        self._running: set[str] = set()
        # Of the runs that ended. The forecast counts as one run more, of which it was right: the first run, which
        # also warms up disk and caches, would otherwise decide alone.
        self._expected = self._taken = max(seconds.values(), default=0.0)

    def skip(self, key: str) -> None:
        """A run is done already, or will not be done."""
        self._left.pop(key, None)
        self._running.discard(key)

    def start(self, key: str) -> None:
        """A worker has taken a run."""
        self._running.add(key)

    def advance(self, key: str, share: float) -> None:
        """A share of a run is done."""
        if key in self._left:
            self._left[key] = 1 - min(1.0, share)

    def end(self, key: str, seconds: float | None) -> None:
        """A run has ended; `seconds`: what it took from its beginning, None where that says nothing."""
        if key in self._left and seconds:
            self._expected += self._costs[key]
            self._taken += seconds
        self.skip(key)

    def seconds(self) -> float | None:
        """Until the last run ends; None: not known yet."""
        if not self._expected:
            return None
        factor = self._taken / self._expected
        total = 0.0
        for is_stage, at_once in ((True, self._stages_at_once), (False, self._workers)):
            keys = [key for key in self._order if key in self._left and (key in self._stages) == is_stage]
            seconds = {key: factor * self._costs[key] * self._left[key] for key in keys}
            busy = [seconds[key] for key in keys if key in self._running]
            total += span_s([seconds[key] for key in keys if key not in self._running], at_once, busy)
        return total


class SweepView:
    """Progress of a sweep: bars on a terminal, one plain line per event elsewhere. A context manager while it runs.

    Args:
        done: how many cells are.
        whole: what the sweep is a stage of; elsewhere than on a terminal its tenths are shown then, not every cell.
    """

    def __init__(
        self, sweep: Sweep, console: Console, *, done: int, left: Remaining, whole: Whole | None = None
    ) -> None:
        self.sweep, self.console, self.left, self.whole = sweep, console, left, whole
        self.finished = done
        self._total = len(sweep.cells)
        self._runs: dict[str, SweepRun] = {run.key: run for run in (*sweep.stages, *sweep.cells)}
        self._running: dict[str, TaskID | None] = {}
        self._first_step: dict[str, int] = {}  # where a run that is resumed was when it started
        self._last_line = time.monotonic()
        self._bars: Progress | None = None
        self._total_bar: TaskID | None = None

    def __enter__(self) -> SweepView:
        self.print_status(f"sweep {self.sweep.name}: {self._total} cells, {self.finished} done before")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bars = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console)
            self._bars.start()
            self._total_bar = self._bars.add_task("all cells", total=self._total, completed=self.finished, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def print_status(self, text: str) -> None:
        """One line."""
        self._last_line = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, key: str) -> None:
        """A run has been started."""
        bars, steps = self._bars, self._runs[key].steps
        self._running[key] = None if bars is None else bars.add_task(key, total=steps, left="")
        self._first_step[key] = self._step(key)
        self.left.start(key)

    def stop(self, key: str) -> None:
        """A run is no longer under way, and may be started again."""
        bar = self._running.pop(key, None)
        if self._bars is not None and bar is not None:
            self._bars.remove_task(bar)

    def end(self, key: str, seconds: float | None) -> None:
        """A run has ended, after so many seconds if they are known."""
        self.stop(key)
        self.left.end(key, seconds)

    def cell_done(self, name: str, seconds: float) -> None:
        """A cell is done."""
        self.end(name, seconds)
        self.finished += 1
        left = remaining(self.left.seconds())
        if self.whole is None or self._bars is not None:
            more = f", {left}" if left and self._bars is None and self.finished < self._total else ""
            self.print_status(f"[{self.finished}/{self._total}] {name} {duration(seconds)}{self._score(name)}{more}")

    def cell_failed(self, name: str, error: str) -> None:
        """A cell has failed."""
        self.end(name, None)
        self.finished += 1
        self.print_status(f"[{self.finished}/{self._total}] {name} FAILED: {error}")

    def refresh(self) -> None:
        """Move the bars of what runs to the steps in the metrics files, and say what is left where it is time to."""
        for key, bar in self._running.items():
            step, length, first = self._step(key), self._runs[key].steps, self._first_step[key]
            if length is not None and length > first:
                self.left.advance(key, max(0, step - first) / (length - first))
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=step)
        left = self.left.seconds()
        if self._bars is not None and self._total_bar is not None:
            words = remaining(left) if left is None or self.whole is None else self.whole.words(left)
            self._bars.update(self._total_bar, completed=self.finished, left=words)
        elif self.whole is not None and left is not None:
            line = self.whole.line(left, f"{self.finished} of {self._total} cells")
            if line is not None:
                self.print_status(line)
        elif time.monotonic() - self._last_line > QUIET_S:
            words = f", {remaining(left)}" if left is not None else ""
            self.print_status(f"sweep {self.sweep.name}: {self.finished} of {self._total} cells{words}")

    def summary(self, done: int, failed: Mapping[str, str]) -> None:
        """The last words: counts, every failure with its reason, and the next command."""
        self.print_status(
            f"sweep {self.sweep.name}: {done} of {self._total} cells done, {len(failed)} failed; {self.sweep.out}"
        )
        for name, error in failed.items():
            self.print_status(f"  {name}: {error}")
        report = f"next: `ddpm-lmk report {quote(str(self.sweep.out))}`"
        self.print_status("the same command tries these again" if failed else report)

    def _step(self, key: str) -> int:
        return last_step(self._runs[key].folder / "metrics.jsonl")

    def _score(self, name: str) -> str:
        results = read_json(self._runs[name].folder / "results.json") or {}
        scores = results.get("protocols", {}).get("original")
        leak = (results.get("leakage") or {}).get("pretraining", {})
        if leak.get("status") == "overlap":  # such a score is not shown without a remark anywhere
            return f", scored on {leak['images']} images that pre-training saw: see `ddpm-lmk report`"
        return f", MRE {scores['mre']:.2f} {scores['unit']}" if scores else ""


def last_step(path: Path) -> int:
    """The step of the last whole line of a metrics file; 0 where there is none yet."""
    try:
        with path.open("rb") as file:
            # Twice a second for every run: a metrics file of days has megabytes.
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the first line of the tail may be cut, others have no step
            continue
    return 0


def plan_table(sweep: Sweep) -> Table:
    """What would run: a row per stage, then one per cell, or per start and recipe where cells are many; and totals."""
    states = {run.key: run.state() for run in (*sweep.stages, *sweep.cells)}
    left = [cell for cell in sweep.cells if states[cell.name] != "done"]
    table = Table(
        title=f"sweep {sweep.name}: {len(sweep.cells)} cells, {len(sweep.cells) - len(left)} done",
        caption=f"to run: {len(left)} cells, {sum(cell.steps or 0 for cell in left):,} steps, "
        f"{sum(cell.images for cell in left):,} images",
    )
    for heading in ("run", "starts from", "labels", "seeds", "cells", "draw", "steps", "images", "state"):
        table.add_column(heading, justify="right" if heading in ("cells", "steps", "images") else "left")
    for stage in sweep.stages:
        facts = [stage.key, "", "", str(stage.cfg.seed), "", "", _steps([stage]), _images([stage]), states[stage.key]]
        style = "dim" if states[stage.key] == "done" else None
        table.add_row(*facts, style=style, end_section=stage is sweep.stages[-1])
    is_long = len(sweep.cells) > LONG_TABLE
    for cells in sweep.recipes() if is_long else [[cell] for cell in sweep.cells]:
        first = cells[0]
        counts = Counter(states[cell.name] for cell in cells)
        state = ", ".join(f"{count} {state}" for state, count in counts.items()) if len(counts) > 1 else min(counts)
        facts = [first.start if is_long else first.name, _weights(sweep, first), listed_shots(cells)]
        facts += [", ".join(map(str, sorted({cell.seed for cell in cells}))), str(len(cells)), first.cfg.data.draw]
        style = "dim" if counts["done"] == len(cells) else None
        table.add_row(*facts, _steps(cells), _images(cells), state, style=style)
    return table


def listed_shots(cells: Sequence[Cell]) -> str:
    """The different numbers of labels of cells, as words."""
    return ", ".join(dict.fromkeys("all" if cell.shots is None else str(cell.shots) for cell in cells))


def _steps(runs: Sequence[SweepRun]) -> str:
    steps = sorted({run.steps for run in runs if run.steps is not None})
    return " to ".join(dict.fromkeys(f"{count:,}" for count in (*steps[:1], *steps[-1:]))) or "?"


def _images(runs: Sequence[SweepRun]) -> str:
    return f"{sum(run.images for run in runs):,}"


def _weights(sweep: Sweep, cell: Cell) -> str:
    """Where the weights of a start are from."""
    weights, stage = cell.cfg.init.weights, sweep.stage_of(cell)
    if weights is None:
        return "random weights"
    if stage is not None:
        return ", ".join([stage.key, *Path(weights).relative_to(stage.folder).parts[-1:]])
    return weights if Path(weights).exists() else f"missing: {weights}"


def write_summary(sweep: Sweep, *, done: Collection[str], failed: Mapping[str, str]) -> None:
    """Write OUT/sweep.json and OUT/results.csv from what lies in the cells; `done` and `failed` are names of cells.

    `recipe` is equal for cells that were trained alike but for shots, seed, datasets and starting weights.
    """
    rows, scores = [], []
    dataset = None
    for cell in sorted(sweep.cells, key=lambda cell: (cell.start, *by_labels(cell))):
        status = "done" if cell.name in done else "failed" if cell.name in failed else "pending"
        facts: dict[str, Any] = {"cell": cell.name, "start": cell.start, "shots": cell.shots, "seed": cell.seed}
        facts |= {"draw": cell.cfg.data.draw, "weights": cell.cfg.init.weights, "recipe": cell.recipe}
        rows.append({**facts, "status": status, "error": failed.get(cell.name)})
        results = read_json(cell.folder / "results.json") if status == "done" else None
        if results is not None:
            parts = results["parts"] if results["kind"] == "mixture" else [results]
            dataset = ", ".join(part["dataset"] for part in parts)
            scores += [facts | flat_scores(part) for part in parts if "protocols" in part]  # else it was not scored
    texts = {label: text.model_dump(exclude_none=True) for label, text in sweep.rows.items()}
    stages = {stage.name: str(stage.folder) for stage in sweep.stages}
    facts = {"kind": "sweep", "name": sweep.name, "dataset": dataset, "rows": texts, "stages": stages, "cells": rows}
    # Whole and anew each time, so that a sweep killed at any moment leaves tables of what is done.
    files.write_json(sweep.out / "sweep.json", facts)
    files.write_text(sweep.out / "results.csv", to_csv(scores))


def flat_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers of a results.json as one flat row."""
    row: dict[str, Any] = {"dataset": results["dataset"], "split": results["split"], "images": results["num_images"]}
    row |= {f"labels_{kind}": count for kind, count in results["labels"].items()}
    pool = results.get("pool") or {}
    row |= {f"pool_{key}": pool[key] for key in ("offered", "images", "points", "of") if key in pool}
    for stage, leak in results.get("leakage", {}).items():
        row[f"leaked_{stage}_images"] = leak.get("images")
    for protocol, scores in results["protocols"].items():
        row |= {f"{protocol}_{key}": scores[key] for key in ("unit", "mre", "median", "failed")}
        row |= {f"{protocol}_sdr_{threshold}": rate for threshold, rate in scores["sdr"].items()}
        shape = (results.get("mean_shape") or {}).get(protocol)
        row[f"{protocol}_mean_shape_mre"] = shape["mre"] if shape else None
    # Without the wall time: an interrupted sweep has to give the same file, byte for byte.
    return row | {f"train_{key}": value for key, value in (results.get("train") or {}).items() if key != "wall_s"}


def to_csv(rows: list[dict[str, Any]]) -> str:
    """CSV text of rows that may have different keys; numbers keep six digits."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
