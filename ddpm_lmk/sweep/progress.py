"""What a person sees of a running sweep: live bars on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ddpm_lmk.sweep.expand import StageRun, Sweep, cell_folder
from ddpm_lmk.sweep.remaining import Remaining, stage_key
from ddpm_lmk.system.console import Whole, duration, remaining
from ddpm_lmk.system.durable import read_json

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
