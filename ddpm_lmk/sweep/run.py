"""Runs a sweep: first its stages, then its cells, in child processes; shows progress and writes the summary files.

Stages run side by side on CPUs, one process each, so that what a stage learns does not depend on the number of workers;
on GPUs one after the other, each on all of them. Then N workers pull cells until none is left. OUT/cells/CELL/ is the
run directory of a cell, beside it CELL.lock and, after a failure, CELL.error.json; OUT/logs/ holds what the children
wrote. A worker whose heartbeats stop is killed, and a cell that has lost its worker is tried once more by a new one.

Exit code: 0 all cells are done, 1 some failed (the others are done), 75 stopped, or taken by another sweep in the same
folder. The same command continues: finished cells are never run again.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ddpm_lmk.errors import ConfigError, StoppedError
from ddpm_lmk.launcher import supervise
from ddpm_lmk.launcher.placement import STALL_S, Device, worker_environment
from ddpm_lmk.sweep.expand import Cell, StageRun, Sweep
from ddpm_lmk.sweep.progress import Remaining, SweepView, write_summary
from ddpm_lmk.sweep.worker import failure_file
from ddpm_lmk.system import files, heartbeat
from ddpm_lmk.system.children import start_child
from ddpm_lmk.system.console import Whole, duration
from ddpm_lmk.system.signals import MARGIN_S, InterruptedRunError, StopRequest, exit_code_of, grace_s

SOME_FAILED = 1
STOPPED = (StoppedError.exit_code, InterruptedRunError.exit_code)
POLL_S = 0.5
TRIES = 2  # a cell that has lost so many workers has failed
MAX_LOST_WORKERS = 3 * TRIES  # per worker slot


def run_sweep(
    sweep: Sweep,
    *,
    processes: int = 1,
    per_device: int = 1,
    device: Device = "cpu",
    console: Console | None = None,
    stall_s: float = STALL_S,
    seconds: Mapping[str, float] | None = None,
    whole: Whole | None = None,
) -> int:
    """Run every cell of `sweep` that is not done; returns the exit code (see the module). `check_sweep` comes first.

    Args:
        processes: GPUs, or processes on the CPU.
        per_device: workers that share one of these (see `forecast.workers_per_device`).
        stall_s: seconds without a heartbeat after which a worker is killed, where its usual pace is no slower.
        seconds: what runs are expected to take, by key.
        whole: what this sweep is a stage of.

    Raises:
        ConfigError: `processes` is not positive.
    """
    if processes < 1:
        raise ConfigError(f"a sweep needs at least 1 process, found {processes}")
    stages_at_once = processes if device == "cpu" else 1
    left = Remaining(sweep, seconds or {}, workers=processes * per_device, stages_at_once=stages_at_once)
    done = {cell.name for cell in sweep.cells if cell.is_done()}
    view = SweepView(sweep, console or Console(stderr=True), done=len(done), left=left, whole=whole)
    runner = SweepRunner(sweep, device, processes, per_device, stall_s, view, done)
    return runner.run()


@dataclass(eq=False)
class Child:
    """A process that does a stage, or a worker that pulls cells."""

    process: subprocess.Popen[str]
    log: Path
    slot: int = 0
    stage: StageRun | None = None
    cell: str | None = None  # which it works on
    restarts: int = 0  # of the slot of a worker
    stalled: str = ""  # what was seen of it when it was killed for want of progress
    began: float = field(default_factory=time.monotonic)


class SweepRunner:
    """A sweep under way: its children, and which cells are done or have failed."""

    def __init__(
        self,
        sweep: Sweep,
        device: Device,
        processes: int,
        per_device: int,
        stall_s: float,
        view: SweepView,
        done: set[str],
    ) -> None:
        self.sweep, self.device, self.processes, self.stall_s, self.view = sweep, device, processes, stall_s, view
        self.num_workers = processes * per_device
        self.session = uuid.uuid4().hex[:12]  # a failure recorded by an earlier session is tried again
        self.done = done
        self.failed: dict[str, str] = {}
        self.stop_signal = 0
        self._lost: Counter[str] = Counter()  # workers, by the cell they were at
        self._children: list[Child] = []
        self._events: queue.Queue[tuple[Child, dict[str, Any]]] = queue.Queue()
        self._stop_by = float("inf")  # when children that have not left by themselves are killed

    def run(self) -> int:
        """Run what is left; returns the exit code."""
        (self.sweep.out / "cells").mkdir(parents=True, exist_ok=True)
        for name in self.done:
            self.view.left.skip(name)
        self._write_summary()
        if self._pending():
            # The first signal lets children save and leave; a second one ends them and this process.
            stop = StopRequest(on_first=self._ask_to_stop, within_s=grace_s(), raises=False)
            with stop, self.view, tempfile.TemporaryDirectory(prefix="ddpm-lmk-") as folder:
                self._heartbeats = Path(folder)
                self._run_stages()
                self._run_cells()
        self.done |= {cell.name for cell in self.sweep.cells if cell.is_done()}  # by another sweep in this folder
        for name in self.done & self.failed.keys():
            del self.failed[name]
        self._write_summary()
        self.view.summary(len(self.done), self.failed)
        if self.stop_signal:
            return exit_code_of(self.stop_signal)
        if self.failed:
            return SOME_FAILED
        return StoppedError.exit_code if self._pending() else 0

    def _pending(self) -> list[Cell]:
        return [cell for cell in self.sweep.cells if cell.name not in self.failed and cell.name not in self.done]

    def _write_summary(self) -> None:
        write_summary(self.sweep, done=self.done, failed=self.failed)

    def _ask_to_stop(self, number: int) -> None:
        self.stop_signal = number

    # Stages

    def _run_stages(self) -> None:
        """Run the stages that pending cells start from; the cells of one that fails fail with it."""
        waiting = [stage for stage in self.sweep.stages_of(self._pending()) if not stage.is_done()]
        for stage in self.sweep.stages:
            if stage not in waiting:
                self.view.left.skip(stage.key)
        at_once = min(len(waiting), self.processes if self.device == "cpu" else 1)

        def start_next() -> None:
            while waiting and len(self._children) < at_once and not self.stop_signal:
                self._start_stage(waiting.pop(0), side_by_side=at_once)

        def on_exit(child: Child, code: int) -> None:
            self._end_stage(child, code)
            start_next()

        start_next()
        self._follow_children(on_exit)

    def _start_stage(self, stage: StageRun, *, side_by_side: int) -> None:
        log = self.sweep.out / "logs" / f"stage-{stage.name}.log"
        processes = 1 if self.device == "cpu" else self.processes
        # It says nothing of its own time: the sweep has forecast all of it.
        run = {"config": stage.cfg.model_dump(mode="json"), "out": str(stage.folder), "is_foretold": False}
        run["group"] = self.sweep.name
        # On GPUs all devices stay visible to it; on CPUs those side by side share the cores.
        environment = worker_environment("cpu", 0, side_by_side, devices=1) if self.device == "cpu" else None
        self.view.print_status(f"{stage.key}: pre-training in {stage.folder}, see {log}")
        job = {"stage": {"run": run, "processes": processes, "device": self.device}}
        self._start(job, log, environment, stage=stage)
        self.view.begin(stage.key)

    def _end_stage(self, child: Child, code: int) -> None:
        assert child.stage is not None
        stage, seconds = child.stage, time.monotonic() - child.began
        if stage.is_done():
            self.view.end(stage.key, seconds)
            self.view.print_status(f"{stage.key} done, {duration(seconds)}")
            return
        self.view.end(stage.key, None)
        if code in STOPPED:
            self.view.print_status(f"{stage.key} stopped; the same command continues it")
            return
        reason = f"{stage.key} ended with exit code {code}; see {child.log}"
        self.view.print_status(reason)
        for cell in self._pending():
            if self.sweep.stage_of(cell) is stage:
                self.failed[cell.name] = reason
                self.view.left.skip(cell.name)

    # Cells

    def _run_cells(self) -> None:
        """Start the workers and follow them until the last has left."""
        if self.stop_signal:
            return
        self.num_workers = min(self.num_workers, len(self._pending()))
        for slot in range(self.num_workers):
            self._start_worker(slot)
        self._follow_children(self._replace_worker)

    def _start_worker(self, slot: int, *, restarts: int = 0) -> None:
        """Start a worker on everything that is pending; which cells it gets is decided by their locks."""
        (self._heartbeats / f"rank-{slot}").unlink(missing_ok=True)  # of the one before
        environment = worker_environment(self.device, slot, self.num_workers, devices=self.processes)
        cells = [
            {**asdict(cell), "folder": str(cell.folder), "cfg": cell.cfg.model_dump(mode="json")}
            for cell in self._pending()
        ]
        job = {"slot": slot, "device": self.device, "session": self.session, "sweep": self.sweep.name, "cells": cells}
        log = self.sweep.out / "logs" / f"worker-{slot}.log"
        self._start(job, log, environment | {heartbeat.FOLDER: str(self._heartbeats)}, slot=slot, restarts=restarts)

    def _replace_worker(self, worker: Child, code: int) -> None:
        """Start the successor of a worker that was lost in the middle of its work."""
        if code in (0, *STOPPED) or self.stop_signal:
            return
        can_follow = worker.restarts < MAX_LOST_WORKERS
        how = worker.stalled or f"died with exit code {code}"
        if worker.cell is not None:
            self._lose_cell(worker.cell, f"its worker {how}; see {worker.log}", code, can_follow=can_follow)
        elif worker.restarts == 0:
            self.view.print_status(f"worker {worker.slot} {how} before its first cell; see {worker.log}")
        if can_follow and self._pending():
            self._start_worker(worker.slot, restarts=worker.restarts + 1)

    def _lose_cell(self, name: str, reason: str, code: int, *, can_follow: bool) -> None:
        """A cell whose worker is lost is tried by the next one, or has failed."""
        self._lost[name] += 1
        if can_follow and self._lost[name] < TRIES:
            self.view.stop(name)
            self.view.print_status(f"{name}: {reason}; a new worker tries it once more")
            return
        cell = next(cell for cell in self.sweep.cells if cell.name == name)
        facts = {"session": self.session, "error": reason, "type": "WorkerLost", "exit_code": code}
        files.write_json(failure_file(cell), facts)
        self._fail_cell(name, reason)

    def _fail_cell(self, name: str, error: str) -> None:
        self.failed[name] = error
        self.view.cell_failed(name, error)
        self._write_summary()

    def _handle(self, worker: Child, event: dict[str, Any]) -> None:
        """Take note of what a worker reports."""
        name = event["cell"]
        worker.cell = name if event["event"] == "start" else None
        match event["event"]:
            case "start":
                self.view.begin(name)
            case "stopped":
                self.view.stop(name)
                self.view.print_status(f"{name} stopped; the same command continues it")
            case "failed":
                self._fail_cell(name, event["error"])
            case "done" if name not in self.done:  # else it has only met what another worker did
                self.done.add(name)
                self.view.cell_done(name, event["wall_s"])
                self._write_summary()

    # Children of both kinds

    def _start(self, job: dict[str, Any], log: Path, environment: dict[str, str] | None, **facts: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            child = Child(
                start_child("ddpm_lmk.sweep.worker", job, environment=environment, stdout=subprocess.PIPE, stderr=file),
                log,
                **facts,
            )
        self._children.append(child)
        threading.Thread(target=self._listen, args=(child,), daemon=True).start()

    def _listen(self, child: Child) -> None:
        """In a thread: pass the child's events on until it ends."""
        assert child.process.stdout is not None
        with child.process.stdout as stdout:
            for line in stdout:
                self._events.put((child, json.loads(line)))
        self._events.put((child, {"event": "exit", "code": child.process.wait()}))

    def _follow_children(self, on_exit: Callable[[Child, int], None]) -> None:
        """Until the last child has left: hand on a stop signal, kill those that hang, show progress."""
        while self._children:
            self._pass_on_stop()
            for child in self._children:
                if child.stage is None and not child.stalled:  # a stage looks after its own ranks
                    self._kill_if_stalled(child)
            try:
                child, event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                self.view.refresh()
                continue
            if event["event"] == "exit":
                self._children.remove(child)
                on_exit(child, event["code"])
            else:
                self._handle(child, event)

    def _pass_on_stop(self) -> None:
        if not self.stop_signal:
            return
        now = time.monotonic()
        if self._stop_by == float("inf"):
            # Before this process has to be gone itself, so that it still writes the summaries.
            self._stop_by = now + grace_s() - MARGIN_S / 2
            for child in self._children:
                child.process.send_signal(signal.SIGINT if self.stop_signal == signal.SIGINT else signal.SIGTERM)
        if now > self._stop_by:
            for child in self._children:
                child.process.kill()

    def _kill_if_stalled(self, worker: Child) -> None:
        """Kill a worker that is overdue; its stacks are kept where it answers."""
        pid = worker.process.pid
        ranks = heartbeat.read_heartbeats(self._heartbeats)
        last = [rank for rank in ranks if (rank.rank, rank.pid) == (worker.slot, pid)]
        if not last:  # it imports torch before its first heartbeat
            waited_s = time.monotonic() - worker.began
            if waited_s > supervise.TIMES_UNKNOWN * self.stall_s:
                worker.stalled = f"sent no heartbeat within {waited_s:.0f} s"
        elif supervise.find_stalled(last, self.stall_s):
            described = supervise.describe(last[0])  # first: asking for its stacks makes a stopped one continue
            stacks = supervise.dump_stacks(self._heartbeats, last, self.sweep.out / "stacks")
            where = f", stacks in {stacks[0]}" if stacks else ""
            worker.stalled = f"made no progress ({described}){where}"
        if worker.stalled:
            supervise.kill([pid])
