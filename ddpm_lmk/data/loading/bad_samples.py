"""Samples that are left out because they cannot be read: which, listed once over all ranks, and when it is too much.

Whether a sample is bad follows from its bytes, and what stands in for it from its position, so a run that is killed and
continued finds the same ones at the same steps. The list is a report and a count; nothing is decided by reading it. A
file system that fails makes no sample bad (`retries`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.shards.index import SplitRows
from ddpm_lmk.errors import DataError

log = logging.getLogger(__name__)

BUDGET_FLOOR = 10  # bad samples that are always tolerated (failures.md, B26)


class BadSample(NamedTuple):
    """A sample that one rank met and could not read."""

    corpus: int
    row: int
    reason: str


class Quarantine:
    """The bad samples all ranks know of.

    Attributes:
        entries: one dict each, in the order they were listed: step, pack (place in data.path), dataset, row, id (digest
            of the image as it was packed), reason.
    """

    def __init__(self, corpora: Sequence[Corpus], max_bad_fraction: float) -> None:
        self.entries: list[dict[str, Any]] = []
        self._corpora, self._fraction = corpora, max_bad_fraction
        self._num_images = sum(len(corpus.rows) for corpus in corpora)
        self._seen: set[tuple[int, int]] = set()

    def recall(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take up the list of the run that is continued here."""
        for entry in entries:
            self._seen.add((entry["pack"], entry["row"]))
            self.entries.append(entry)

    def news(self, met: Iterable[BadSample]) -> list[BadSample]:
        """Those that are not listed yet."""
        return [bad for bad in met if (bad.corpus, bad.row) not in self._seen]

    def merge(self, met: Iterable[BadSample], *, step: int) -> list[dict[str, Any]]:
        """List what the ranks met up to `step`, each sample once; returns the new entries, the same on every rank."""
        fresh = []
        for bad in sorted(set(met)):
            if (bad.corpus, bad.row) in self._seen:
                continue
            self._seen.add((bad.corpus, bad.row))
            manifest = self._corpora[bad.corpus].manifest
            digest = manifest.index[bad.row]["sha256"].tobytes().hex()
            place = {"pack": bad.corpus, "dataset": manifest.dataset, "row": bad.row, "id": digest}
            fresh.append({"step": step, **place, "reason": bad.reason})
            log.warning("sample left out: %s", bad.reason)
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
