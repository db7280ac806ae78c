"""Calls timed in turn, and a ratio with bounds, or the reason why there is none.

Calls take turns, so that whatever else a machine does hits all of them alike. Three clocks are read: `wall_s` is what a
user waits; `cpu_s` is processor time of this process with all its threads, which on a shared CPU hardly depends on what
else runs; `device_s`, on CUDA, is the time between two events in the stream.

Bounds are by rank, so they assume nothing about the noise but that rounds are alike. Paired values (calls that took
turns) give a ratio a round: their median, bounded by the sign test. Values of two runs that know nothing of each other
give all their pairs: Hodges-Lehmann median, bounded by the rank-sum test. Noise that comes in waves fools both, so a
ratio has to be beyond what each half of the rounds says by itself, beyond how far the halves of a run are apart, and,
between two runs on one kind of machine, beyond what these disagree about a piece of work that is always the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

CONFIDENCE = 0.95
FEWEST_PAIRS = 6  # the smallest number whose extremes bound a median with 95 %
FEWEST_VALUES = 5
Z = 1.959964  # of the normal distribution, two-sided


@dataclass(frozen=True)
class Comparison:
    """A ratio of two samples with its bounds.

    Attributes:
        ratio: None where the noise supports none; `reason` says why.
        low: lower bound, None where there are too few values.
    """

    ratio: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @property
    def is_distinguishable(self) -> bool:
        """Do the bounds leave out 1?"""
        return self.ratio is not None

    def __str__(self) -> str:
        return self.reason if self.ratio is None else f"{self.ratio:.3f} x ({self.low:.3f} to {self.high:.3f})"

    def facts(self) -> dict[str, float | str | None]:
        """What a result file keeps."""
        return {"ratio": self.ratio, "ratio_low": self.low, "ratio_high": self.high, "reason": self.reason}


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """`first` over `second`, two calls that took turns: value i of both is from round i."""
    assert len(first) == len(second), "paired values come in pairs"
    count = len(first)
    if count < FEWEST_PAIRS:
        return _too_few(count, FEWEST_PAIRS)
    ratios = [a / b for a, b in zip(first, second)]
    # order statistics that leave at most 2.5 % of a fair coin's tosses outside at either end
    tails = [sum(math.comb(count, k) for k in range(end + 1)) / 2**count for end in range(count // 2)]
    skipped = max(end for end, tail in enumerate(tails) if tail <= (1 - CONFIDENCE) / 2)
    ordered = sorted(ratios)
    # load that comes in waves moves a half of the rounds as a whole
    halves = [median(ratios[: count // 2]), median(ratios[count // 2 :])]
    return _decide(median(ratios), min(ordered[skipped], *halves), max(ordered[-1 - skipped], *halves))


def compare_samples(first: Sequence[float], second: Sequence[float], *, anchor: float = 1.0) -> Comparison:
    """`first` over `second`, values of two runs.

    Args:
        anchor: the same ratio of the piece of work that is always the same; 1 where the machines differ, since then
            it is what is compared.
    """
    n, m = len(first), len(second)
    if min(n, m) < FEWEST_VALUES:
        return _too_few(min(n, m), FEWEST_VALUES)
    ratios = sorted(a / b for a in first for b in second)
    # normal approximation of the rank-sum statistic: mean nm/2, variance nm(n + m + 1)/12
    skipped = max(0, math.floor(n * m / 2 - Z * math.sqrt(n * m * (n + m + 1) / 12)))
    middle = median(ratios)
    waves = math.exp(max(_wave(first), _wave(second), abs(math.log(anchor))))
    return _decide(middle, min(ratios[skipped], middle / waves), max(ratios[-1 - skipped], middle * waves))


def _wave(values: Sequence[float]) -> float:
    """How far the halves of a run are apart, as a logarithm."""
    half = len(values) // 2
    return abs(math.log(median(values[:half]) / median(values[half:])))


def _too_few(count: int, wanted: int) -> Comparison:
    return Comparison(None, None, None, f"too few measurements: {count}, wanted {wanted}")


def _decide(ratio: float, low: float, high: float) -> Comparison:
    if low <= 1 <= high:
        return Comparison(None, low, high, f"not distinguishable ({low:.3f} to {high:.3f})")
    return Comparison(ratio, low, high)


@dataclass
class Timings:
    """Seconds of one call, round by round; the lists of calls that took turns belong together by index."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)  # empty on a CPU
    warm_up: int = 0

    @property
    def busy_s(self) -> list[float]:
        """The clock that other programs disturb least: of the device, or of the processor."""
        return self.device_s or self.cpu_s

    def keep(self, rounds: int) -> None:
        """Forget what was measured after so many rounds."""
        del self.wall_s[rounds:], self.cpu_s[rounds:], self.device_s[rounds:]

    def samples(self) -> dict[str, list[float]]:
        """What a result file keeps."""
        clocks = {"wall_s": self.wall_s, "cpu_s": self.cpu_s, "device_s": self.device_s}
        return {clock: values for clock, values in clocks.items() if values}


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    warm_up: int = 2,
    device: str = "cpu",
    budget_s: float | None = None,
    into: dict[str, Timings] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Timings]:
    """Time every call once a round, in turn; the order turns round from one round to the next (A B, B A, A B, ...).

    Args:
        warm_up: rounds before, not kept.
        device: "cpu", or a CUDA device, on which a call counts until its work is done.
        budget_s: no round begins that would end later than so many seconds from now, by how long the last one took;
            after one round before and one measured. Where time is short, one round before is enough.
        into: filled as they are measured, and returned: what is there when an exception ends it.
        tell: called with (rounds done, rounds).
    """
    from ddpm_lmk.system import accelerator  # here, so that comparing files does not wait for torch

    timings = {} if into is None else into
    timings |= {name: Timings() for name in calls}
    since, last_s = time.perf_counter(), 0.0
    done, number = -warm_up, 0
    while done < rounds:
        begin = time.perf_counter()
        left_s = math.inf if budget_s is None else since + budget_s - begin
        if done >= 1 and last_s > left_s:
            break
        if done > -warm_up and (FEWEST_PAIRS - done) * last_s > left_s:
            done = max(done, 0)
        # whoever goes second finds warmer caches and a hotter chip: each is second as often as first
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            wall_s, cpu_s, device_s = accelerator.timed(calls[name], device)
            if done < 0:
                timings[name].warm_up += 1
                continue
            timings[name].wall_s.append(wall_s)
            timings[name].cpu_s.append(cpu_s)
            timings[name].device_s += [] if device_s is None else [device_s]
        done, number = done + 1, number + 1
        last_s = time.perf_counter() - begin
        if tell is not None:
            tell(max(0, done), rounds)
    return timings


def environment(device: str) -> dict[str, Any]:
    """The device and threads of a measurement, for a result file."""
    import torch

    from ddpm_lmk.system import accelerator

    is_cuda = device.startswith("cuda")
    return {
        "device": "cuda" if is_cuda else "cpu",
        "device_name": accelerator.name(device),
        "cuda": torch.version.cuda if is_cuda else None,
        "threads": torch.get_num_threads(),
    }
