"""Workers of a sweep that stand still: seen by the signs they leave, as the ranks of a run are, and ended.

What limit holds for which sign is `launcher.watch`'s; a worker that has not left its first one is measured from its
start.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import TracebackType

from ddpm_lmk.launcher import supervise
from ddpm_lmk.system import heartbeat


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
        return {heartbeat.PULSE: str(self._pulse)}

    def end_if_stalled(self, slot: int, pid: int) -> str:
        """End the worker of a slot if it is overdue, keeping its stacks; what was seen of it, or nothing."""
        beats = [beat for beat in heartbeat.read_beats(self._pulse) if (beat.rank, beat.pid) == (slot, pid)]
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
