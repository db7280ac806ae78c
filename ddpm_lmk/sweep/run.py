"""Runs a sweep: its stages, then N warm workers that pull cells, a view of their progress, and the summary files.

OUT/cells/CELL/ is the run directory of a cell, beside it CELL.lock and, after a failure, CELL.error.json;
OUT/sweep.json lists the cells and how they stand, OUT/results.csv their scores, OUT/logs/ what the workers said. The
two summaries are written anew, whole, whenever a cell ends. A worker that shows no sign of progress is ended, and a
cell that has lost its worker is tried once more by a new one. Exit code: 0 all cells are done, 1 some failed (the
others are done), 75 stopped, or taken by another sweep in the same folder. The same command continues: finished cells
are never run again.

Workers of a sweep that stand still: seen by the signs they leave, as the ranks of a run are, and ended.

What limit holds for which sign is `launcher.watch`'s; a worker that has not left its first one is measured from its
start.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from ddpm_lmk.errors import ConfigError, StoppedError
from ddpm_lmk.launcher import supervise
from ddpm_lmk.launcher.placement import STALL_S, Device, Placement, worker_environment
from ddpm_lmk.sweep.check import check_sweep, needed
from ddpm_lmk.sweep.expand import Cell, Sweep, cell_folder, is_done
from ddpm_lmk.sweep.pretrain import Stages
from ddpm_lmk.sweep.progress import Remaining, SweepView, stage_key, write_summary
from ddpm_lmk.system import files, heartbeat
from ddpm_lmk.system.console import Whole
from ddpm_lmk.system.signals import MARGIN_S, InterruptedRunError, StopRequest, exit_code_of, grace_s


class Vigil:
    """Looks after the workers of one sweep while a `with` block lasts.

    Args:
        stacks: folder for the stacks of workers that are ended.
        stall_s: see `launcher.LaunchFile`.
    """

    def __init__(self, stacks: Path, stall_s: float) -> None:
        self._stacks, self._stall_s = stacks, stall_s
        self._since: dict[int, float] = {}

    def __enter__(self) -> Vigil:
        self._room = tempfile.TemporaryDirectory(prefix="ddpm-lmk-")
        self._pulse = Path(self._room.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._room.cleanup()

    def expect(self, slot: int) -> dict[str, str]:
        """A new worker is about to be started in this slot; returns what its environment needs."""
        (self._pulse / f"rank-{slot}").unlink(missing_ok=True)
        self._since[slot] = time.monotonic()
        return {heartbeat.FOLDER: str(self._pulse)}

    def end_if_stalled(self, slot: int, pid: int) -> str:
        """End the worker of a slot if it is overdue, keeping its stacks; what was seen of it, or nothing."""
        beats = [beat for beat in heartbeat.read_heartbeats(self._pulse) if (beat.rank, beat.pid) == (slot, pid)]
        if not beats:
            waited_s = time.monotonic() - self._since[slot]
            if waited_s <= supervise.TIMES_UNKNOWN * self._stall_s:
                return ""
            supervise.kill([pid])
            return f"gave no sign of life within {waited_s:.0f} s"
        if not supervise.find_stalled(beats, self._stall_s):
            return ""
        seen = f"made no progress ({supervise.describe(beats[0])})"
        kept = supervise.dump_stacks(self._pulse, beats, self._stacks)
        supervise.kill([pid])
        return f"{seen}, stacks in {kept[0]}" if kept else seen


SOME_FAILED = 1
POLL_S = 0.5
TRIES = 2  # a cell that has lost so many workers has failed
MAX_LOST_WORKERS = 3 * TRIES  # per worker slot


@dataclass
class Worker:
    """A child process, the cell it is working on, and how often its slot was filled again."""

    slot: int
    process: subprocess.Popen[str]
    cell: str | None = None
    restarts: int = 0
    stalled: str = ""  # what was seen of it when it was ended for want of progress


@dataclass
class SweepRun:
    """What the running sweep knows."""

    sweep: Sweep
    out: Path
    device: Device
    processes: int
    vigil: Vigil
    per_device: int = 1
    session: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    events: queue.Queue[tuple[Worker, dict[str, Any]]] = field(default_factory=queue.Queue)
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)  # workers, by the cell they were at
    asked: int = 0  # the signal that asked for a stop

    def ask(self, number: int) -> None:
        """A signal asks for a stop."""
        self.asked = number


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    processes: int = 1,
    per_device: int = 1,
    device: Device = "cpu",
    console: Console | None = None,
    stall_s: float = STALL_S,
    seconds: Mapping[str, float] | None = None,
    whole: Whole | None = None,
) -> int:
    """Run every cell of `sweep` that is not done in `out`; returns the exit code (see the module).

    Args:
        processes: GPUs, or processes on the CPU.
        per_device: workers that share one of these (`probe` finds out how many pay).
        stall_s: seconds without a sign of progress after which a worker is ended, where its usual pace is no slower.
        seconds: what runs are expected to take, by name (see `remaining`).
        whole: what this sweep is a stage of.

    Raises:
        ConfigError: `processes` is not positive. LmkError: as `check_sweep`.
    """
    if processes < 1:
        raise ConfigError(f"a sweep needs at least 1 process, found {processes}")
    remarks = check_sweep(sweep, Path(out), Placement(device, processes))
    run = SweepRun(sweep, Path(out), device, processes, Vigil(Path(out) / "stacks", stall_s), per_device)
    (run.out / "cells").mkdir(parents=True, exist_ok=True)
    _see_done(run)
    left = Remaining(
        sweep,
        seconds or {},
        workers=processes * per_device,
        stages_at_once=processes if device == "cpu" else 1,
    )
    for name in run.done:
        left.skip(name)
    view = SweepView(sweep, run.out, console or Console(stderr=True), done=len(run.done), left=left, whole=whole)
    write_summary(run.sweep, run.out, done=run.done, failed=run.failed)
    for remark in remarks:
        view.say(remark)
    if _pending(run):
        # The first signal lets workers save and end; a second one ends them and this process.
        with StopRequest(on_first=run.ask, within_s=grace_s(), raises=False), view, run.vigil:
            _pre_train(run, view)
            if _pending(run) and not run.asked:
                _supervise(run, view)
    _see_done(run)  # another sweep in this folder may have finished some
    write_summary(run.sweep, run.out, done=run.done, failed=run.failed)
    view.summary(len(run.done), run.failed)
    if run.asked:
        return exit_code_of(run.asked)
    if run.failed:
        return SOME_FAILED
    return StoppedError.exit_code if _pending(run) else 0


def _see_done(run: SweepRun) -> None:
    """Look into the folder for cells that are done, whoever did them."""
    run.done |= {cell.name for cell in run.sweep.cells if is_done(cell_folder(run.out, cell.name), cell)}
    for name in run.done & run.failed.keys():
        del run.failed[name]


def _pending(run: SweepRun) -> list[Cell]:
    """Cells to run; those that another sweep has finished meanwhile included, a worker skips them."""
    return [cell for cell in run.sweep.cells if cell.name not in run.failed and cell.name not in run.done]


def _pre_train(run: SweepRun, view: SweepView) -> None:
    """Run the stages that pending cells start from; the cells of one that fails fail with it."""
    wanted = needed(run.sweep.stages, _pending(run))
    for stage in run.sweep.stages:
        if stage not in wanted or is_done(stage.folder, stage):
            view.left.skip(stage_key(stage))
    stages = Stages(run.out, processes=run.processes, device=run.device, view=view)
    stages.run(wanted, lambda: run.asked)
    for stage in wanted:
        if stage.name in stages.failed:
            cells = [cell for cell in _pending(run) if Path(cell.cfg.init.weights or "").is_relative_to(stage.folder)]
            run.failed |= {cell.name: stages.failed[stage.name] for cell in cells}
            for cell in cells:
                view.left.skip(cell.name)


def _supervise(run: SweepRun, view: SweepView) -> None:
    """Start the workers and follow them until the last has gone."""
    count = min(run.processes * run.per_device, len(_pending(run)))
    workers = [_start(run, slot, count) for slot in range(count)]
    told_to_stop = 0.0
    while workers:
        for worker in workers:
            worker.stalled = worker.stalled or run.vigil.end_if_stalled(worker.slot, worker.process.pid)
        if run.asked and not told_to_stop:
            told_to_stop = time.monotonic()
            for worker in workers:
                worker.process.send_signal(signal.SIGINT if run.asked == signal.SIGINT else signal.SIGTERM)
        if told_to_stop and time.monotonic() - told_to_stop > grace_s() - MARGIN_S / 2:
            for worker in workers:
                worker.process.kill()
        try:
            worker, event = run.events.get(timeout=POLL_S)
        except queue.Empty:
            view.refresh()
            continue
        if event["event"] == "exit":
            workers.remove(worker)
            workers += _replace(run, view, worker, event["code"], count)
        else:
            _note(run, view, worker, event)


def _note(run: SweepRun, view: SweepView, worker: Worker, event: dict[str, Any]) -> None:
    worker.cell = event["cell"] if event["event"] == "start" else None
    if event["event"] == "failed":
        run.failed[event["cell"]] = event["error"]
    elif event["event"] == "done":
        if event["cell"] in run.done:
            return  # this worker has only met what another one did
        run.done.add(event["cell"])
    view.note(event)
    if event["event"] != "start":
        write_summary(run.sweep, run.out, done=run.done, failed=run.failed)


def _replace(run: SweepRun, view: SweepView, worker: Worker, code: int, count: int) -> list[Worker]:
    """What follows a worker that has gone: nothing, or its successor when it was lost in the middle of its work."""
    if code in (0, StoppedError.exit_code, InterruptedRunError.exit_code) or run.asked:
        return []
    can_follow = worker.restarts < MAX_LOST_WORKERS
    how = worker.stalled or f"died with exit code {code}"
    if worker.cell is not None:
        _lose(run, view, worker, f"its worker {how}; see {log_file(run, worker.slot)}", code, can_follow=can_follow)
    elif worker.restarts == 0:
        view.say(f"worker {worker.slot} {how} before its first cell; see {log_file(run, worker.slot)}")
    if not can_follow or not _pending(run):
        return []
    return [_start(run, worker.slot, count, restarts=worker.restarts + 1)]


def _lose(run: SweepRun, view: SweepView, worker: Worker, reason: str, code: int, *, can_follow: bool) -> None:
    """A cell whose worker is lost is tried by the next one, or has failed."""
    assert worker.cell is not None
    run.lost[worker.cell] += 1
    if can_follow and run.lost[worker.cell] < TRIES:
        _note(run, view, worker, {"event": "lost", "cell": worker.cell, "error": reason})
        return
    failure = {"session": run.session, "error": reason, "type": "WorkerLost", "exit_code": code}
    files.write_json(run.out / "cells" / f"{worker.cell}.error.json", failure)
    _note(run, view, worker, {"event": "failed", "cell": worker.cell, "error": reason})


def _start(run: SweepRun, slot: int, count: int, *, restarts: int = 0) -> Worker:
    """Start a worker on everything that is pending; which cells it gets is decided by their locks."""
    path = log_file(run, slot)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ddpm_lmk.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=worker_environment(run.device, slot, count, devices=run.processes) | run.vigil.expect(slot),
            start_new_session=True,  # Ctrl-C reaches the parent only, which then stops the workers cleanly
        )
    worker = Worker(slot, process, restarts=restarts)
    cells = [{**asdict(cell), "cfg": cell.cfg.model_dump(mode="json")} for cell in _pending(run)]
    job = {"out": str(run.out), "device": run.device, "session": run.session, "parent": os.getpid(), "cells": cells}
    job["slot"] = slot
    threading.Thread(target=_listen, args=(run, worker, json.dumps(job)), daemon=True).start()
    return worker


def _listen(run: SweepRun, worker: Worker, job: str) -> None:
    """Hand the job over, then pass the worker's events on until it ends."""
    assert worker.process.stdin is not None
    assert worker.process.stdout is not None
    try:
        with worker.process.stdin as stdin:
            stdin.write(job)
    except BrokenPipeError:
        pass  # it died before reading; the exit code below says so
    with worker.process.stdout as stdout:
        for line in stdout:
            run.events.put((worker, json.loads(line)))
    run.events.put((worker, {"event": "exit", "code": worker.process.wait()}))


def log_file(run: SweepRun, slot: int) -> Path:
    """Where the worker of a slot writes what it has to say."""
    return run.out / "logs" / f"worker-{slot}.log"
