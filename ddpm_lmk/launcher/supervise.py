"""Supervision by heartbeats: which rank hangs, which is slow, why one was lost, and the stacks of its threads.

How the processes were started does not matter here: ranks of a launcher, workers of a sweep, or this process itself
(`supervised`). The limit for a heartbeat follows from the pace of its own phase: an evaluation is compared with itself,
not with steps.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Not only where it is needed: a disk that no longer answers is one of the things that are described.
import psutil  # type: ignore[import-untyped]

from ddpm_lmk.errors import StoppedError
from ddpm_lmk.rundir.lock import TEACHER
from ddpm_lmk.rundir.log import RunLog
from ddpm_lmk.system import files, heartbeat
from ddpm_lmk.system.heartbeat import DUMP_SIGNAL, STEPS_COMPARED, Heartbeat, Recorder
from ddpm_lmk.system.signals import print_status

TIMES_MEDIAN = 10  # of the usual interval without a heartbeat: the process hangs
FEW_INTERVALS = 3  # below, the pace of a phase is not known: joining the process group, a first evaluation
TIMES_UNKNOWN = 10  # of `stall_s`, where the pace is not known
TIMES_SETUP = 30  # of `stall_s`, for loading data
TIMES_NEXT_SETUP = 10  # the same, of a process that does many runs: it may have other data to load
OVERDUE = 0.9  # of the limit: the silence of a rank counts as that of another that is over it
STRAGGLER = 1.5  # times the median of all ranks
DUMP_S = 2.0  # for ranks to write their stacks
POLL_S = 0.5


class LaunchLog:
    """What a launcher reports: a line on standard error, and an event in the run's `events.jsonl`.

    Args:
        out: the run directory; None for processes that belong to no run.
    """

    def __init__(self, out: Path | None, *, node_rank: int) -> None:
        self._out, self._node_rank = out, node_rank

    def write(self, event: str, text: str, **facts: Any) -> None:
        """Print `text`, and log it with `facts` under the name `event`."""
        print_status(f"launcher: {text}")
        if self._out is not None:
            # Without a run file rank 0 has not taken the directory yet, and may still refuse what is in it.
            journal = RunLog(self._out, writes=(self._out / "config.yaml").is_file())
            journal.event(event, node=self._node_rank, message=text, **facts)

    def newest_step(self) -> int:
        """Step of the newest checkpoint, with those of teachers, the measure of progress; -1 where there is none."""
        newest, folder = -1, self._out
        while folder is not None and folder.is_dir():
            names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
            newest += 1 + max((int(name) for name in names if name.isdigit()), default=-1)
            folder /= TEACHER
        return newest

    @property
    def stacks(self) -> Path:
        """Folder for the stacks of ranks that hang."""
        return Path(os.devnull) if self._out is None else self._out / "stacks"


def limit_s(last: Heartbeat, stall_s: float) -> float:
    """Seconds after the heartbeat `last` within which the next one must come.

    One step is enough to know the pace of steps: it holds what every step takes, and what only the first one does.
    """
    is_setup = last.phase == "setup"
    if last.intervals < (1 if last.phase == "step" else FEW_INTERVALS):
        return (TIMES_SETUP if is_setup else TIMES_UNKNOWN) * stall_s
    return max((TIMES_NEXT_SETUP if is_setup else 1) * stall_s, TIMES_MEDIAN * last.interval_s)


def find_stalled(ranks: Sequence[Heartbeat], stall_s: float) -> list[Heartbeat]:
    """The ranks that are overdue, if any; one that hangs makes the others wait, so these may be all."""
    if all(last.age_s <= limit_s(last, stall_s) for last in ranks):
        return []
    # The one that hangs may have sent its last heartbeat a moment after those that wait for it.
    return [last for last in ranks if last.age_s > OVERDUE * limit_s(last, stall_s)]


def find_stragglers(ranks: Sequence[Heartbeat]) -> list[tuple[Heartbeat, float]]:
    """Ranks that make the others wait, with their share of the median: over 1.5 times as long in the last 100 steps."""
    if len(ranks) < 2 or any(last.busy_steps < STEPS_COMPARED for last in ranks):
        return []
    # The low median: of two ranks it is the faster one, else the slower of two could never stand out.
    middle = statistics.median_low([last.busy_s for last in ranks])
    return [(last, last.busy_s / middle) for last in ranks if middle > 0 and last.busy_s > STRAGGLER * middle]


def describe(last: Heartbeat) -> str:
    """What is known of a rank, in words."""
    states = {psutil.STATUS_STOPPED: ", stopped by a signal", psutil.STATUS_DISK_SLEEP: ", waiting for a device"}
    states[psutil.STATUS_TRACING_STOP] = ", held by a debugger"
    state, at = "", f"step {last.step}" if last.step >= 0 else last.phase
    with suppress(psutil.Error, OSError):  # it is gone, or the system does not say
        state = states.get(psutil.Process(last.pid).status(), "")
    return f"rank {last.rank} (process {last.pid}{state}) at {at}, {last.age_s:.0f} s ago"


def dump_stacks(folder: Path, ranks: Sequence[Heartbeat], target: Path) -> list[Path]:
    """Have all ranks write the stacks of their threads into `folder`; returns the copies made under `target`."""
    for last in ranks:
        _signal(last.pid, DUMP_SIGNAL)
        _signal(last.pid, signal.SIGCONT)  # one that was stopped writes nothing until it is let go
    limit = time.monotonic() + DUMP_S
    sources = [folder / f"stacks-{last.rank}" for last in ranks]
    while time.monotonic() < limit and not all(source.is_file() and source.stat().st_size for source in sources):
        time.sleep(0.05)
    copies = []
    for last, source in zip(ranks, sources):
        text = source.read_text() if source.is_file() else ""
        with suppress(OSError):  # a disk that refuses must not keep the rank alive
            path = _stack_file(target, last.rank)
            path.write_text(f"{describe(last)}\n{text or 'no stack: the process did not answer'}\n")
            path.chmod(files.file_mode())
            copies.append(path)
    return copies


def _stack_file(folder: Path, rank: int) -> Path:
    folder.mkdir(mode=files.folder_mode(), exist_ok=True)
    return folder / f"{time.strftime('%Y%m%dT%H%M%S')}-rank{rank}.txt"


def kill(pids: Sequence[int]) -> None:
    """End processes and everything in their groups at once."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _signal(pid, signal.SIGKILL)  # also one that leads no group


