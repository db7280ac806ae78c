"""Looking after ranks: who makes no progress, who is slow, why one was lost, and what its threads were at.

It reads the signs that ranks leave (`lifeline`) and does not know how they were started. The limit for a sign follows
from the pace of its own phase: an evaluation is compared with itself, not with steps.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ddpm_lmk.system.heartbeat import DUMP_SIGNAL, REACHES, Beat
from ddpm_lmk.system.processes import state_of

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
        return "was killed by the kernel for want of memory; use a smaller train.micro_batch or fewer data.workers"
    return f"was killed ({name}), not for want of memory as far as the kernel says"


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
