"""Unreadable samples of a run: what stands in for them, the list over all ranks, the end where there are too many.

Whether a sample is bad follows from its bytes, and what stands in for it from its position, so a resumed run meets the
same ones at the same steps. The list is a report and a count; nothing is decided by reading it. A file system that
fails makes no sample bad: its reads are tried again (`shards.remote.with_retries`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.loading.order import keyed_uniform
from ddpm_lmk.data.shards.index import SplitRows
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.errors import DataError

log = logging.getLogger(__name__)

# Always tolerated, so that a small dataset survives a few (docs/faults.md, B26); a shard may be all bad below it.
BUDGET_FLOOR = 10
_SUBSTITUTES = 16  # tries at finding a readable sample for a position


class BadSample(NamedTuple):
    """A sample that one rank met and could not read."""

    corpus: int
    row: int
    reason: str


class Fetched(NamedTuple):
    """A sample on its way into a batch: what the pixels' `fetch` returned, and the bad ones met before it."""

    corpus: int
    row: int
    pixels: Any
    bad: list[BadSample]


def first_readable(
    corpora: Sequence[Corpus], fetch: Callable[[int, int], Any], seed: int, position: int, corpus: int, row: int
) -> Fetched:
    """The sample at a position, or the first readable substitute: a function of seed, position and the bytes.

    Args:
        fetch: reads the pixels of (corpus, row); raises CorruptSampleError.

    Raises:
        DataError: none of those drawn for this position can be read.
    """
    met: list[BadSample] = []
    for candidate in itertools.chain([row], _substitutes(corpora[corpus], seed, position)):
        try:
            return Fetched(corpus, candidate, fetch(corpus, candidate), met)
        except CorruptSampleError as error:
            met.append(BadSample(corpus, candidate, str(error)))
    raise DataError(
        f"{corpora[corpus].manifest.root}: none of {_SUBSTITUTES + 1} samples drawn for position {position} "
        f"can be read, last: {met[-1].reason}; run `ddpm-lmk shards verify` and pack again"
    )


def _substitutes(used: Corpus, seed: int, position: int) -> Iterator[int]:
    """Rows to try instead, of the same dataset, so that the weights of a pool hold; drawn only when they are needed."""
    picks = keyed_uniform(seed, "substitute", np.array([position]), _SUBSTITUTES)[0] * len(used.rows)
    yield from used.rows[picks.astype(np.int64)].tolist()


class Quarantine:
    """The bad samples all ranks know of.

    Attributes:
        entries: one dict each, in the order they were listed: step, pack (place among the corpora), dataset, row, id
            (digest of the image as it was packed), reason.
    """

    def __init__(self, corpora: Sequence[Corpus], max_bad_fraction: float) -> None:
        self.entries: list[dict[str, Any]] = []
        self._corpora, self._fraction = corpora, max_bad_fraction
        self._num_images = sum(len(corpus.rows) for corpus in corpora)
        self._seen: set[tuple[int, int]] = set()

    def recall(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take up the list of the run that is resumed here.

        Those of step 0 are left: in the pool of pseudo-labels, no longer drawn, counted where the teacher was asked.
        """
        for entry in entries:
            if entry["step"] > 0:
                self._seen.add((entry["pack"], entry["row"]))
                self.entries.append(entry)

    def news(self, met: Iterable[BadSample]) -> list[BadSample]:
        """Those that are not listed yet."""
        return [bad for bad in met if (bad.corpus, bad.row) not in self._seen]

    def merge(self, met: Iterable[BadSample], *, step: int) -> list[dict[str, Any]]:
        """List what the ranks met up to `step`, each sample once; returns the new entries, the same on every rank."""
        fresh = []
        for bad in sorted(set(met)):  # ranks meet them in any order, and all have to write the same list
            if (bad.corpus, bad.row) in self._seen:
                continue
            self._seen.add((bad.corpus, bad.row))
            manifest = self._corpora[bad.corpus].manifest
            # Names may be those of patients; the digest of the packed image finds the sample again.
            digest = manifest.index[bad.row]["sha256"].tobytes().hex()
            place = {"pack": bad.corpus, "dataset": manifest.dataset, "row": bad.row, "id": digest}
            fresh.append({"step": step, **place, "reason": bad.reason})
            log.warning("sample left out: %s (id %s)", bad.reason, digest)
        self.entries += fresh
        return fresh

    def check(self) -> None:
        """Raise DataError if more than max(10, max_bad_fraction) are bad, or all of a shard of more than 10 samples."""
        if len(self.entries) > max(BUDGET_FLOOR, self._fraction * self._num_images):
            raise DataError(
                f"{len(self.entries)} of {self._num_images} samples cannot be read (data.max_bad_fraction="
                f"{self._fraction:g}), last: {self.entries[-1]['reason']}; run `ddpm-lmk shards verify` and pack again"
            )
        for corpus, used in enumerate(self._corpora):
            self._check_shards(corpus, used)

    def _check_shards(self, corpus: int, used: Corpus) -> None:
        rows = np.array(sorted(row for c, row in self._seen if c == corpus), dtype=np.int64)
        shards, counts = np.unique(used.manifest.shard_of(rows), return_counts=True)
        for shard, bad in zip(shards.tolist(), counts.tolist()):
            if bad <= BUDGET_FLOOR:
                continue
            first, end = used.manifest.starts[shard : shard + 2].tolist()
            present = np.asarray(used.rows.within(first, end) if isinstance(used.rows, SplitRows) else used.rows)
            if bad == int(((present >= first) & (present < end)).sum()):
                raise DataError(f"shard {shard} of {used.manifest.root} is wholly bad; restore it or pack again")
