"""Points that stand for many others: facility location, maximised greedily and evaluated lazily.

The gain of a set is how much nearer all points are to their nearest member than to a place farther away than any point
(Gomes & Krause, ICML 2010). It is monotone and submodular, so that the greedy set has at least 1 - 1/e of the largest
gain of all sets of its size (Nemhauser et al., 1978; Krause & Golovin, 2014), and a gain computed earlier is an upper
bound of today's (Minoux, 1978): most need not be computed again. The first point chosen is the medoid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_DISTANCES_AT_ONCE = 2**24  # 64 MB: the matrix of all distances is never held
# Two points far from all others gain the same whichever is chosen: rounding, which differs between machines, must not
# decide. Above the rounding of a sum of float32 distances, far below a difference that matters.
_TIE = 1e-5
_MOST_AT_ONCE = 256  # candidates evaluated before the best of them is compared with the bounds of the others


@dataclass(frozen=True)
class Choice:
    """A point that was chosen.

    Attributes:
        index: its row.
        nearest: the row nearest to it of those chosen before; None for the first.
        coverage: with it, 1 - (mean distance to the nearest chosen point) / (root mean square distance of two points).
        gain: by how much it raised the coverage; for the first, the coverage.
    """

    index: int
    nearest: int | None
    coverage: float
    gain: float


def choose(
    points: np.ndarray,
    count: int,
    *,
    chosen: Sequence[int] = (),
    at_once: int | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Choice]:
    """Choose `count` rows of `points` `[n, d]` one after another, each the one that raises the coverage most.

    Among equals (to one part in 100,000) the first row is taken.

    Args:
        chosen: rows that count as chosen already.
        at_once: candidates evaluated together; None: what memory of 64 MB holds.
        show: called with how many are chosen, and of how many.
    """
    assert 0 <= count <= len(points) - len(set(chosen))
    places = _Places(points)
    at_once = at_once or max(1, min(_MOST_AT_ONCE, _DISTANCES_AT_ONCE // len(points)))
    bounds = np.full(len(points), np.inf)
    for index in chosen:
        places.add(index)
        bounds[index] = -np.inf
    choices: list[Choice] = []
    for number in range(count):
        before, index = places.coverage, _best(places, bounds, at_once)
        nearest = int(places.owner[index])
        places.add(index)
        bounds[index] = -np.inf
        choices.append(Choice(index, nearest if nearest >= 0 else None, places.coverage, places.coverage - before))
        show(number + 1, count)
    return choices


class _Places:
    """All points, and how far each is from the nearest chosen one.

    Attributes:
        owner: `[n]` the chosen row nearest to each point; -1: none is chosen.
        reach: `[n]` how far that is; at first farther than any two points are from one another.
    """

    def __init__(self, points: np.ndarray) -> None:
        # Around their mean, so that squares differ by what the points differ by.
        self._points = points - points.mean(0, dtype=np.float64).astype(np.float32)
        self._squares = np.einsum("nd,nd->n", self._points, self._points)
        self._root_mean_square = float(np.sqrt(2 * self._squares.mean(dtype=np.float64)))
        self.owner = np.full(len(points), -1)
        self.reach = np.full(len(points), 2 * np.sqrt(self._squares.max()), np.float32)

    @property
    def coverage(self) -> float:
        """As `Choice` says; 0 before the first choice."""
        if self.owner[0] < 0:
            return 0.0
        apart = self._root_mean_square  # 0: all points are the same
        return 1 - float(self.reach.mean(dtype=np.float64)) / apart if apart else 1.0

    def add(self, index: int) -> None:
        """Choose a point."""
        distances = self._distances(np.array([index]))[:, 0]
        is_nearer = distances < self.reach
        is_nearer[index] = True
        self.owner[is_nearer] = index
        self.reach = np.minimum(self.reach, distances)

    def gains(self, indices: np.ndarray) -> np.ndarray:
        """By how much the sum of `reach` would fall with each of these points, `[k]`."""
        distances = self._distances(indices)
        np.subtract(self.reach[:, None], distances, out=distances)
        return np.maximum(distances, 0, out=distances).sum(0, dtype=np.float64)

    def _distances(self, indices: np.ndarray) -> np.ndarray:
        """Of every point to each of these, `[n, k]`."""
        distances = self._points @ self._points[indices].T
        distances *= -2
        distances += self._squares[:, None]
        distances += self._squares[indices]
        np.sqrt(np.maximum(distances, 0, out=distances), out=distances)
        distances[indices, np.arange(len(indices))] = 0  # which rounding made a little more
        return distances


def _best(places: _Places, bounds: np.ndarray, at_once: int) -> int:
    """The row of the largest gain; `bounds` `[n]` become gains where they were looked at."""
    order = np.argsort(-bounds, kind="stable")
    best = least = -np.inf
    for begin in range(0, len(order), at_once):
        part = order[begin : begin + at_once]
        part = part[bounds[part] > -np.inf]
        # An equal bound is looked at too: its row may be the earlier one.
        if not len(part) or bounds[part[0]] < least:
            break
        bounds[part] = places.gains(part)
        best = max(best, float(bounds[part].max()))
        least = best * (1 - _TIE)
    return int(np.argmax(bounds >= least))
