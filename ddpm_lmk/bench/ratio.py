"""Is one thing faster than another? A ratio with bounds, or the reason why there is none.

Bounds are by rank, so they assume nothing about the noise but that rounds are alike. Paired values (things that took
turns) give a ratio a round: their median, bounded by the sign test. Values of two runs that know nothing of each other
give all their pairs: Hodges-Lehmann median, bounded by the rank-sum test. Noise that comes in waves fools both, so a
ratio has to be beyond what each half of the rounds says by itself, beyond how far the halves of a run are apart, and,
between two runs on one kind of machine, beyond what these disagree about a piece of work that is always the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

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
    """`first` over `second`, two things that took turns: value i of both is from round i."""
    assert len(first) == len(second), "paired values come in pairs"
    if len(first) < FEWEST_PAIRS:
        return _too_few(len(first), FEWEST_PAIRS)
    ratios = [a / b for a, b in zip(first, second)]
    low, high = _bounds_of_median(sorted(ratios))
    halves = [median(ratios[: len(ratios) // 2]), median(ratios[len(ratios) // 2 :])]
    return _decide(median(ratios), min(low, *halves), max(high, *halves))


def compare_samples(first: Sequence[float], second: Sequence[float], *, anchor: float = 1.0) -> Comparison:
    """`first` over `second`, values of two runs.

    Args:
        anchor: the same ratio of the piece of work that is always the same; 1 where the machines differ, since then
            it is what is compared.
    """
    if min(len(first), len(second)) < FEWEST_VALUES:
        return _too_few(min(len(first), len(second)), FEWEST_VALUES)
    ratios = sorted(a / b for a in first for b in second)
    n, m = len(first), len(second)
    skipped = max(0, math.floor(n * m / 2 - Z * math.sqrt(n * m * (n + m + 1) / 12)))
    low, high = ratios[skipped], ratios[-1 - skipped]
    middle = median(ratios)
    waves = max(_wave(first), _wave(second), abs(math.log(anchor)))
    return _decide(middle, min(low, middle * math.exp(-waves)), max(high, middle * math.exp(waves)))


def _bounds_of_median(ratios: list[float]) -> tuple[float, float]:
    """Order statistics that leave at most 2.5 % of a fair coin's tosses outside at either end."""
    n, below, skipped = len(ratios), 0.0, 0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if below > (1 - CONFIDENCE) / 2:
            break
        skipped = k
    return ratios[skipped], ratios[n - 1 - skipped]


def _wave(values: Sequence[float]) -> float:
    """How far the halves of a run are apart, as a logarithm."""
    half = len(values) // 2
    return abs(math.log(median(values[:half]) / median(values[half:])))


def _too_few(found: int, wanted: int) -> Comparison:
    return Comparison(None, None, None, f"too few measurements: {found}, wanted {wanted}")


def _decide(ratio: float, low: float, high: float) -> Comparison:
    if low <= 1 <= high:
        return Comparison(None, low, high, f"not distinguishable ({low:.3f} to {high:.3f})")
    return Comparison(ratio, low, high)
