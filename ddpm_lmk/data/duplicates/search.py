"""Near-duplicate search among image fingerprints: multi-index hashing, then a check on independent bits.

Two 64-bit hashes that differ in at most 4 bits differ in at most four of their eight bytes, so they agree in four bytes
or more. Images that agree in none of the 70 choices of four bytes are never compared (Norouzi, Punjani, Fleet 2012):
for ten million chests that leaves a thousandth of all pairs. What is left must also agree in 232 of 256 detail bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.data.shards.index import Ints

RADIUS = 4  # of 64 low-frequency bits
# Of 256. On real x-rays duplicates differ in few of them, different images of one kind in 35 or more
# (benchmarks/results/pool_duplicates.json).
MOST_DETAIL_BITS = 24
_FOUR_BYTES = [np.uint64(sum(0xFF << 8 * byte for byte in four)) for four in itertools.combinations(range(8), 4)]
_THIRDS = ((0, 22), (22, 21), (43, 21))  # first bit and width of three parts of the hash
_PAIRS_AT_ONCE = 1 << 22  # bounds memory: crowded pools have thousands of candidates for each duplicate

Words = NDArray[np.uint64]


def find_originals(fingerprints: np.ndarray) -> tuple[Ints, NDArray[np.bool_]]:
    """For each fingerprint `[N]`, the place of the first duplicate of its image, and whether their pixels are equal.

    An image without a duplicate, or the first of several, stands for itself. Duplicates of duplicates are duplicates.
    """
    digests, own = fingerprints["pixels"], np.arange(len(fingerprints))
    # The first word decides: 64 bits of a sha256.
    _, index, inverse = np.unique(digests[:, 0], return_index=True, return_inverse=True)
    exact = np.where(is_readable(fingerprints), index[inverse], own)
    distinct = np.flatnonzero((exact == own) & is_readable(fingerprints))
    first = own.copy()
    for a, b in near_pairs(fingerprints[distinct]):
        for one, other in zip(distinct[a].tolist(), distinct[b].tolist(), strict=True):
            _unite(first, one, other)
    while not np.array_equal(first, further := first[first]):
        first = further
    return first[exact], (exact != own) & (first[exact] == exact)


def find_matches(fingerprints: np.ndarray, others: np.ndarray) -> tuple[Ints, Ints]:
    """Which of `fingerprints` duplicate one of `others`, as places in both: those with equal pixels first."""
    readable = np.flatnonzero(is_readable(others))
    others = others[readable]
    if not len(others):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    exact, exact_of = _equal_pixels(fingerprints, others)
    rest = np.setdiff1d(np.flatnonzero(is_readable(fingerprints)), exact)
    # Few are protected and many are trained on, or few are scored: this leaves a small part of the larger side.
    rest = rest[_may_match(fingerprints["low"][rest], others["low"])]
    candidates = np.flatnonzero(_may_match(others["low"], fingerprints["low"][rest]))
    near: dict[int, int] = {}
    for a, b in near_pairs(fingerprints[rest], others[candidates]):
        for place, other in zip(rest[a].tolist(), candidates[b].tolist(), strict=True):
            near[place] = min(other, near.get(place, other))
    places = np.array(sorted(near), dtype=np.int64)
    near_of = np.array([near[place] for place in places.tolist()], dtype=np.int64)
    return np.concatenate([exact, places]), readable[np.concatenate([exact_of, near_of])]


def near_pairs(fingerprints: np.ndarray, others: np.ndarray | None = None) -> Iterator[tuple[Ints, Ints]]:
    """Places of near-duplicates, in blocks; a pair may come many times.

    Without `others`, pairs inside `fingerprints`, each in one direction.
    """
    second = fingerprints if others is None else others
    for a, b in _pairs_sharing_four_bytes(fingerprints["low"], None if others is None else others["low"]):
        is_near = np.bitwise_count(fingerprints["low"][a] ^ second["low"][b]) <= RADIUS
        a, b = a[is_near], b[is_near]
        apart = np.bitwise_count(fingerprints["detail"][a] ^ second["detail"][b]).sum(-1)
        if (apart <= MOST_DETAIL_BITS).any():
            yield a[apart <= MOST_DETAIL_BITS], b[apart <= MOST_DETAIL_BITS]


def is_readable(fingerprints: np.ndarray) -> NDArray[np.bool_]:
    """`[N]`, False for the empty fingerprint of an image that could not be read: it is nobody's duplicate."""
    return fingerprints["pixels"].max(-1) != 0


def _pairs_sharing_four_bytes(low: Words, others: Words | None) -> Iterator[tuple[Ints, Ints]]:
    for mask in _FOUR_BYTES:
        keys = (low if others is None else others) & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if others is None:  # partners of the i-th in order: those after it with the same key
            left, begin = order, np.arange(1, len(low) + 1)
            end = np.searchsorted(keys, keys, side="right")
        else:
            left = np.arange(len(low))
            begin, end = (np.searchsorted(keys, low & mask, side=side) for side in ("left", "right"))
        partnered = np.flatnonzero(end > begin)
        for i, j in _expand(begin[partnered], end[partnered]):
            yield left[partnered[i]], order[j]


def _expand(begin: Ints, end: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Every `(i, j)` with `begin[i] <= j < end[i]`, in blocks of about `_PAIRS_AT_ONCE`, and at least one `i` each."""
    total = np.concatenate([[0], np.cumsum(end - begin)])
    start = 0
    while start < len(begin):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + _PAIRS_AT_ONCE, side="right")) - 1)
        i = np.repeat(np.arange(start, stop), end[start:stop] - begin[start:stop])
        yield i, begin[i] + np.arange(total[start], total[stop]) - total[i]
        start = stop


def _may_match(low: Words, others: Words) -> NDArray[np.bool_]:
    """Cheap test that lets through every near-duplicate of `others`, and few else where `others` are few.

    Of 4 different bits, at most one lies in one of three parts: tables of the parts, and of those one bit away.
    """
    passed = np.zeros(len(low), dtype=bool)
    for shift, width in _THIRDS:
        mask, table = np.uint64((1 << width) - 1), np.zeros(1 << width, dtype=bool)
        parts = (others >> np.uint64(shift)) & mask
        table[parts] = True
        for bit in range(width):
            table[parts ^ np.uint64(1 << bit)] = True
        passed |= table[(low >> np.uint64(shift)) & mask]
    return passed


def _equal_pixels(fingerprints: np.ndarray, others: np.ndarray) -> tuple[Ints, Ints]:
    """Places in `fingerprints` whose pixels are among `others`, and where there."""
    digests, sought = fingerprints["pixels"], others["pixels"]
    order = np.argsort(sought[:, 0], kind="stable")
    place = np.minimum(np.searchsorted(sought[order, 0], digests[:, 0]), len(sought) - 1)
    places = np.flatnonzero((sought[order[place]] == digests).all(-1) & is_readable(fingerprints))
    return places, order[place[places]]


def _unite(first: Ints, a: int, b: int) -> None:
    """Union-find with path halving: the earlier of the two groups' firsts stands for both."""
    a, b = (_root(first, place) for place in (a, b))
    first[max(a, b)] = min(a, b)


def _root(first: Ints, place: int) -> int:
    while first[place] != place:
        first[place] = first[first[place]]
        place = int(first[place])
    return place
