"""The radius around a predicted point that holds the true point with 90 % (docs/method.md, section 11).

A run's own measure of how far off a point may be, its spread, has no unit of probability. How many spreads the true
points are away is measured on labelled images that were left out of training (`sweep.folds` trains without them): the
conformal quantile of error / spread is the run's factor, and the radius of a point is factor times spread. A constant
radius for all points is learnt beside it, to compare. Both are in RUN/radius.json, for a mixture in RUN/parts/DATASET.

The temperatures of `inference.calibration` are another thing: they change the maps of a contour-hugging run, and with
them its points' spread; the radius comes after.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import CheckpointError, DataError
from ddpm_lmk.system.files import read_json

FILE_NAME = "radius.json"
PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Errors:
    """Errors of M images with N landmarks, as predictions.csv has them: in original px, and in mm where it says so."""

    landmarks: list[str]
    error_px: np.ndarray  # [M, N]
    error_mm: np.ndarray  # [M, N], NaN where the spacing is unknown
    spread_px: np.ndarray  # [M, N]; 0 where nothing could be read from the map

    def in_unit(self, unit: str) -> np.ndarray:
        """Errors `[M, N]` in mm or px."""
        return self.error_mm if unit == "mm" else self.error_px

    @property
    def ratio(self) -> np.ndarray:
        """How many spreads the true points are away, `[M, N]`; infinite without a spread, so that nothing holds it."""
        return np.divide(
            self.error_px, self.spread_px, out=np.full_like(self.error_px, math.inf), where=self.spread_px > 0
        )

    @property
    def scale(self) -> np.ndarray:
        """Mm per px of each image, `[M, 1]`: of the sums over its points, whose rounding is the smallest."""
        return self.error_mm.sum(1, keepdims=True) / np.maximum(self.error_px.sum(1, keepdims=True), 1e-9)


def read_errors(folders: Sequence[Path]) -> Errors:
    """predictions.csv of one or several run directories, one after the other.

    Raises:
        DataError: one is not there, damaged, or of other landmarks.
    """
    images: dict[tuple[int, str], list[dict[str, str]]] = {}
    for number, folder in enumerate(folders):
        path = folder / PREDICTIONS
        if not path.is_file():
            raise DataError(f"{path} is missing, which says how far off each point is; let the run score its split")
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                images.setdefault((number, row["image_id"]), []).append(row)
    names = [[row["landmark_name"] for row in rows] for rows in images.values()]
    if not names or any(each != names[0] for each in names):
        raise DataError(f"{', '.join(map(str, folders))} do not predict the same landmarks in every image")

    def column(key: str) -> np.ndarray:
        return np.array([[float(row[key] or "nan") for row in rows] for rows in images.values()])

    is_read = column("failed") == 0
    return Errors(names[0], column("error_px"), column("error_mm"), column("spread_px") * is_read)


def effective_count(is_within: np.ndarray) -> float:
    """How many independent points the N of M images `[M, N]` are worth, from M (all alike) to M N (independent).

    Points of one image are off together. The variance of a share over images against that of independent points is the
    design effect of a cluster sample (Kish 1965): M N points tell as much as M N / effect drawn singly.
    """
    images, points = is_within.shape
    share = float(is_within.mean())
    variance = float(is_within.mean(1).var(ddof=1)) if images > 1 else math.inf
    if variance == 0.0:
        return float(images * points)
    return float(np.clip(images * share * (1 - share) / variance, images, images * points))


def conformal_quantile(scores: np.ndarray, coverage: float) -> tuple[float | None, float]:
    """What a new score stays below with probability `coverage`, from those of left-out images `[M, N]`.

    The pooled quantile of all scores (CDF pooling, Dunn, Wasserman and Ramdas 2023) at level coverage (n + 1) / n, the
    correction of conformal prediction, where n counts independent points.

    Returns:
        The quantile, None where there are too few points for this coverage; and n.
    """
    ordered = np.sort(scores, axis=None)
    # Without the correction, only to see which points lie on the same side; below it and not at it, since of a few
    # images whose points are off alike the last would hold the quantile, and nothing would be outside.
    inner = ordered[math.ceil(round(coverage * ordered.size, 9)) - 1]
    count = effective_count(scores < inner)
    # rounded: 0.9 * 10 must not become the 10th of 9
    rank = math.ceil(round(coverage * (count + 1) / count * ordered.size, 9))
    found = float(ordered[rank - 1]) if rank <= ordered.size else math.inf
    return (found if math.isfinite(found) else None), count


def learn(held_out: Errors, *, coverage: float, unit: str) -> dict[str, Any]:
    """Factor and constant radius from the errors of left-out images; `unit` is that of the constant one."""
    factor, count = conformal_quantile(held_out.ratio, coverage)
    constant, _ = conformal_quantile(held_out.in_unit(unit), coverage)
    images, points = held_out.error_px.shape
    return {
        "coverage": coverage,
        "images": images,
        "points": images * points,
        "independent_points": round(count, 1),
        "factor": None if factor is None else round(factor, 6),
        "constant": {"radius": None if constant is None else round(constant, 6), "unit": unit},
    }


def measure(facts: Mapping[str, Any], scored: Errors) -> dict[str, Any]:
    """How many true points of scored images lie within their radius, and how large it is; for results.json.

    `facts` is the content of radius.json, with a factor.
    """
    unit, constant = facts["constant"]["unit"], facts["constant"]["radius"]
    is_within = scored.ratio <= facts["factor"]  # [M, N]
    radius = facts["factor"] * scored.spread_px * (scored.scale if unit == "mm" else 1.0)

    def block(columns: Any) -> dict[str, float]:
        share = 100.0 * float(is_within[:, columns].mean())
        return {"within_pct": round(share, 4), "mean": round(float(radius[:, columns].mean()), 4)}

    found = {"coverage": facts["coverage"], "factor": facts["factor"], "unit": unit, **block(slice(None))}
    if constant is not None:
        within = 100.0 * float((scored.in_unit(unit) <= constant).mean())
        found["constant"] = {"within_pct": round(within, 4), "mean": constant}
    return found | {"per_landmark": [{"name": name, **block(i)} for i, name in enumerate(scored.landmarks)]}


def read(folder: Path, spec: DatasetSpec, **steps: int) -> dict[str, Any] | None:
    """radius.json of a folder, if it belongs to this dataset and to weights of these `steps`; None where not.

    A run that was made longer has other weights than those that the radius was learnt for.

    Raises:
        CheckpointError: it holds no radius, or that of other landmarks.
    """
    path = folder / FILE_NAME
    return check(read_json(path) or {}, spec, source=path, **steps) if path.exists() else None


def check(facts: dict[str, Any], spec: DatasetSpec, *, source: Path, **steps: int) -> dict[str, Any] | None:
    """As `read`, of the content of such a file, which lies at `source`."""
    factor = facts.get("factor", 0)  # null: there were too few points
    if factor is not None and not (isinstance(factor, float) and 0.0 < factor < math.inf):
        raise CheckpointError(f"{source} holds no radius; `ddpm-lmk calibrate` writes it again, or remove it")
    if facts.get("spec") != spec.name or any(facts.get(key) != value for key, value in steps.items()):
        return None
    if facts.get("landmarks") != list(spec.landmark_names):
        raise CheckpointError(
            f"{source} is of {len(facts.get('landmarks') or ())} other landmarks than the {spec.num_landmarks} of "
            f"{spec.name}; `ddpm-lmk calibrate` writes it again, or remove it"
        )
    return facts if factor is not None else None
