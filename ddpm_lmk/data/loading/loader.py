"""From positions of the stream to batches: training (endless, augmented) and evaluation (each sample once).

A loader holds no random state: what a batch contains follows from the run file and its positions. Which sample stands
where is in `order`, what is done to it in `augment` and `warp`, where its pixels are in `pixels`. One thread makes
batches ahead of the one in use, in order, and the time that was waited for it is reported.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import Batch, GlobalBatch
from ddpm_lmk.data.loading.augment import Changes, compose, draw_changes, invert, move, no_changes, resize_matrix
from ddpm_lmk.data.loading.bad_samples import BadSample, Fetched, Quarantine, first_readable
from ddpm_lmk.data.loading.corpus import Corpus, Facts, evaluation_corpora, fingerprint, training_corpora
from ddpm_lmk.data.loading.dali import DaliPixels
from ddpm_lmk.data.loading.order import BatchPlan, SampleOrder
from ddpm_lmk.data.loading.pixels import ResidentPixels, StreamPixels, open_pixels
from ddpm_lmk.data.spec import DatasetSpec, mixture
from ddpm_lmk.errors import ConfigError

log = logging.getLogger(__name__)

Name = Literal["torch", "dali"]
Request = TypeVar("Request")
Made = TypeVar("Made")

_DEPTH = 2  # batches made ahead: one is being made while one is ready; more would only hold memory


@dataclass(frozen=True)
class Seat:
    """Which of the processes this is, the device it works on, and what works on the pixels."""

    rank: int
    world: int
    device: torch.device
    backend: Name


class _Loader:
    """What training and evaluation share: samples at places become a batch on the device.

    Attributes:
        corpora: the datasets it reads, for whoever needs them beside the batches; those with pseudo-labels last.
        spec: facts of the dataset: of all labelled ones together, of the first one in a pool without labels.
        records: the labelled samples in use, few-shot ones in the order drawn; empty where labels are not used.
        num_images: what an epoch is; images with pseudo-labels do not count.
        fingerprint: changes when the packed data changes; that of pseudo-labels is the run's.
        residency: where the pixels are.
    """

    def __init__(
        self,
        cfg: RunConfig,
        corpora: Sequence[Corpus],
        seat: Seat,
        cache: dict[Any, Any] | None,
        *,
        largest: int,
        pseudo_labelled: Sequence[Corpus] = (),
    ) -> None:
        """`largest`: most images of a batch."""
        assert 0 <= seat.rank < seat.world
        self._cfg, self.corpora, self._seat = cfg, [*corpora, *pseudo_labelled], seat
        specs = [corpus.manifest.spec for corpus in corpora]
        self.spec: DatasetSpec = mixture(specs) if corpora[0].records else specs[0]
        self.records = [corpus.records[row] for corpus in corpora if corpus.records for row in corpus.rows.tolist()]
        self.num_images = sum(len(corpus.rows) for corpus in corpora)
        self.fingerprint = fingerprint(corpora)
        self._domains = [self.spec.domains.index(spec) if self.spec.parts else 0 for spec in specs]
        self._domains += [0 for _ in pseudo_labelled]  # beside one labelled set only, whose landmarks they have
        workers, wanted = cfg.runtime.workers, cfg.runtime.cache_pixels
        self._decoders = ThreadPoolExecutor(workers, "decode") if workers else None
        self._pixels: StreamPixels | DaliPixels
        if seat.backend == "dali":
            self._pixels = DaliPixels(self.corpora, seat.device, workers=workers, largest=largest)
        else:
            self._pixels = open_pixels(
                self.corpora, wanted, device=seat.device, workers=workers, world=seat.world, cache=cache
            )
        self.residency = self._pixels.residency
        self._to_fine = resize_matrix(corpora[0].sizes[0], corpora[0].sizes[-1])  # of the picture that nothing moved

    def close(self) -> None:
        """Stop the decoding threads; the loader cannot be used afterwards."""
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)
        self._pixels.close()

    def _map(self, function: Callable[..., Made], *columns: Iterable[Any]) -> list[Made]:
        return list((self._decoders.map if self._decoders is not None else map)(function, *columns))

    def _ahead(self, make: Callable[[Request], Made], requests: Iterator[Request]) -> Iterator[tuple[Made, float]]:
        """`make` of every request, in order, and the seconds waited for it; without workers each is made when due."""
        if self._decoders is None:
            for request in requests:
                began = time.perf_counter()
                yield make(request), time.perf_counter() - began
            return
        with ThreadPoolExecutor(1, "prefetch") as thread:  # one, so batches come in order
            pending = deque(thread.submit(make, request) for request in itertools.islice(requests, _DEPTH))
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

    def _batch(
        self,
        samples: Sequence[Fetched],
        positions: np.ndarray,
        weights: np.ndarray,
        changes: Changes,
    ) -> Batch:
        pixels, seed, intensity = [sample.pixels for sample in samples], self._cfg.seed, self._cfg.data.intensity
        images = self._pixels.images(pixels, changes, seed=seed, positions=positions, intensity=intensity)
        facts = [self.corpora[sample.corpus].facts(sample.row) for sample in samples]
        domains = [self._domains[sample.corpus] for sample in samples]
        to_image = compose(changes.matrix, np.stack([fact.to_network for fact in facts]))
        batch = Batch(
            images=images,
            points=self._moved_points(facts, domains, to_image),
            to_native=_tensor(invert(to_image)),
            native_size=_tensor(np.array([fact.native_size for fact in facts])),
            mm_per_px=_tensor(np.array([fact.mm_per_px for fact in facts])),
            positions=torch.from_numpy(positions.copy()),
            weight=_tensor(weights),
            ids=tuple(fact.id for fact in facts),
            domain=torch.tensor(domains) if self.spec.parts else None,
            fine=(fine := self._pixels.fine(pixels)),
            to_fine=None if fine is None else _tensor(compose(self._to_fine, invert(changes.matrix))),
        )
        return batch.to(self._seat.device)

    def _moved_points(
        self, facts: Sequence[Facts], domains: Sequence[int], to_image: np.ndarray
    ) -> torch.Tensor | None:
        """`[B, N, 2]` network px, NaN for landmarks of other parts of a mixture; None where no sample has a label."""
        if facts[0].points is None:  # labelled and unlabelled samples are never mixed
            return None
        points = np.full((len(facts), self.spec.num_landmarks, 2), np.nan)
        for row, domain, fact in zip(points, domains, facts, strict=True):
            row[self.spec.columns(domain)] = fact.points
        return _tensor(move(points, to_image))


class TrainLoader(_Loader):
    """The endless training stream of one rank, in global batches.

    Attributes:
        plan: where each step starts and how many images it takes.
        quarantine: the samples that cannot be read; who takes batches merges what they bring (`GlobalBatch.bad`).
    """

    def __init__(
        self,
        cfg: RunConfig,
        corpora: Sequence[Corpus],
        seat: Seat,
        cache: dict[Any, Any] | None,
        *,
        plan: BatchPlan,
        pseudo_labelled: Sequence[Corpus] = (),
    ) -> None:
        largest = cfg.train.given_micro_batch or -(-plan.largest // seat.world)
        super().__init__(cfg, corpora, seat, cache, largest=largest, pseudo_labelled=pseudo_labelled)
        self.plan = plan
        weights = cfg.data.weights
        if pseudo_labelled:
            assert cfg.data.propagate is not None, "RunConfig wants one labelled set beside it"
            share = cfg.data.propagate.share
            count = sum(len(corpus.rows) for corpus in pseudo_labelled)
            weights = (1 - share, *(share * len(corpus.rows) / count for corpus in pseudo_labelled))
        by_shard = [corpus.by_shard for corpus in self.corpora]
        self._order = SampleOrder(cfg.seed, by_shard, weights, cfg.data.shuffle_window)
        self.quarantine = Quarantine(self.corpora, cfg.data.max_bad_fraction)

    def global_batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Yield this rank's part of every global batch from `start_step` on, without end.

        Raises:
            DataError: a position has no readable sample. StoppedError: the file system does not answer.
        """
        known: list[BadSample] = []  # before the first step: what decoding everything brought up
        if isinstance(self._pixels, ResidentPixels):
            known = [BadSample(*bad) for bad in self._pixels.bad_among(self.corpora)]
        for (step, micro_batches, bad), waited in self._ahead(self._make, itertools.count(start_step)):
            yield GlobalBatch(self.plan.size(step), micro_batches, waited, tuple(known + bad))
            known = []

    def _prefetch_shards(self, step: int) -> None:
        """Have remote shards fetched half a shuffle window before they are due: one is in use while the next comes."""
        remote = [c for c, corpus in enumerate(self.corpora) if corpus.manifest.is_remote]
        if not remote:
            return
        shards = sum(len(corpus.by_shard.counts) for corpus in self.corpora)
        half = self._cfg.data.shuffle_window * self._order.num_images // (2 * shards)
        corpora, rows = self._order.at(self.plan.start(step) + half + np.arange(self.plan.size(step)))
        for c in remote:
            manifest = self.corpora[c].manifest
            manifest.expect(np.unique(manifest.shard_of(rows[corpora == c])).tolist())

    def _make(self, step: int) -> tuple[int, list[Batch], list[BadSample]]:
        self._prefetch_shards(step)
        positions, weights, micro = self.plan.share(step, self._seat.rank, self._seat.world)
        corpora, rows = self._order.at(positions)
        samples = self._map(
            functools.partial(first_readable, self.corpora, self._pixels.fetch, self._cfg.seed),
            *(positions.tolist(), corpora.tolist(), rows.tolist()),
        )
        batches = []
        for begin in range(0, len(positions), micro):
            part = slice(begin, begin + micro)
            changes = draw_changes(self._cfg.data.augment, self._cfg.seed, positions[part], self._cfg.data.image_size)
            batches.append(self._batch(samples[part], positions[part], weights[part], changes))
        return step, batches, [bad for sample in samples for bad in sample.bad]


