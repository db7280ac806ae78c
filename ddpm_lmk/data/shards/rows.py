"""Which samples of a pack are used, grouped by the shard they lie in.

A pool may hold ten million samples, so its rows are never listed: `SplitRows` keeps one count per shard, and looks up
the rows of a shard in the index when they are due. `ListedRows` holds the few rows of a labelled set as they are given.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class ByShard(Protocol):
    """Rows in groups: one group for each shard that has any."""

    @property
    def counts(self) -> Ints:
        """Rows of each group `[G]`, none of them 0."""

    def of(self, group: int) -> Ints:
        """Rows of one group, in order."""

    def __len__(self) -> int:
        """Rows in all."""


class ListedRows:
    """Rows given one by one, with the shard of each; inside a shard they keep their order."""

    def __init__(self, rows: np.ndarray, shards: np.ndarray) -> None:
        by_shard = np.argsort(shards, kind="stable")
        self._rows = np.asarray(rows, dtype=np.int64)[by_shard]
        _, self._first, self.counts = np.unique(shards[by_shard], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, group: int) -> Ints:
        """Rows of one group."""
        return self._rows[self._first[group] : self._first[group] + self.counts[group]]


class SplitRows:
    """The ascending rows of some splits of a pack, but for those left out. Behaves like an array that is never made.

    Args:
        index: the pack's index; only its column `split` is read, a shard at a time.
        starts: `[S + 1]` first row of every shard, and the number of rows.
        per_shard: `[S]` rows of these splits in every shard.
        splits: codes of the splits.
        without: rows that are left out; others than those of the splits do not matter.
    """

    def __init__(
        self,
        index: np.ndarray,
        starts: Ints,
        per_shard: Ints,
        splits: list[int],
        without: np.ndarray | None = None,
    ) -> None:
        self._index, self._starts, self._splits = index, starts, splits
        self._all, self._left = per_shard, per_shard
        self._without = np.zeros(0, dtype=np.int64)
        if without is not None and len(without):
            rows = np.unique(np.asarray(without, dtype=np.int64))
            self._without = rows[np.isin(index["split"][rows], splits)]
            shards = np.searchsorted(starts, self._without, side="right") - 1
            self._left = per_shard - np.bincount(shards, minlength=len(per_shard))
        self._groups = np.flatnonzero(self._left)
        self.counts: Ints = self._left[self._groups]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def of(self, group: int) -> Ints:
        """Rows of one group, ascending."""
        shard = self._groups[group]
        first, end = int(self._starts[shard]), int(self._starts[shard + 1])
        is_whole = self._left[shard] == end - first
        return np.arange(first, end, dtype=np.int64) if is_whole else self.within(first, end)

    def within(self, first: int, end: int) -> Ints:
        """The rows that are at least `first` and less than `end`, ascending."""
        rows = first + np.flatnonzero(np.isin(self._index["split"][first:end], self._splits))
        if isinstance(self._index, np.memmap):
            # Mapped pages count as this process' memory; the page cache keeps them for whoever comes next.
            self._index._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        low, high = np.searchsorted(self._without, (first, end))
        return rows if low == high else np.setdiff1d(rows, self._without[low:high], assume_unique=True)

    def but(self, without: np.ndarray) -> SplitRows:
        """The same rows, with more of them left out."""
        both = np.concatenate([self._without, np.asarray(without, dtype=np.int64)])
        return SplitRows(self._index, self._starts, self._all, self._splits, both)

    def __getitem__(self, places: Any) -> Any:
        """The row at a place, or an array of the rows at several (numbers, a slice or a mask)."""
        wanted = np.asarray(np.arange(len(self))[places] if isinstance(places, slice) else places)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        flat = np.where(wanted < 0, wanted + len(self), wanted).reshape(-1).astype(np.int64)
        if len(flat) and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"place {flat.max()} of {len(self)} rows")
        groups = np.searchsorted(self._ends, flat, side="right")
        out = np.empty_like(flat)
        for group in np.unique(groups):
            here = groups == group
            out[here] = self.of(int(group))[flat[here] - (self._ends[group] - self.counts[group])]
        return out.reshape(wanted.shape) if wanted.ndim else int(out[0])

    def __iter__(self) -> Iterator[int]:
        for group in range(len(self.counts)):
            yield from self.of(group).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = [self.of(group) for group in range(len(self.counts))]
        return np.concatenate(parts or [np.zeros(0, np.int64)]).astype(dtype or np.int64, copy=False)

    def tolist(self) -> list[int]:
        """All rows as a list: for small sets."""
        return np.asarray(self).tolist()
