"""The labels of a split as arrays, and points scored against them.

What scoring needs of labels (a spacing, a place for every landmark, a distance that is not zero) is known before
anything is trained: `want_scorable` scores the labels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference import scoring


@dataclass(frozen=True)
class Labels:
    """The truth about a split, in order of id; M images, N landmarks, native px."""

    ids: list[str]
    points: np.ndarray  # [M, N, 2]
    native_size: np.ndarray  # [M, 2] (width, height)
    mm_per_px: np.ndarray  # [M], NaN where unknown


def read_labels(corpus: Corpus) -> Labels:
    """The labels of a corpus' rows, float64 as packed."""
    facts = [corpus.facts(int(row)) for row in corpus.rows]
    if any(fact.points is None for fact in facts):
        raise DataError(f"{corpus.manifest.root} has images without landmarks; evaluate a labelled split")
    return Labels(
        ids=[fact.id for fact in facts],
        points=np.stack([np.asarray(fact.points, np.float64) for fact in facts]),
        native_size=np.array([fact.native_size for fact in facts], np.float64),
        mm_per_px=np.array([fact.mm_per_px for fact in facts], np.float64),
    )


def score_points(
    spec: DatasetSpec, points: np.ndarray, labels: Labels, failed: np.ndarray | None = None
) -> dict[str, Any]:
    """Both protocols for points `[M, N, 2]` native px."""
    spacing, ids = labels.mm_per_px, labels.ids
    size, true = labels.native_size, labels.points
    return {
        "original": scoring.score_original(points, true, spacing, spec, ids=ids, failed=failed),
        "paper": scoring.score_paper(points, size, true, spec, mm_per_px=spacing, ids=ids, failed=failed),
    }


def training_shape(shots: Corpus) -> np.ndarray:
    """Mean shape `[N, 2]` of labelled training images, as shares of the picture."""
    records = [shots.records[row] for row in shots.rows.tolist()]
    points = np.stack([np.asarray(record.points, np.float64) for record in records])
    return scoring.mean_shape(points, np.array([record.native_size for record in records], np.float64))


def want_scorable(scored: Corpus, shots: Corpus) -> None:
    """Refuse what scoring would refuse after training: the labels are scored as if they had been found.

    Raises:
        DataError: a spacing is missing, or what else `scoring` cannot do without.
    """
    labels, spec = read_labels(scored), scored.manifest.spec
    for points in (labels.points, scoring.place_shape(training_shape(shots), labels.native_size)):
        score_points(spec, points, labels)
