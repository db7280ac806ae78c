"""Copies among prints: the same pixels, and the same film after re-encoding, resizing or a change of its greys.

Near copies are searched by multi-index hashing (Norouzi, Punjani, Fleet 2012): two 64-bit hashes within 4 bits of each
other agree in at least four of eight parts, so inside a pool only samples that share four parts are compared: of ten
million chests a thousand times fewer pairs than there are, for seventy sorts. Between a pool and a few protected films
sorting would be the most of it: there, hashes that agree up to one bit in one of three parts are compared.
Then a second, independent check: at most 24 of 256 detail bits may differ. Measured on real films
(benchmarks/results/pool_duplicates.json): copies differ in few, different films of one kind in 35 or more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.data.shards.index import Ints

RADIUS = 4  # of 64 low-frequency bits
MOST_DETAIL_BITS = 24  # of 256
_FOURS = [np.uint64(sum(0xFF << 8 * part for part in parts)) for parts in itertools.combinations(range(8), 4)]
_PARTS = ((0, 22), (22, 21), (43, 21))  # first bit and width
_PAIRS_AT_ONCE = 1 << 22

Words = NDArray[np.uint64]


def first_of_its_kind(prints: np.ndarray, radius: int = RADIUS) -> tuple[Ints, NDArray[np.bool_]]:
    """For each print `[N]`, the place of the first copy of the same film, and whether the two have the same pixels.

    A print without a copy, or the first of several, stands for itself. Copies of copies are copies.
    """
    exact = _first_equal(prints["pixels"])
    exact[prints["pixels"].max(-1) == 0] = np.flatnonzero(prints["pixels"].max(-1) == 0)
    kept = np.flatnonzero((exact == np.arange(len(prints))) & (prints["pixels"].max(-1) != 0))
    first = np.arange(len(prints))
    for block_a, block_b in near_pairs(prints["low"][kept], prints["detail"][kept], radius):
        for a, b in zip(kept[block_a].tolist(), kept[block_b].tolist(), strict=True):
            _unite(first, a, b)
    while not np.array_equal(first, further := first[first]):
        first = further
    return first[exact], (exact != np.arange(len(prints))) & (first[exact] == exact)


def copies_of(prints: np.ndarray, others: np.ndarray, radius: int = RADIUS) -> tuple[Ints, Ints]:
    """Which of `prints` are copies of one of `others`, as places in both: those with the same pixels first."""
    readable = np.flatnonzero(others["pixels"].max(-1))
    others = others[readable]
    if not len(others):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    exact_a, exact_b = _matches(prints["pixels"], others["pixels"])
    known = prints["pixels"].max(-1) != 0
    rest = np.setdiff1d(np.flatnonzero(known & _may_match(prints["low"], others["low"])), exact_a)
    both = np.concatenate([prints["low"][rest], others["low"]])
    detail = np.concatenate([prints["detail"][rest], others["detail"]])
    near: dict[int, int] = {}
    for a, b in near_pairs(both, detail, radius, first_group=len(rest)):
        for place, other in zip(rest[a].tolist(), (b - len(rest)).tolist(), strict=True):
            near.setdefault(place, other)
    near_a = np.array(sorted(near), dtype=np.int64)
    near_b = np.array([near[place] for place in near_a.tolist()], dtype=np.int64)
    return np.concatenate([exact_a, near_a]), readable[np.concatenate([exact_b, near_b])]


def near_pairs(
    low: Words, detail: Words, radius: int = RADIUS, *, first_group: int | None = None
) -> Iterator[tuple[Ints, Ints]]:
    """Places `a < b` of near copies, in blocks; a pair may come many times.

    With `first_group`, only pairs of one of the first `first_group` places and one of the others.
    """
    assert radius <= RADIUS, "else two hashes may differ in more parts than are let differ"
    for a, b in _sharing_four_parts(low) if first_group is None else _sharing_nearly_a_part(low):
        a, b = np.minimum(a, b), np.maximum(a, b)
        if first_group is not None:
            across = (a < first_group) & (b >= first_group)
            a, b = a[across], b[across]
        is_near = np.bitwise_count(low[a] ^ low[b]) <= radius
        a, b = a[is_near], b[is_near]
        is_same = np.bitwise_count(detail[a] ^ detail[b]).sum(-1) <= MOST_DETAIL_BITS
        if is_same.any():
            yield a[is_same], b[is_same]


def _sharing_four_parts(low: Words) -> Iterator[tuple[Ints, Ints]]:
    """Pairs that agree in four of the eight bytes of the hash; each once per such four."""
    for mask in _FOURS:
        keys = low & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        start = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        count = np.diff(np.append(start, len(keys)))
        start, count = start[count > 1], count[count > 1]
        yield from _products(order, start, count, start, count, is_same=True)


def _sharing_nearly_a_part(low: Words) -> Iterator[tuple[Ints, Ints]]:
    """Pairs that agree in a part of the hash, or differ in one bit of it; each once per part."""
    for shift, width in _PARTS:
        part = (low >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(part, kind="stable")
        keys, start, count = np.unique(part[order], return_index=True, return_counts=True)
        yield from _products(order, start, count, start, count, is_same=True)
        for bit in range(width):
            flag = np.uint64(1 << bit)
            lower = np.flatnonzero((keys & flag) == 0)
            place = np.searchsorted(keys, keys[lower] | flag)
            there = place < len(keys)
            lower, place = lower[there], place[there]
            there = keys[place] == keys[lower] | flag
            lower, place = lower[there], place[there]
            yield from _products(order, start[lower], count[lower], start[place], count[place], is_same=False)


def _products(
    order: Ints, start_a: Ints, count_a: Ints, start_b: Ints, count_b: Ints, *, is_same: bool
) -> Iterator[tuple[Ints, Ints]]:
    """Every member of a run with every member of its partner run, or of the same run each pair once, in blocks."""
    most = np.maximum(1, _PAIRS_AT_ONCE // count_b)
    pieces = -(-count_a // most)  # a run too long for one block is cut
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start_a, count_a, start_b, count_b, most = (
        np.repeat(values, pieces) for values in (start_a, count_a, start_b, count_b, most)
    )
    skip = piece * most
    sizes = np.minimum(count_a - skip, most) * count_b
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        done = ends[begin] - sizes[begin]
        end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        run = np.repeat(np.arange(begin, end), sizes[begin:end])
        within = np.arange(len(run)) - (ends[run] - sizes[run] - done)
        i, j = skip[run] + within // count_b[run], within % count_b[run]
        if is_same:
            run, i, j = (values[i < j] for values in (run, i, j))
        yield order[start_a[run] + i], order[start_b[run] + j]
        begin = end


def _may_match(low: Words, others: Words) -> NDArray[np.bool_]:
    """Cheap test that lets all near copies of `others` through: a table of their parts and those a bit away."""
    passed = np.zeros(len(low), dtype=bool)
    for shift, width in _PARTS:
        mask, table = np.uint64((1 << width) - 1), np.zeros(1 << width, dtype=bool)
        keys = (others >> np.uint64(shift)) & mask
        table[keys] = True
        for bit in range(width):
            table[keys ^ np.uint64(1 << bit)] = True
        passed |= table[(low >> np.uint64(shift)) & mask]
    return passed


def _matches(digests: np.ndarray, others: np.ndarray) -> tuple[Ints, Ints]:
    """Places in `digests` that are among `others`, and where there."""
    order = np.argsort(others[:, 0], kind="stable")
    place = np.minimum(np.searchsorted(others[order, 0], digests[:, 0]), len(others) - 1)
    is_equal = (others[order[place]] == digests).all(-1) & (digests.max(-1) != 0)
    found = np.flatnonzero(is_equal)
    return found, order[place[found]]


def _first_equal(digests: np.ndarray) -> Ints:
    """For each digest, the first place it stands at. The first word decides: 64 bits of a sha256."""
    _, first, which = np.unique(digests[:, 0], return_index=True, return_inverse=True)
    return first[which]


def _root(first: Ints, place: int) -> int:
    while first[place] != place:
        first[place] = first[first[place]]
        place = int(first[place])
    return place


def _unite(first: Ints, a: int, b: int) -> None:
    """Let the earlier of the two groups' firsts stand for both."""
    a, b = _root(first, a), _root(first, b)
    first[max(a, b)] = min(a, b)
