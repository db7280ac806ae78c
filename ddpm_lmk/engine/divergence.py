"""Which updates are left out, and when a run is beyond help (failures.md, C1 and C2).

An update is left out where loss or gradient is not finite, or where one of them is a spike: above mean + sigma
standard deviations of the last accepted steps. More than 5 in a row, or more than 1 % of the last 1000 steps not
finite, and the loop goes back to the last checkpoint, once. All of it is a function of the numbers of past steps and
goes into checkpoints, so a continued run decides as one that was never stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ddpm_lmk.config import SpikeConfig

MOST_IN_A_ROW = 5
RECENT_STEPS = 1000
MOST_OF_RECENT = 10  # 1 %

NOT_FINITE, SPIKE, OVERFLOW = "not finite", "spike", "fp16 overflow"


@dataclass
class Health:
    """What a run remembers of its losses and gradient norms.

    Attributes:
        skipped, in_a_row: updates left out, in all and since the last one taken; overflows of fp16 count in the first.
        bad_steps: the recent steps that were not finite.
        losses, norms: of the last accepted steps, as many as the spike rule looks at.
        left_out: for every return to a checkpoint, its step and the step it happened at: [from, to].
    """

    spikes: SpikeConfig | None
    skipped: int = 0
    in_a_row: int = 0
    bad_steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)

    def judge(self, step: int, *, loss: float, norm: float, is_scaled: bool = False) -> str | None:
        """Take note of the numbers of `step` (1 is the first); the reason to leave its update out, or None.

        Args:
            is_scaled: the loss was scaled for fp16, where too large a scale is the first thing to think of.
        """
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if not is_finite and is_scaled:
            self.skipped += 1
            return OVERFLOW
        reason = NOT_FINITE if not is_finite else SPIKE if self._is_spike(step, loss, norm) else None
        if reason is None:
            self.in_a_row = 0
            self._remember(loss, norm)
            return None
        self.skipped += 1
        self.in_a_row += 1
        if reason == NOT_FINITE:
            self.bad_steps = [bad for bad in self.bad_steps if bad > step - RECENT_STEPS] + [step]
        return reason

    @property
    def trouble(self) -> str | None:
        """Why the run cannot go on like this, if it cannot."""
        if self.in_a_row > MOST_IN_A_ROW:
            return f"loss or gradient was not finite or a spike in {self.in_a_row} steps in a row"
        if len(self.bad_steps) > MOST_OF_RECENT:
            return f"loss or gradient was not finite in {len(self.bad_steps)} of the last {RECENT_STEPS} steps"
        return None

    def went_back(self, *, source: int, step: int) -> None:
        """Start anew at `step` with the memory of the checkpoint of step `source`; all updates between are left out."""
        self.left_out = [*self.left_out, [source, step]]
        self.skipped += step - source
        self.in_a_row, self.bad_steps = 0, []

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("skipped", "in_a_row", "bad_steps", "losses", "norms", "left_out")
        return {name: getattr(self, name) for name in names}

    def load(self, facts: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, value in facts.items():
            setattr(self, name, value)

    def _is_spike(self, step: int, loss: float, norm: float) -> bool:
        if self.spikes is None or step <= self.spikes.after or len(self.losses) < self.spikes.window:
            return False
        pairs = ((loss, self.losses), (norm, self.norms))
        return any(value > _limit(seen, self.spikes.sigma) for value, seen in pairs)

    def _remember(self, loss: float, norm: float) -> None:
        if self.spikes is not None:
            self.losses = [*self.losses, loss][-self.spikes.window :]
            self.norms = [*self.norms, norm][-self.spikes.window :]


def _limit(seen: list[float], sigma: float) -> float:
    mean = math.fsum(seen) / len(seen)
    return mean + sigma * math.sqrt(math.fsum((value - mean) ** 2 for value in seen) / len(seen))
