"""Heartbeats: a process tells the launcher that started it that it lives.

A rank writes a short record over itself at every sign of progress (a step, a batch of an evaluation). The launcher
reads the records; a rank that has stopped writing hangs. Times are of the monotonic clock, which all processes of a
machine share and which nobody sets back. Without a launcher nothing is written, and the process looks after itself
(`launcher.alone`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import struct
import time
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

PULSE = "DDPM_LMK_PULSE"  # environment: folder of the records
DUMP_SIGNAL = signal.SIGUSR2  # makes a rank write the stacks of its threads, even when it hangs in C
RECORD = struct.Struct("<16sqqdddqq")
INTERVALS = 64  # after signs of one phase, for their median
REACHES = 100  # steps over which ranks are compared


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank."""

    rank: int
    pid: int
    phase: str  # start, setup, train (the loop begins), step, compile, evaluate, save, write, score or sample
    step: int
    at: float  # monotonic seconds
    interval_s: float  # median time from a sign of this phase to the next sign
    count: int  # of such times seen, at most 64
    reach_s: float  # median time from the start of a step to where it waits for the others
    reaches: int  # steps in that median, at most 100

    @property
    def age_s(self) -> float:
        """Seconds since this sign."""
        return time.monotonic() - self.at


class Pulse:
    """Keeps the last sign of this rank, as a record in `folder` where there is one.

    Attributes:
        last: the last sign.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.last: Beat | None = None
        self._rank = rank
        self._intervals: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=INTERVALS))
        self._reaches: deque[float] = deque(maxlen=REACHES)
        self._file: int | None = None
        if folder is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(folder / f"rank-{rank}", flags, 0o600)
            self._stacks = (folder / f"stacks-{rank}").open("w")
            faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)

    def close(self) -> None:
        """Write no more signs and no stacks."""
        if self._file is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            self._stacks.close()
            os.close(self._file)

    def beat(self, phase: str, step: int, reach_s: float | None) -> None:
        """Give one sign."""
        now = time.monotonic()
        if self.last is not None:
            self._intervals[self.last.phase].append(now - self.last.at)
            if (self.last.phase, phase) == ("train", "step"):  # the first step, from its beginning
                self._intervals["step"] = deque([now - self.last.at], maxlen=INTERVALS)
        intervals = self._intervals[phase]
        if reach_s is not None:
            self._reaches.append(reach_s)
        middle, reach = (statistics.median(values) if values else 0.0 for values in (intervals, self._reaches))
        counts = {"count": len(intervals), "reaches": len(self._reaches)}
        beat = Beat(self._rank, os.getpid(), phase, step, now, interval_s=middle, reach_s=reach, **counts)
        if self._file is not None:
            os.pwrite(self._file, _packed(beat), 0)
        self.last = beat


def _packed(beat: Beat) -> bytes:
    at = (beat.pid, beat.step, beat.at, beat.interval_s, beat.reach_s, beat.count, beat.reaches)
    record = RECORD.pack(beat.phase.encode(), *at)
    return record + struct.pack("<L", zlib.crc32(record))


_pulse: Pulse | None = None


def start_pulse(rank: int) -> None:
    """Begin to give signs where a launcher asks for them."""
    global _pulse
    folder = os.environ.get(PULSE)
    if folder:
        _pulse = Pulse(Path(folder), rank)
        beat("start")


def start_own_pulse() -> Pulse:
    """Begin to give signs to this process itself."""
    global _pulse
    _pulse = Pulse(None, 0)
    return _pulse


def stop_pulse() -> None:
    """Write no more of them."""
    global _pulse
    if _pulse is not None:
        _pulse.close()
    _pulse = None


def beat(phase: str, *, step: int = -1, reach_s: float | None = None) -> None:
    """A sign of progress.

    Args:
        phase: what is going on; only signs of one phase are compared with one another.
        reach_s: of a finished step, the seconds until this rank began to wait for the others.
    """
    if _pulse is not None:
        _pulse.beat(phase, step, reach_s)


def read_beats(folder: Path) -> list[Beat]:
    """The last sign of every rank, in rank order; one that is being written is left out."""
    beats = []
    for path in folder.glob("rank-*"):
        content = path.read_bytes()
        record = content[: RECORD.size]
        if len(content) != RECORD.size + 4 or struct.pack("<L", zlib.crc32(record)) != content[RECORD.size :]:
            continue
        phase, pid, step, at, interval_s, reach_s, count, reaches = RECORD.unpack(record)
        name = phase.rstrip(b"\0").decode()
        rank = int(path.name.removeprefix("rank-"))
        beats.append(Beat(rank, pid, name, step, at, interval_s, count, reach_s, reaches))
    return sorted(beats, key=lambda sign: sign.rank)
