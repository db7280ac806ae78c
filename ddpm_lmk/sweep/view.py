"""What a person sees of a running sweep: live bars on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ddpm_lmk.durable import read_json
from ddpm_lmk.sweep.plan import Sweep, cell_folder

TAIL_BYTES = 4096


class SweepView:
    """Progress of a sweep; a context manager while it runs."""

    def __init__(self, sweep: Sweep, out: Path, console: Console, *, done: int) -> None:
        self.sweep, self.out, self.console = sweep, out, console
        self.cells = {cell.name: cell for cell in sweep.cells}
        self.finished = done
        self.running: dict[str, TaskID | None] = {}
        self.bars: Progress | None = None
        self.total: TaskID | None = None

    def __enter__(self) -> SweepView:
        self.say(f"sweep {self.sweep.name}: {len(self.cells)} cells, {self.finished} done before")
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, console=self.console)
            self.bars.start()
            self.total = self.bars.add_task("all cells", total=len(self.cells), completed=self.finished)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, event: dict[str, Any]) -> None:
        """Show what a worker reported."""
        name = event["cell"]
        if event["event"] == "start":
            bar = None if self.bars is None else self.bars.add_task(name, total=self.cells[name].steps)
            self.running[name] = bar
            return
        bar = self.running.pop(name, None)
        if self.bars is not None and bar is not None:
            self.bars.remove_task(bar)
        if event["event"] == "stopped":
            self.say(f"{name} stopped; the same command continues it")
            return
        if event["event"] == "lost":
            self.say(f"{name}: {event['error']}; a new worker tries it once more")
            return
        self.finished += 1
        if self.bars is not None and self.total is not None:
            self.bars.update(self.total, completed=self.finished)
        if event["event"] == "failed":
            self.say(f"[{self.finished}/{len(self.cells)}] {name} FAILED: {event['error']}")
        else:
            self.say(f"[{self.finished}/{len(self.cells)}] {name} {event['wall_s']:.0f} s{self._score(name)}")

    def refresh(self) -> None:
        """Move the bars of running cells to the steps in their metrics files."""
        for name, bar in self.running.items():
            if self.bars is not None and bar is not None:
                self.bars.update(bar, completed=last_step(cell_folder(self.out, name) / "metrics.jsonl"))

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
