"""What a launcher says about a run: a line on standard error, and one in the run's `events.jsonl`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ddpm_lmk.rundir.log import Journal
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
