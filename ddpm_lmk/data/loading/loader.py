"""The torch loader: positions in, batches out, for training (endless, augmented) and for evaluation (each sample once).

It holds no random state: what a batch contains follows from the run file and its positions. Which sample stands where
is in `order`, what is done to it in `augment` and `warp`, where its pixels are in `resident`.

Makes things ahead of the one in use, in one thread and in order, and tells how long it was waited for.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import Batch, Group
from ddpm_lmk.data.loading.augment import Changes, compose, draw_changes, invert, move, no_changes
from ddpm_lmk.data.loading.backend import Name
from ddpm_lmk.data.loading.bad_samples import BadSample, Quarantine
from ddpm_lmk.data.loading.corpus import Corpus, Facts, evaluation_corpora, fingerprint, training_corpora
from ddpm_lmk.data.loading.dali import DaliPixels
from ddpm_lmk.data.loading.order import GroupPlan, SampleOrder, keyed_uniform
from ddpm_lmk.data.loading.pixels import Residency, ResidentPixels, StreamPixels, open_pixels
from ddpm_lmk.data.shards.verify import CorruptSampleError, SampleRecord
from ddpm_lmk.data.spec import DatasetSpec, mixture
from ddpm_lmk.errors import ConfigError, DataError

DEPTH = 2  # groups, or evaluation batches, made ahead of the one in use

Request = TypeVar("Request")


def ahead(
    make: Callable[[Request], Made], requests: Iterator[Request], *, in_thread: bool
) -> Iterator[tuple[Made, float]]:
    """`make` of every request, in order, and the seconds waited for it; without a thread each is made when asked."""
    if not in_thread:
        for request in requests:
            began = time.perf_counter()
            yield make(request), time.perf_counter() - began
        return
    with ThreadPoolExecutor(1, "prefetch") as thread:
        pending = deque(thread.submit(make, request) for request in itertools.islice(requests, DEPTH))
        try:
            while pending:
                began = time.perf_counter()
                made = pending.popleft().result()
                waited = time.perf_counter() - began
                pending.extend(thread.submit(make, request) for request in itertools.islice(requests, 1))
                yield made, waited
        finally:
            for future in pending:
                future.cancel()


log = logging.getLogger(__name__)

_SUBSTITUTES = 16  # tries at finding a readable sample for a position

Made = TypeVar("Made")
Place = tuple[int, int]  # corpus, row


@dataclass(frozen=True)
class Seat:
    """Which of the processes this is, the device it works on, and what works on the pixels."""

    rank: int
    world: int
    device: torch.device
    backend: Name


class _Loader:
    """What training and evaluation share: samples at places become a batch on the device."""

    def __init__(
        self, cfg: RunConfig, corpora: Sequence[Corpus], seat: Seat, cache: dict[Any, Any] | None, *, largest: int
    ) -> None:
        """`largest`: most images of a batch."""
        assert 0 <= seat.rank < seat.world
        self._cfg, self._corpora, self._seat = cfg, corpora, seat
        specs = [corpus.manifest.spec for corpus in corpora]
        self._spec = mixture(specs) if corpora[0].records else specs[0]
        self._domains = [self._spec.domains.index(spec) if self._spec.parts else 0 for spec in specs]
        self._decoders = ThreadPoolExecutor(cfg.data.workers, "decode") if cfg.data.workers else None
        self.residency: Residency = "stream"
        self._pixels: StreamPixels | ResidentPixels | DaliPixels
        workers = cfg.data.workers
        if seat.backend == "dali":
            self._pixels = DaliPixels(corpora, seat.device, workers=workers, largest=largest)
            return
        self._pixels, self.residency = open_pixels(
            corpora, cfg.data.residency, device=seat.device, workers=workers, world=seat.world, cache=cache
        )

    @property
    def num_images(self) -> int:
        """Images in use."""
        return sum(len(corpus.rows) for corpus in self._corpora)

    @property
    def spec(self) -> DatasetSpec:
        """Facts of the dataset: of all labelled ones together, of the first one in a pool without labels."""
        return self._spec

    @property
    def fingerprint(self) -> str:
        """Changes when the packed data changes."""
        return fingerprint(self._corpora)

    @property
    def records(self) -> list[SampleRecord]:
        """The labelled samples in use, few-shot ones in the order drawn; empty where labels are not used."""
        return [corpus.records[row] for corpus in self._corpora for row in corpus.rows.tolist() if corpus.records]

    def close(self) -> None:
        """Stop the decoding threads; the loader cannot be used afterwards."""
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)
        self._pixels.close()

    def _map(self, function: Callable[..., Made], *columns: Iterable[Any]) -> list[Made]:
        return list((self._decoders.map if self._decoders is not None else map)(function, *columns))

    def _ahead(self, make: Callable[[Any], Made], requests: Iterator[Any]) -> Iterator[tuple[Made, float]]:
        return ahead(make, requests, in_thread=self._cfg.data.workers > 0)

    def _batch(
        self,
        places: Sequence[Place],
        fetched: Sequence[Any],
        positions: np.ndarray,
        weights: np.ndarray,
        changes: Changes,
    ) -> Batch:
        images = self._pixels.images(
            fetched, changes, seed=self._cfg.seed, positions=positions, intensity=self._cfg.data.intensity
        )
        facts = [self._corpora[corpus].facts(row) for corpus, row in places]
        to_image = compose(changes.matrix, np.stack([fact.to_network for fact in facts]))
        batch = Batch(
            images=images,
            points=self._moved_points(places, facts, to_image),
            to_native=_tensor(invert(to_image)),
            native_size=_tensor(np.array([fact.native_size for fact in facts])),
            mm_per_px=_tensor(np.array([fact.mm_per_px for fact in facts])),
            positions=torch.from_numpy(positions.copy()),
            weight=_tensor(weights),
            ids=tuple(fact.id for fact in facts),
            domain=torch.tensor([self._domains[corpus] for corpus, _ in places]) if self._spec.parts else None,
        )
        return batch.to(self._seat.device)

    def _moved_points(
        self, places: Sequence[Place], facts: Sequence[Facts], to_image: np.ndarray
    ) -> torch.Tensor | None:
        """`[B, N, 2]` network px, NaN for landmarks of other parts of a mixture; None where no sample has a label."""
        if facts[0].points is None:  # labelled and unlabelled samples are never mixed
            return None
        points = np.full((len(facts), self._spec.num_landmarks, 2), np.nan)
        for row, (corpus, _), fact in zip(points, places, facts, strict=True):
            row[self._spec.columns(self._domains[corpus])] = fact.points
        return _tensor(move(points, to_image))


class TrainLoader(_Loader):
    """The endless training stream of one rank, in groups.

    Attributes:
        plan: where each step starts and how many images it takes.
        quarantine: the samples that cannot be read; who takes the groups merges what they bring (`Group.bad`).
    """

    def __init__(
        self,
        cfg: RunConfig,
        corpora: Sequence[Corpus],
        seat: Seat,
        cache: dict[Any, Any] | None,
        *,
        plan: GroupPlan,
    ) -> None:
        super().__init__(
            cfg, corpora, seat, cache, largest=cfg.train.given_micro_batch or -(-plan.largest // seat.world)
        )
        self.plan = plan
        self._order = SampleOrder(cfg.seed, [c.by_shard for c in corpora], cfg.data.weights, cfg.data.shuffle_window)
        self.quarantine = Quarantine(corpora, cfg.data.max_bad_fraction)

    def groups(self, start_step: int = 0) -> Generator[Group, None, None]:
        """Yield this rank's part of every group from `start_step` on, without end.

        Raises:
            DataError: a position has no readable sample. StoppedError: the file system does not answer.
        """
        found: list[BadSample] = []  # known before the first group: what decoding everything brought up
        if isinstance(self._pixels, ResidentPixels):
            found = [BadSample(*bad) for bad in self._pixels.bad_among(self._corpora)]
        for (step, micro_batches, bad), waited in self._ahead(self._make, itertools.count(start_step)):
            yield Group(self.plan.size(step), micro_batches, waited, tuple(found + bad))
            found = []

    def _expect(self, step: int) -> None:
        """Have remote shards fetched half a window before they are due: one window is in use while the next comes."""
        remote = [c for c, corpus in enumerate(self._corpora) if corpus.manifest.is_remote]
        if not remote:
            return
        shards = sum(len(corpus.by_shard.counts) for corpus in self._corpora)
        half = self._cfg.data.shuffle_window * self.num_images // (2 * shards)
        corpora, rows = self._order.at(self.plan.start(step) + half + np.arange(self.plan.size(step)))
        for c in remote:
            manifest = self._corpora[c].manifest
            manifest.expect(np.unique(manifest.shard_of(rows[corpora == c])).tolist())

    def _make(self, step: int) -> tuple[int, list[Batch], list[BadSample]]:
        self._expect(step)
        positions, weights, micro = self.plan.share(step, self._seat.rank, self._seat.world)
        found = self._map(self._find, positions.tolist(), *(axis.tolist() for axis in self._order.at(positions)))
        batches = []
        for begin in range(0, len(positions), micro):
            part = slice(begin, begin + micro)
            changes = draw_changes(self._cfg.data.augment, self._cfg.seed, positions[part], self._cfg.data.image_size)
            places, fetched, _ = zip(*found[part], strict=True)
            batches.append(self._batch(places, fetched, positions[part], weights[part], changes))
        return step, batches, [bad for _, _, met in found for bad in met]

    def _find(self, position: int, corpus: int, row: int) -> tuple[Place, Any, list[BadSample]]:
        """The sample at a position, or the first readable substitute: a function of the position and the bytes."""
        met: list[BadSample] = []
        for candidate in itertools.chain([row], self._substitutes(position, corpus)):
            try:
                return (corpus, candidate), self._pixels.fetch(corpus, candidate), met
            except CorruptSampleError as error:
                met.append(BadSample(corpus, candidate, str(error)))
        raise DataError(
            f"{self._corpora[corpus].manifest.root}: none of {_SUBSTITUTES + 1} samples drawn for position {position} "
            f"can be read, last: {met[-1].reason}; run `ddpm-lmk shards verify` and pack again"
        )

    def _substitutes(self, position: int, corpus: int) -> Iterator[int]:
        """Rows to try instead, of the same set; drawn only when they are needed."""
        rows = self._corpora[corpus].rows
        picks = keyed_uniform(self._cfg.seed, "substitute", np.array([position]), _SUBSTITUTES)[0] * len(rows)
        yield from rows[picks.astype(np.int64)].tolist()


class EvalLoader(_Loader):
    """One pass over a split, unaugmented. Over all ranks each sample comes once with weight 1; padding has weight 0.

    Every rank has the same number of batches of the same shape. A sample that cannot be read raises DataError: a score
    over fewer images is another score.
    """

    def __init__(self, cfg: RunConfig, corpora: Sequence[Corpus], seat: Seat, cache: dict[Any, Any] | None) -> None:
        super().__init__(cfg, corpora, seat, cache, largest=cfg.evaluate.batch)

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self._ahead(self._make, iter(self._parts())):
            yield batch

    def _parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and weights of this rank's batches; in class exact, the same batches for any number of ranks."""
        share = -(-self.num_images // self._seat.world)
        size = min(self._cfg.evaluate.batch, share)
        if self._cfg.train.exactness == "exact":
            size = min(self._cfg.evaluate.batch, self.num_images)
            share = -(-self.num_images // (size * self._seat.world)) * size
        padded = self._seat.rank * share + np.arange(-(-share // size) * size)
        weights = (padded < min((self._seat.rank + 1) * share, self.num_images)).astype(np.float32)
        positions = np.where(weights > 0, padded, 0)
        return [(positions[i : i + size], weights[i : i + size]) for i in range(0, len(padded), size)]

    def _make(self, part: tuple[np.ndarray, np.ndarray]) -> Batch:
        positions, weights = part
        starts = np.cumsum([0, *(len(corpus.rows) for corpus in self._corpora)])
        corpus = np.searchsorted(starts, positions, side="right") - 1
        places = [(int(c), int(self._corpora[c].rows[p - starts[c]])) for c, p in zip(corpus, positions, strict=True)]
        fetched = self._map(self._pixels.fetch, *zip(*places, strict=True))
        return self._batch(places, fetched, positions, weights, no_changes(len(positions)))


def open_training(
    cfg: RunConfig, seat: Seat, cache: dict[Any, Any] | None, *, corpora: Sequence[Corpus] | None = None
) -> TrainLoader:
    """See `ddpm_lmk.data.open_loader`; `corpora` where they are open already."""
    corpora = training_corpora(cfg) if corpora is None else corpora
    count = sum(len(corpus.rows) for corpus in corpora)
    plan = GroupPlan.of(cfg, count)
    plan.check_world(seat.world)
    if count < plan.largest:
        log.warning("%d images are fewer than train.group_size=%d: groups repeat them", count, cfg.train.group_size)
    return TrainLoader(cfg, corpora, seat, cache, plan=plan)


def open_evaluation(cfg: RunConfig, seat: Seat, cache: dict[Any, Any] | None, *, split: str | None) -> EvalLoader:
    """See `ddpm_lmk.data.open_loader`."""
    wanted = split or cfg.evaluate.split
    if wanted is None:
        raise ConfigError("evaluate.split is null, so there is nothing to evaluate; name a split")
    return EvalLoader(cfg, evaluation_corpora(cfg, wanted), seat, cache)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
