"""Is one method better than another? Chance of seeds (shots, weights, order) and chance of films, kept apart.

Both intervals are of the difference of two mean radial errors, of 95 %, and from pairs: runs of the same seed learn
from the same shots, and every method is scored on the same films. Over seeds it is Student's t, which with three seeds
is as wide as three seeds are few; over films it is the percentile bootstrap, which says nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
# Two-sided 95 % quantiles of Student's t by degrees of freedom; above these, the normal's.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
NORMAL_QUANTILE = 1.960


@dataclass(frozen=True)
class Difference:
    """A mean difference of `count` pairs and its interval; no interval from a single pair."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Does the interval leave out zero?"""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def over_seeds(ours: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Mean of `ours` - `other` over the seeds both have, with Student's interval; None where they share none."""
    values = _pairs(ours, other)
    if not len(values):
        return None
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Difference(mean, None, None, 1)
    reach = T_QUANTILES.get(count - 1, NORMAL_QUANTILE) * float(values.std(ddof=1)) / count**0.5
    return Difference(mean, mean - reach, mean + reach, count)


def over_films(ours: Mapping[str, float], other: Mapping[str, float]) -> Difference | None:
    """Mean of `ours` - `other` over the films both have, with a bootstrap interval that is the same at every call."""
    values = _pairs(ours, other)
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high), len(values))


def _pairs(
    ours: Mapping[int, float] | Mapping[str, float], other: Mapping[int, float] | Mapping[str, float]
) -> np.ndarray:
    left, right = dict(ours), dict(other)
    shared = sorted(set(left) & set(right))  # type: ignore[type-var]
    return np.array([left[key] - right[key] for key in shared], np.float64)  # type: ignore[index]
