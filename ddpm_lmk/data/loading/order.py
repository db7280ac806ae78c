"""Which sample stands at a position of the training stream: a pure function of `(seed, position)`.

Holds no state but caches, draws nothing from a generator, and knows nothing of pixels. Randomness is a counter-based
hash: blake2b turns (seed, purpose) into a key, the SplitMix64 finaliser (Steele et al. 2014; Stafford's "variant 13")
turns (key, counter) into bits. So a resumed run, or one on another number of processes, sees the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.shards.index import ByShard, Ints
from ddpm_lmk.errors import ConfigError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: SplitMix64's step between counters
_QUOTA_SCALE = 2**20  # weights are honoured to one part in a million
_POOL_BLOCK = 256  # positions whose corpora are shuffled among one another


def keyed_uniform(seed: int, stream: str, positions: np.ndarray, count: int) -> NDArray[np.float64]:
    """`[P, count]` numbers in [0, 1), fixed by `(seed, stream, position, column)`; `stream` names their purpose."""
    bits = _keyed_bits(seed, stream, positions, count)  # 53 of the 64 bits: what a float64 in [0, 1) can hold
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed`, fixed by `(seed, stream, position)`."""
    return int.from_bytes(_digest(seed, stream, position), "little") >> 65


class BatchPlan:
    """Where each optimizer step starts in the stream and how many images it takes, over all ranks.

    With epoch_boundary "straddle" every global batch is full and may reach over the end of an epoch. With "epoch" none
    does: an epoch starts at a multiple of `num_images` and its last global batch is short; with `drop_last` the images
    that do not fill a micro-batch are left out (docs/method.md, section 2). Positions left out are never used, so
    epochs stay aligned.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        micro_batch: int | None,
        windows: Literal["straddle", "epoch"],
        *,
        drop_last: bool = True,
    ) -> None:
        assert num_images > 0
        if micro_batch is not None and global_batch_size % micro_batch:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is not a multiple of train.micro_batch={micro_batch}"
            )
        self.num_images, self.global_batch_size, self.micro_batch, self.windows = (
            num_images,
            global_batch_size,
            micro_batch,
            windows,
        )
        unit = micro_batch if drop_last and micro_batch is not None and micro_batch <= num_images else 1
        self._used = num_images // unit * unit

    @classmethod
    def of(cls, cfg: RunConfig, num_images: int) -> BatchPlan:
        """The global batches of a run that learns from so many images; raises ConfigError as the constructor."""
        train = cfg.train
        # The paper drops an unfilled micro-batch in pre-training, and uses every labelled image (docs/method.md, 2, 3)
        drop_last = cfg.task.stage == "pretrain"
        return cls(
            num_images, train.global_batch_size, train.given_micro_batch, train.epoch_boundary, drop_last=drop_last
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of one epoch where global batches end with it; None where they straddle."""
        return -(-self._used // self.global_batch_size) if self.windows == "epoch" else None

    @property
    def largest(self) -> int:
        """Images of the largest global batch."""
        return self.global_batch_size if self.windows == "straddle" else min(self.global_batch_size, self._used)

    def start(self, step: int) -> int:
        """Position of the first image of `step` (the first step is 0)."""
        if self.steps_per_epoch is None:
            return step * self.global_batch_size
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.num_images + within * self.global_batch_size

    def size(self, step: int) -> int:
        """Images of `step` over all ranks."""
        if self.steps_per_epoch is None:
            return self.global_batch_size
        return min(self.global_batch_size, self._used - step % self.steps_per_epoch * self.global_batch_size)

    def images(self, steps: int) -> int:
        """Images of the first `steps` steps; fewer than positions where epochs leave some out."""
        if self.steps_per_epoch is None:
            return steps * self.global_batch_size
        epochs, within = divmod(steps, self.steps_per_epoch)
        return epochs * self._used + within * self.global_batch_size

    def worlds(self) -> list[int]:
        """Numbers of processes that divide the global batch into equal, whole micro-batches."""
        unit = self.micro_batch or 1
        return [w for w in range(1, self.global_batch_size + 1) if self.global_batch_size % (w * unit) == 0]

    def check_world(self, world: int) -> None:
        """Raise ConfigError if `world` processes cannot share out the global batch evenly (docs/faults.md, A4)."""
        if world not in self.worlds():
            each = f" x micro_batch {self.micro_batch}" if self.micro_batch else ""
            allowed = ", ".join(map(str, self.worlds()))
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size} cannot be shared by {world} processes{each}; "
                f"use {allowed} processes or change train.global_batch_size"
            )

    def share(self, step: int, rank: int, world: int) -> tuple[Ints, NDArray[np.float32], int]:
        """Positions and weights of `rank`'s part of `step`, padded to whole micro-batches, and the micro-batch size.

        Every rank gets the same count. A given `micro_batch` cuts the global batch into the same micro-batches for any
        `world`: number k is its places [k * micro_batch, (k + 1) * micro_batch); ranks get consecutive ones.
        Padding repeats the first position of the part (of the global batch, where the part is empty) with weight 0.
        """
        start, size = self.start(step), self.size(step)
        unit = self.micro_batch or 1
        part = -(-size // (unit * world)) * unit
        micro = self.micro_batch or -(-self.largest // world)
        first, last = min(rank * part, size), min((rank + 1) * part, size)
        positions = np.full(-(-part // micro) * micro, start + (first if first < last else 0), dtype=np.int64)
        weights = np.zeros(len(positions), dtype=np.float32)
        positions[: last - first] = start + np.arange(first, last)
        weights[: last - first] = 1
        return positions, weights, micro


class SampleOrder:
    """The endless stream over one corpus or a pool of several.

    Per epoch and corpus, shards are permuted, cut into windows of `window` shards, and samples permuted inside each
    window, so reads stay local. Corpora take turns by integer quotas spread evenly (Bresenham's line, one corpus
    against the rest), shuffled inside blocks of 256 positions, so each corpus' own counter is known at any position.
    Without `weights` the quotas are the sizes and every `num_images` positions use each sample exactly once.
    """

    def __init__(self, seed: int, corpora: Sequence[ByShard], weights: Sequence[float] | None, window: int) -> None:
        """`corpora` are the rows of each set, none of them empty; memory grows with their shards, not their samples."""
        assert corpora
        assert all(len(rows) > 0 for rows in corpora)
        self.num_images = sum(len(rows) for rows in corpora)
        self._orders = [_CorpusOrder(seed, c, rows, window) for c, rows in enumerate(corpora)]
        shares = None if weights is None else np.asarray(weights, dtype=np.float64)
        self._quotas = (
            [len(rows) for rows in corpora]
            if shares is None
            else [max(1, round(q)) for q in shares / shares.sum() * _QUOTA_SCALE]
        )
        # Positions are asked for in ascending order, so few blocks (below: epochs, windows) are in use at once.
        self._block = lru_cache(maxsize=64)(lambda start, size: _permutation(seed, f"pool/{start}", size))

    def at(self, positions: np.ndarray) -> tuple[Ints, Ints]:
        """Corpus and row number, each `[P]`, of the samples at `positions` `[P]`."""
        corpus, counter = self.turns(np.asarray(positions, dtype=np.int64))
        rows = np.empty_like(counter)
        for c, order in enumerate(self._orders):
            here = corpus == c
            if here.any():
                rows[here] = order.at(counter[here])
        return corpus, rows

    def turns(self, positions: Ints) -> tuple[Ints, Ints]:
        """Corpus `[P]` at each position, and how often that corpus had its turn before `[P]`."""
        corpus, counter = np.zeros_like(positions), positions.copy()
        if len(self._quotas) == 1:
            return corpus, counter
        total = sum(self._quotas)
        cycle, left = np.divmod(positions, total)
        left = self._shuffled(cycle, left, total)
        undecided = np.ones(len(positions), dtype=bool)
        for c, quota in enumerate(self._quotas):
            before = left * quota // total  # integers: the same turns on every machine
            taken = undecided & ((left + 1) * quota // total > before)
            corpus[taken], counter[taken] = c, cycle[taken] * quota + before[taken]
            undecided &= ~taken
            left, total = left - before, total - quota
            if total == 0:
                break
        return corpus, counter

    def _shuffled(self, cycle: Ints, within: Ints, total: int) -> Ints:
        """Move positions of a cycle inside their blocks; the last block of a cycle may be short."""
        out = np.empty_like(within)
        first = within - within % _POOL_BLOCK
        starts = cycle * total + first
        for start in np.unique(starts):
            here = starts == start
            size = min(_POOL_BLOCK, total - int(first[here][0]))
            out[here] = first[here] + self._block(int(start), size)[within[here] - first[here]]
        return out


class _CorpusOrder:
    """The endless stream over one corpus: an epoch is a permutation that stays inside windows of shards."""

    def __init__(self, seed: int, corpus: int, rows: ByShard, window: int) -> None:
        self._rows = rows
        self._seed, self._stream, self._window_shards = seed, f"corpus/{corpus}", window
        self._epoch: Callable[[int], tuple[Ints, Ints]] = lru_cache(maxsize=4)(self._shard_permutation)
        self._window: Callable[[int, int], Ints] = lru_cache(maxsize=4)(self._window_rows)

    def at(self, counter: Ints) -> Ints:
        """Row numbers `[K]` of the samples at `counter` `[K]`."""
        out = np.empty_like(counter)
        epochs, within = np.divmod(counter, len(self._rows))
        for epoch in np.unique(epochs):
            _, bounds = self._epoch(int(epoch))
            here = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(bounds, within[here], side="right") - 1
            for w in np.unique(windows):
                inside = here[windows == w]
                out[inside] = self._window(int(epoch), int(w))[within[inside] - bounds[w]]
        return out

    def _shard_permutation(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in this epoch's order `[S]`, and the counters at which its windows begin `[windows + 1]`."""
        shards = _permutation(self._seed, f"{self._stream}/epoch/{epoch}", len(self._rows.counts))
        ends = np.concatenate([[0], np.cumsum(self._rows.counts[shards])])
        return shards, np.append(ends[: -1 : self._window_shards], ends[-1])

    def _window_rows(self, epoch: int, window: int) -> Ints:
        """Rows of one window in the order they are drawn."""
        shards, _ = self._epoch(epoch)
        chosen = shards[window * self._window_shards : (window + 1) * self._window_shards]
        rows = np.concatenate([self._rows.of(int(shard)) for shard in chosen])
        return rows[_permutation(self._seed, f"{self._stream}/epoch/{epoch}/window/{window}", len(rows))]


def few_shot_rows(
    rows: np.ndarray, dataset: str, shots: int | None, draw: Literal["first", "random"], seed: int
) -> np.ndarray:
    """The labelled training rows of a few-shot run, out of `rows` in id order; None means all of them.

    "first" takes them by name (the paper); "random" is fixed by `(dataset, seed)` and nested: fewer shots are a prefix
    of more.

    Raises:
        ConfigError: if `shots` is more than there are.
    """
    if shots is None:
        return rows
    if shots > len(rows):
        raise ConfigError(
            f"data.shots={shots}, but {dataset} has {len(rows)} labelled training images; "
            f"use 1..{len(rows)} or null for all"
        )
    return rows[:shots] if draw == "first" else rows[_permutation(seed, f"shots/{dataset}", len(rows))[:shots]]


def _permutation(seed: int, stream: str, size: int) -> Ints:
    """A permutation of `range(size)`, uniform over all of them (ties of 64-bit keys aside)."""
    return np.argsort(_keyed_bits(seed, stream, np.arange(size), 1)[:, 0], kind="stable")


def _keyed_bits(seed: int, stream: str, positions: np.ndarray, count: int) -> NDArray[np.uint64]:
    key, salt = np.frombuffer(_digest(seed, stream), dtype="<u8")
    state = _mix(_mix(np.asarray(positions).astype(np.uint64) + key) ^ salt)
    return _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser: a bijection of 64-bit words (arrays wrap silently) that spreads every bit over all."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=256)
def _digest(seed: int, stream: str, position: int | None = None) -> bytes:
    text = f"{seed}|{position}|{stream}"
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"ddpm-lmk").digest()
