"""Looking after ranks: who makes no progress, who is slow, why one was lost, and what its threads were at.

It reads the signs that ranks leave (`lifeline`) and does not know how they were started. The limit for a sign follows
from the pace of its own phase: an evaluation is compared with itself, not with steps.

A run in this very process, without an agent: looked after by a thread of its own.

The thread sees the signs that ranks leave (`lifeline`) and ends the process when the next one is overdue, after it has
written down what all threads were at. It counts the seconds in which it was awake itself, so that a process that was
stopped (Ctrl-Z) and goes on is not taken for one that hangs. What holds Python's lock for ever, it cannot see. Nothing
is started again here: the exit code asks whoever gave the command to give it again.

What a launcher says about a run: a line on standard error, and one in the run's `events.jsonl`.
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

from ddpm_lmk.errors import StoppedError
from ddpm_lmk.rundir.log import Journal
from ddpm_lmk.system import files as privacy
from ddpm_lmk.system import heartbeat
from ddpm_lmk.system.heartbeat import DUMP_SIGNAL, REACHES, Beat, Pulse
from ddpm_lmk.system.processes import state_of
from ddpm_lmk.system.signals import say


class Notes:
    """Writes beside a run, where there is one.

    Args:
        out: the run directory; None for processes that belong to no run.
    """

    def __init__(self, out: Path | None, *, node_rank: int) -> None:
        self._out, self._node_rank = out, node_rank

    def note(self, event: str, text: str, **facts: Any) -> None:
        """Say `text`, and keep it with `facts` under the name `event`."""
        say(f"launcher: {text}")
        if self._out is not None:
            journal = Journal(self._out, writes=(self._out / "config.yaml").is_file())
            journal.event(event, node=self._node_rank, message=text, **facts)

    def newest_step(self) -> int:
        """Step of the newest checkpoint, the measure of progress; -1 where there is none."""
        if self._out is None:
            return -1
        names = [path.name.removeprefix("step-") for path in (self._out / "checkpoints").glob("step-*")]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    @property
    def stacks(self) -> Path:
        """Where stacks of stalled ranks are kept."""
        return Path(os.devnull) if self._out is None else self._out / "stacks"


TIMES_MEDIAN = 10  # of the usual interval without a sign: it hangs
FEW_INTERVALS = 3  # below, the pace of a phase is not known: joining the group, a first evaluation
TIMES_UNKNOWN = 10
TIMES_SETUP = 30  # loading data
TIMES_NEXT_SETUP = 10  # of a process that does many runs: it may have other data to load
STRAGGLER = 1.5  # times the median of all ranks
DUMP_S = 2.0


def limit_s(beat: Beat, stall_s: float) -> float:
    """Seconds after `beat` within which the next one must come.

    One step is enough to know the pace of steps: it holds what every step takes, and what only the first one does.
    """
    is_setup = beat.phase == "setup"
    if beat.count < (1 if beat.phase == "step" else FEW_INTERVALS):
        return (TIMES_SETUP if is_setup else TIMES_UNKNOWN) * stall_s
    return max((TIMES_NEXT_SETUP if is_setup else 1) * stall_s, TIMES_MEDIAN * beat.interval_s)


def find_stalled(beats: Sequence[Beat], stall_s: float) -> list[Beat]:
    """The ranks that are overdue; one that hangs makes the others wait, so these may be all."""
    return [beat for beat in beats if beat.age_s > limit_s(beat, stall_s)]


def find_stragglers(beats: Sequence[Beat]) -> list[tuple[Beat, float]]:
    """Ranks that let the others wait, with their share of the median: over 1.5 times as long in the last 100 steps."""
    if len(beats) < 2 or any(beat.reaches < REACHES for beat in beats):
        return []
    middle = statistics.median_low([beat.reach_s for beat in beats])
    return [(beat, beat.reach_s / middle) for beat in beats if middle > 0 and beat.reach_s > STRAGGLER * middle]


def describe(beat: Beat) -> str:
    """What is known of a rank, in words."""
    state = {"T": ", stopped by a signal", "t": ", held by a debugger", "D": ", waiting for a device"}
    at = f"step {beat.step}" if beat.step >= 0 else beat.phase
    found = state.get(state_of(beat.pid), "")
    return f"rank {beat.rank} (process {beat.pid}{found}) at {at}, {beat.age_s:.0f} s ago"


def dump_stacks(folder: Path, beats: Sequence[Beat], target: Path) -> list[Path]:
    """Have all ranks write the stacks of their threads, and keep them as files under `target`."""
    for beat in beats:
        _signal(beat.pid, DUMP_SIGNAL)
        _signal(beat.pid, signal.SIGCONT)  # one that was stopped writes nothing until it is let go
    limit = time.monotonic() + DUMP_S
    files = [folder / f"stacks-{beat.rank}" for beat in beats]
    while time.monotonic() < limit and not all(file.is_file() and file.stat().st_size for file in files):
        time.sleep(0.05)
    kept = []
    for beat, file in zip(beats, files):
        text = file.read_text() if file.is_file() else ""
        with suppress(OSError):
            target.mkdir(exist_ok=True)
            path = target / f"{int(time.time())}-rank{beat.rank}.txt"
            path.write_text(f"{describe(beat)}\n{text or 'no stack: the process did not answer'}\n")
            path.chmod(0o600)
            kept.append(path)
    return kept


def kill(pids: Sequence[int]) -> None:
    """End processes and everything in their groups at once."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _signal(pid, signal.SIGKILL)


def forget(folder: Path) -> None:
    """Remove the signs of ranks that are gone."""
    for path in folder.iterdir():
        if path.name.startswith(("rank-", "stacks-")):
            path.unlink(missing_ok=True)


def cause_of(code: int, *, oom_kills: int) -> str:
    """Why a process that exited with `code` is gone, in words; `oom_kills` is how much their count has grown."""
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


POLL_S = 0.5


@contextmanager
def looked_after(out: Path, stall_s: float) -> Iterator[None]:
    """End this process if it makes no progress within the block (see `watch.limit_s`)."""
    pulse, over = heartbeat.start_own_pulse(), threading.Event()
    thread = threading.Thread(target=_look, args=(pulse, stall_s, Notes(out, node_rank=0), over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        heartbeat.stop_pulse()


def _look(pulse: Pulse, stall_s: float, notes: Notes, over: threading.Event) -> None:
    """In the thread."""
    seen, awake_s = pulse.last, 0.0
    while not over.wait(POLL_S):
        beat = pulse.last
        awake_s, seen = awake_s + POLL_S if beat is seen else 0.0, beat
        if beat is not None and awake_s > limit_s(beat, stall_s):
            _leave(beat, notes)
            os._exit(StoppedError.exit_code)


def _leave(beat: Beat, notes: Notes) -> None:
    where = _keep_stacks(notes.stacks)
    described = describe(beat)
    text = f"no progress: {described}; stacks in {where}; the same command continues from the last checkpoint"
    notes.note("run.stalled", text, stacks=where)


def _keep_stacks(folder: Path) -> str:
    """Write down what all threads are at; returns where that is."""
    with suppress(OSError):
        folder.mkdir(mode=privacy.folder_mode(), exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-rank0.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        path.chmod(privacy.file_mode())
        return str(path)
    return "no place (the disk refuses)"