class EvalLoader(_Loader):
    """One pass over a split, unaugmented. Over all ranks each sample comes once with weight 1; padding has weight 0.

    Every rank has the same number of batches of the same shape. A sample that cannot be read raises DataError: a score
    over fewer images is another score. With `skips_bad` another stands in for it with weight 0, and `bad` lists it.
    """

    def __init__(
        self,
        cfg: RunConfig,
        corpora: Sequence[Corpus],
        seat: Seat,
        cache: dict[Any, Any] | None,
        *,
        skips_bad: bool = False,
    ) -> None:
        super().__init__(cfg, corpora, seat, cache, largest=cfg.evaluate.batch)
        self._skips_bad = skips_bad
        self.bad: list[BadSample] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self._ahead(self._make, iter(self._parts())):
            yield batch

    def _parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and weights of this rank's batches; in class exact, the same batches for any number of ranks."""
        share = -(-self.num_images // self._seat.world)
        size = min(self._cfg.evaluate.batch, share)
        if self._cfg.train.exactness == "exact":  # sums over a batch depend on its shape, so ranks may not change it
            size = min(self._cfg.evaluate.batch, self.num_images)
            share = -(-self.num_images // (size * self._seat.world)) * size
        # Padding repeats the first sample with weight 0: a rank with fewer batches would leave the others waiting.
        padded = self._seat.rank * share + np.arange(-(-share // size) * size)
        weights = (padded < min((self._seat.rank + 1) * share, self.num_images)).astype(np.float32)
        positions = np.where(weights > 0, padded, 0)
        return [(positions[i : i + size], weights[i : i + size]) for i in range(0, len(padded), size)]

    def _make(self, part: tuple[np.ndarray, np.ndarray]) -> Batch:
        positions, weights = part
        starts = np.cumsum([0, *(len(corpus.rows) for corpus in self.corpora)])
        corpus = np.searchsorted(starts, positions, side="right") - 1
        rows = [int(self.corpora[c].rows[p - starts[c]]) for c, p in zip(corpus, positions, strict=True)]
        if self._skips_bad:
            read = functools.partial(first_readable, self.corpora, self._pixels.fetch, self._cfg.seed)
            samples = self._map(read, positions.tolist(), corpus.tolist(), rows)
            weights = np.where([bool(sample.bad) for sample in samples], np.float32(0), weights)
            self.bad += [bad for sample in samples for bad in sample.bad]
        else:
            samples = self._map(lambda c, row: Fetched(c, row, self._pixels.fetch(c, row), []), corpus.tolist(), rows)
        return self._batch(samples, positions, weights, no_changes(len(positions)))


def open_training(
    cfg: RunConfig,
    seat: Seat,
    cache: dict[Any, Any] | None,
    *,
    corpora: Sequence[Corpus] | None = None,
    pseudo_labelled: Sequence[Corpus] = (),
) -> TrainLoader:
    """See `ddpm_lmk.data.open_loader`; `corpora` where they are open already."""
    corpora = training_corpora(cfg) if corpora is None else corpora
    count = sum(len(corpus.rows) for corpus in corpora)
    plan = BatchPlan.of(cfg, count)
    plan.check_world(seat.world)
    if count < plan.largest:
        log.warning(
            "%d images are fewer than train.global_batch_size=%d: global batches repeat them",
            count,
            cfg.train.global_batch_size,
        )
    return TrainLoader(cfg, corpora, seat, cache, plan=plan, pseudo_labelled=pseudo_labelled)


def open_evaluation(
    cfg: RunConfig,
    seat: Seat,
    cache: dict[Any, Any] | None,
    *,
    split: str | None,
    corpora: Sequence[Corpus] | None = None,
    skips_bad: bool = False,
) -> EvalLoader:
    """See `ddpm_lmk.data.open_loader`."""
    if corpora is not None:
        return EvalLoader(cfg, corpora, seat, cache, skips_bad=skips_bad)
    split = split or cfg.evaluate.split
    if split is None:
        raise ConfigError("evaluate.split is null, so there is nothing to evaluate; name a split")
    return EvalLoader(cfg, evaluation_corpora(cfg, split), seat, cache, skips_bad=skips_bad)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
