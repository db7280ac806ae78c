"""A set of digests that costs tens of bytes each, for corpora of millions of pictures."""

from __future__ import annotations

import numpy as np

_FIRST_SLOTS = 1 << 12


class DigestSet:
    """Remembers the first 96 bits of digests: of ten million, two differ and are taken for one once in 10^15 corpora.

    Open addressing in two arrays, doubled when they are two thirds full.
    """

    def __init__(self) -> None:
        self._count = 0
        self._high = np.zeros(_FIRST_SLOTS, np.uint64)  # 0: free
        self._low = np.zeros(_FIRST_SLOTS, np.uint32)

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Add a digest of at least 12 bytes; False when it was there already."""
        high, low = int.from_bytes(digest[:8], "little") | 1, int.from_bytes(digest[8:12], "little")
        slot = self._find(high, low)
        if self._high[slot]:
            return False
        self._high[slot], self._low[slot] = high, low
        self._count += 1
        if 3 * self._count > 2 * len(self._high):
            self._grow()
        return True

    def _find(self, high: int, low: int) -> int:
        """The slot of this digest, or the free one where it belongs."""
        slot = low & (len(self._high) - 1)
        while self._high[slot] and (int(self._high[slot]), int(self._low[slot])) != (high, low):
            slot = (slot + 1) & (len(self._high) - 1)
        return slot

    def _grow(self) -> None:
        high, low = self._high, self._low
        self._high, self._low = np.zeros(2 * len(high), np.uint64), np.zeros(2 * len(low), np.uint32)
        for index in np.flatnonzero(high):
            slot = self._find(int(high[index]), int(low[index]))
            self._high[slot], self._low[slot] = high[index], low[index]
