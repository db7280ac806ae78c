"""Heartbeats: a process shows whoever supervises it that it makes progress.

A rank or worker overwrites one short record at every step and every batch of an evaluation; its launcher reads the
records, and a process that has stopped writing hangs (`launcher.supervise`). A run in one process supervises itself and
needs no file. Times are of the monotonic clock, which all processes of a machine share and which nobody sets back.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import statistics
import time
import zlib
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "DDPM_LMK_HEARTBEATS"  # environment variable: where ranks write their records
DUMP_SIGNAL = signal.SIGUSR2  # makes a rank write the stacks of its threads, even when it hangs in C
RECORD_BYTES = 512  # every record is padded to this, so that a shorter one leaves nothing of the one before
INTERVALS = 64  # of each phase, for their median
STEPS_COMPARED = 100  # a rank is slow only if it was slow for so many steps


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank."""

    rank: int
    pid: int
    phase: str  # start, setup, train (the loop begins), step, compile, evaluate, save, write, score or sample
    step: int  # -1 outside of steps
    at: float  # monotonic seconds
    interval_s: float  # median time from a heartbeat of this phase to the next one
    intervals: int  # in that median, at most 64
    busy_s: float  # median time from the start of a step to where the rank waits for the others
    busy_steps: int  # in that median, at most 100

    @property
    def age_s(self) -> float:
        """Seconds since this heartbeat."""
        return time.monotonic() - self.at


class Recorder:
    """Keeps the last heartbeat of this process, also as a file in `folder` where there is one.

    Attributes:
        last: the last heartbeat.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.last: Heartbeat | None = None
        self._rank = rank
        self._intervals: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=INTERVALS))
        self._busy: deque[float] = deque(maxlen=STEPS_COMPARED)
        self._file: int | None = None
        if folder is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(folder / f"rank-{rank}", flags, 0o600)
            self._stacks = (folder / f"stacks-{rank}").open("w")
            faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)

    def close(self) -> None:
        """Write no more heartbeats and no stacks."""
        if self._file is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            self._stacks.close()
            os.close(self._file)

    def beat(self, phase: str, step: int, busy_s: float | None) -> None:
        """Record one heartbeat."""
        now = time.monotonic()
        if self.last is not None:
            self._intervals[self.last.phase].append(now - self.last.at)
            if (self.last.phase, phase) == ("train", "step"):
                # The first step of a run, which compiles and fills caches, sets the pace alone: of a process that does
                # many runs the steps before are another network's.
                self._intervals["step"] = deque([now - self.last.at], maxlen=INTERVALS)
        if busy_s is not None:
            self._busy.append(busy_s)
        intervals = self._intervals[phase]
        self.last = Heartbeat(
            self._rank,
            os.getpid(),
            phase,
            step,
            at=now,
            interval_s=statistics.median(intervals) if intervals else 0.0,
            intervals=len(intervals),
            busy_s=statistics.median(self._busy) if self._busy else 0.0,
            busy_steps=len(self._busy),
        )
        if self._file is not None:
            os.pwrite(self._file, _encode(self.last), 0)  # in place: a rename per step would cost more


def _encode(heartbeat: Heartbeat) -> bytes:
    text = json.dumps(asdict(heartbeat)).encode("ascii")
    return (b"%08x " % zlib.crc32(text) + text).ljust(RECORD_BYTES)


_recorder: Recorder | None = None


def start_heartbeats(rank: int) -> None:
    """Begin to write heartbeats where a launcher asks for them."""
    global _recorder
    if folder := os.environ.get(FOLDER):
        _recorder = Recorder(Path(folder), rank)
        beat("start")


def start_own_heartbeats() -> Recorder:
    """Begin to keep heartbeats in this process, for a thread of its own."""
    global _recorder
    _recorder = Recorder(None, 0)
    return _recorder


def stop_heartbeats() -> None:
    """Neither write nor keep any more of them."""
    global _recorder
    if _recorder is not None:
        _recorder.close()
    _recorder = None


def beat(phase: str, *, step: int = -1, busy_s: float | None = None) -> None:
    """Send a heartbeat, where somebody supervises this process.

    Args:
        phase: what is being done; only heartbeats of one phase are compared with one another.
        busy_s: of a finished step, the seconds until this rank began to wait for the others.
    """
    if _recorder is not None:
        _recorder.beat(phase, step, busy_s)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last heartbeat of every rank, in rank order; one that is being overwritten is left out."""
    found = []
    for path in folder.glob("rank-*"):
        checksum, _, text = path.read_bytes().partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text.rstrip()):
            found.append(Heartbeat(**json.loads(text)))
    return sorted(found, key=lambda heartbeat: heartbeat.rank)
