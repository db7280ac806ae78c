"""Pseudo-labels: what a finished run finds in images without labels, where its two looks agree (docs/method.md, 10).

The first look sees the whole image, the second a crop around each point, and they fail in different ways: a point that
both find is rarely a gross miss. RUN/pseudo_labels.csv holds all that the teacher of RUN has found, and which of it RUN
learns from.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.loading.augment import move
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference.predictions import ImagePrediction
from ddpm_lmk.rundir.lock import PSEUDO_LABELS
from ddpm_lmk.system import files

COSTS = ("images", "wall_s", "tflop")  # of training, in results.json
COLUMNS = ("dataset", "image", "landmark_index", "landmark_name", "x", "y", "spread_px", "distance", "accepted")

Points = dict[int, np.ndarray]  # [N, 2] native px, by row


def write(
    folder: Path,
    spec: DatasetSpec,
    predictions: Mapping[str, ImagePrediction],
    corpora: Sequence[Corpus],
    *,
    agree: float,
    unreadable: Collection[str] = (),
) -> None:
    """Write the predictions in the images of `corpora`, whole or not at all.

    Args:
        agree: as in `data.propagate`.
        unreadable: ids of the images without a prediction, whose numbers are left empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for corpus in corpora:
        for fact in (corpus.facts(row) for row in corpus.rows.tolist()):
            image = (_digest(corpus), fact.id)
            if fact.id in unreadable:
                writer.writerows([*image, index, name, *[""] * 4, 0] for index, name in enumerate(spec.landmark_names))
                continue
            found = predictions[fact.id]
            distance = disagreement(found, fact.to_network) / corpus.image_size
            accepted = distance <= agree
            for index, name in enumerate(spec.landmark_names):
                numbers = [f"{number:.4f}" for number in (*found.points[index], found.spread_px[index])]
                writer.writerow([*image, index, name, *numbers, f"{distance[index]:.6f}", int(accepted[index])])
    files.write_text(folder / PSEUDO_LABELS, text.getvalue())


def disagreement(found: ImagePrediction, to_network: np.ndarray) -> np.ndarray:
    """Distance `[N]` in network px of what both looks found; infinite where one of them found nothing."""
    assert found.coarse is not None, "data.propagate wants task.refine"
    fine, coarse = (move(points[None], to_network[None])[0] for points in (found.points, found.coarse.points))
    distance = np.linalg.norm(fine - coarse, axis=-1)
    # Where the second look finds nothing the very point of the first stays, which nobody has agreed with.
    has_both = np.isfinite(distance) & (distance > 0) & ~found.failed & ~found.coarse.failed
    return np.where(has_both, distance, np.inf)


def read(folder: Path, corpora: Sequence[Corpus]) -> list[Points]:
    """The accepted points of every image of each corpus that has any, NaN for the others.

    Raises:
        DataError: they are of other images, or no point is accepted.
    """
    by_image: dict[tuple[str, str], list[tuple[float, float]]] = {}
    path = folder / PSEUDO_LABELS
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            point = (float(line["x"]), float(line["y"])) if line["accepted"] == "1" else (np.nan, np.nan)
            by_image.setdefault((line["dataset"], line["image"]), []).append(point)
    images = {
        (_digest(corpus), corpus.facts(row).id): (c, row)
        for c, corpus in enumerate(corpora)
        for row in corpus.rows.tolist()
    }
    if images.keys() != by_image.keys():
        others = len(images.keys() ^ by_image.keys())
        raise DataError(
            f"{path} is of other images than data.propagate finds now ({others} differ); restore the datasets it was "
            "made from, or use another --out directory"
        )
    accepted: list[Points] = [{} for _ in corpora]
    for name, (c, row) in images.items():
        points = np.array(by_image[name])
        if np.isfinite(points).any():
            accepted[c][row] = points
    if not any(accepted):
        raise DataError(
            f"{path}: in none of {len(images)} images both looks agree on a point, so there is nothing to learn from "
            "them; train longer or with more shots, raise data.propagate.agree, or leave data.propagate out"
        )
    return accepted


def _digest(corpus: Corpus) -> str:
    """Which packed set an image is of: its row alone would be another image where the set is packed again."""
    return corpus.manifest.fingerprint[:16]


def facts(
    folder: Path,
    corpora: Sequence[Corpus],
    points: Sequence[Points],
    taught_by: Mapping[str, Any] | None,
    *,
    left_out: int,
) -> dict[str, Any]:
    """What run.json and results.json say of the pool: how many images, how many points, and what they have cost.

    Images `offered` are all of the pool, those that could not be read (`unreadable`) included.

    Args:
        points: as `read` returned them.
        taught_by: results of the teacher; None where they are known already (`as_begun`).
        left_out: images that repeat another, of which nothing was asked.
    """
    images = [each for of_corpus in points for each in of_corpus.values()]
    offered = sum(len(corpus.rows) for corpus in corpora)
    text = files.read_no_follow(folder / PSEUDO_LABELS)
    lines = csv.DictReader(io.StringIO(text.decode()))
    return {
        "datasets": [corpus.manifest.dataset for corpus in corpora],
        "fingerprints": [corpus.manifest.fingerprint for corpus in corpora],
        "left_out": left_out,
        "offered": offered,
        "unreadable": len({(line["dataset"], line["image"]) for line in lines if not line["x"]}),
        "images": len(images),
        "points": int(sum(np.isfinite(each).all(-1).sum() for each in images)),
        "of": offered * len(images[0]),
        "sha256": hashlib.sha256(text).hexdigest(),
        "teachers": None if taught_by is None else _cost(taught_by),
    }


def _cost(taught_by: Mapping[str, Any]) -> dict[str, Any]:
    """Of all teachers: results of the last one hold the others', but for their number and steps."""
    train, before = taught_by["train"], (taught_by.get("pool") or {}).get("teachers", {})
    steps = train["steps"] + before.get("steps", 0)
    return {"runs": 1 + before.get("runs", 0), "steps": steps, **{key: train[key] for key in COSTS}}


def as_begun(facts: dict[str, Any], before: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The facts that a run began with, `before`, where it is resumed; DataError where its labels have changed since."""
    if before is None:
        return facts
    if changed := [key for key in before if key != "teachers" and facts.get(key) != before[key]]:
        raise DataError(
            f"the pseudo-labels of {folder} have changed since it was started ({', '.join(changed)}); restore "
            f"{PSEUDO_LABELS} and the datasets it was made from, or use another --out directory"
        )
    return before


def described(facts: Mapping[str, Any]) -> str:
    """The facts in words."""
    unreadable = f", {count:,} of which cannot be read" if (count := facts.get("unreadable")) else ""
    return (
        f"pseudo-labels for {facts['points']:,} of {facts['of']:,} points, in {facts['images']:,} of "
        f"{facts['offered']:,} images{unreadable}"
    )
