"""A run in this very process, without an agent: looked after by a thread of its own.

The thread sees the signs that ranks leave (`lifeline`) and ends the process when the next one is overdue, after it has
written down what all threads were at. It counts the seconds in which it was awake itself, so that a process that was
stopped (Ctrl-Z) and goes on is not taken for one that hangs. What holds Python's lock for ever, it cannot see. Nothing
is started again here: the exit code asks whoever gave the command to give it again.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpm_lmk.errors import StoppedError
from ddpm_lmk.launcher import supervise
from ddpm_lmk.launcher.notes import Notes
from ddpm_lmk.system import heartbeat, privacy
from ddpm_lmk.system.heartbeat import Beat, Pulse

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
        if beat is not None and awake_s > supervise.limit_s(beat, stall_s):
            _leave(beat, notes)
            os._exit(StoppedError.exit_code)


def _leave(beat: Beat, notes: Notes) -> None:
    where = _keep_stacks(notes.stacks)
    described = supervise.describe(beat)
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