def remove_records(folder: Path) -> None:
    """Remove what ranks that are gone have written."""
    for path in folder.iterdir():
        if path.name.startswith(("rank-", "stacks-")):
            path.unlink(missing_ok=True)


def cause_of(code: int, *, oom_kills: int) -> str:
    """Why a process that exited with `code` is gone; `oom_kills` is how much their count has grown meanwhile."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    if code != -signal.SIGKILL:
        return f"was ended by {name}"
    if oom_kills > 0:
        return "was killed by the kernel for want of memory; use a smaller train.micro_batch or fewer runtime.workers"
    return f"was killed ({name}), not for want of memory as far as the kernel says"


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


@contextmanager
def supervised(out: Path, stall_s: float) -> Iterator[None]:
    """End this process, with its stacks written down, if it makes no progress within the block.

    For a run in one process, which has no launcher. It is not started again here: the exit code asks whoever gave the
    command to give it again. Code that never releases Python's lock cannot be caught, since a thread watches.
    """
    recorder, over = heartbeat.start_own_heartbeats(), threading.Event()
    log = LaunchLog(out, node_rank=0)
    thread = threading.Thread(target=_watch, args=(recorder, stall_s, log, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        heartbeat.stop_heartbeats()


def _watch(recorder: Recorder, stall_s: float, log: LaunchLog, over: threading.Event) -> None:
    previous, awake_s = recorder.last, 0.0
    # Time is counted while this thread is awake: a process that was stopped (Ctrl-Z) and goes on does not hang.
    while not over.wait(POLL_S):
        last = recorder.last
        awake_s, previous = awake_s + POLL_S if last is previous else 0.0, last
        if last is not None and awake_s > limit_s(last, stall_s):
            who = describe(last)  # before the stacks are written, which takes time
            where = _write_own_stacks(log.stacks)
            text = f"no progress: {who}; stacks in {where}; the same command continues from the last checkpoint"
            log.write("run.stalled", text, stacks=where)
            os._exit(StoppedError.exit_code)


def _write_own_stacks(folder: Path) -> str:
    """Write down what all threads of this process do; returns where that is."""
    with suppress(OSError):
        path = _stack_file(folder, 0)
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        path.chmod(files.file_mode())
        return str(path)
    return "no place (the disk refuses)"
