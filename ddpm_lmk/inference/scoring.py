"""Radial errors of points, MRE and SDR under two protocols, the mean shape, mean and deviation over seeds.

Plain numpy, so that reports never wait for torch; `tasks.validation_metrics` holds the same sums as torchmetrics
classes. Protocol `original` measures annotated points in original pixels with the right spacing. Protocol `paper`
measures what the paper's released code measures (docs/method.md, section 3): on a squeezed integer grid, with labels
read back from their masks and the millimetre factors of that code, mistakes included. Points are (x, y) native pixels,
`[M, N, 2]` for M images and N landmarks; SDR counts errors at or below a threshold, in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike

from ddpm_lmk.config import ContourCodecConfig, LandmarksConfig, RunConfig
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError

PAPER_GRID = 256  # the released code resizes images, predictions and labels to it
PAPER_SIGMA_PX = 5.0  # of its label discs
DISC_REACH_PX = 6  # a disc of sigma 5 has radius 5.887: further than this from the border it is whole

Scores = dict[str, Any]
Spread = tuple[float, float | None, int]  # mean, sample standard deviation (None of one value), count


def check_temperatures(cfg: RunConfig, out: Path) -> None:
    """Raise `ConfigError` where temperatures are to be fitted and there is no split to fit them on.

    Runs begun by a version that fitted them on folds of the shots have theirs in `out` already, and are finished.
    """
    codec = cfg.task.codec if isinstance(cfg.task, LandmarksConfig) else None
    is_fitted = isinstance(codec, ContourCodecConfig) and codec.temperatures == "fitted"
    if is_fitted and cfg.data.validation_split is None and not (out / "calibration.json").exists():
        raise ConfigError(
            "task.codec.temperatures=fitted fits them on data.validation_split, which is null; name a labelled split, "
            "keep a part of the shots from training (data.hold_out='{fold: 0, of: 5}' data.validation_split=held_out), "
            "or set task.codec.temperatures=none"
        )


def check_points(predicted: np.ndarray, true: np.ndarray, ids: Sequence[str]) -> None:
    """Raise DataError for what would vanish from a mean: wrong shapes, missing labels, points that are not finite."""
    if predicted.shape != true.shape or predicted.ndim != 3 or len(ids) != len(predicted):
        raise DataError(
            f"predictions {predicted.shape} and labels {true.shape} for {len(ids)} images do not match; "
            "score the images the predictions were made for"
        )
    if not len(ids):
        raise DataError("there are no images to score; wanted at least 1, check the split")
    for what, points, remedy in (
        ("no label for every landmark", true, "evaluate a labelled split"),
        ("a prediction that is not finite", predicted, "the weights are damaged or the run diverged"),
    ):
        bad = ~np.isfinite(points).all((1, 2))
        if bad.any():
            first = ids[int(np.flatnonzero(bad)[0])]
            raise DataError(f"{int(bad.sum())} of {len(ids)} images have {what} (first: {first}); {remedy}")


def check_ids(predicted: Sequence[str], labelled: Sequence[str]) -> None:
    """Raise DataError unless predictions and labels name the same images, each once."""
    if len(set(predicted)) != len(predicted):
        raise DataError(f"{len(predicted) - len(set(predicted))} images were predicted twice; wanted each once")
    difference = sorted(set(predicted) ^ set(labelled))
    if difference:
        raise DataError(
            f"predictions and labels name different images: {len(difference)} of them, first {difference[0]}; "
            "evaluate the split the labels belong to"
        )


def score_original(
    predicted: np.ndarray,
    true: np.ndarray,
    mm_per_px: ArrayLike,
    spec: DatasetSpec,
    *,
    ids: Sequence[str] | None = None,
    failed: np.ndarray | None = None,
) -> Scores:
    """Errors in original pixels, in mm where the spec's unit is mm; `mm_per_px` is `[M]`, NaN where unknown.

    Raises:
        DataError: as `check_points`, or a spec in mm with an unknown spacing, which is never guessed.
    """
    ids = ids if ids is not None else [str(index) for index in range(len(predicted))]
    check_points(predicted, true, ids)
    errors_px = np.linalg.norm(np.asarray(predicted, np.float64) - true, axis=-1)  # [M, N]
    if spec.unit == "px":
        return _scores(errors_px, errors_px, spec, failed)
    spacing = np.broadcast_to(np.asarray(mm_per_px, np.float64), (len(predicted),))
    unknown = ~(np.isfinite(spacing) & (spacing > 0))
    if unknown.any():
        first = ids[int(np.flatnonzero(unknown)[0])]
        raise DataError(
            f"{spec.name} is scored in mm, but {int(unknown.sum())} of {len(ids)} images have no pixel spacing "
            f"(first: {first}); give mm_per_px when packing, or use a spec whose unit is px"
        )
    return _scores(errors_px * spacing[:, None], errors_px, spec, failed)


def score_paper(
    predicted: np.ndarray,
    native_size: np.ndarray,
    true: np.ndarray,
    spec: DatasetSpec,
    *,
    grid: int = PAPER_GRID,
    mm_per_px: ArrayLike = math.nan,
    ids: Sequence[str] | None = None,
    failed: np.ndarray | None = None,
) -> Scores:
    """What the released code prints: both points rounded on the squeezed `grid`, labels by way of their disc masks.

    Args:
        predicted: native pixels; a landmark that could not be decoded counts where the decoder put it.
        native_size: `[M, 2]` (width, height).
        true: native pixels.
        spec: `paper_factor` says how the released code turns grid pixels into mm for this dataset.
        grid: side of the grid; 256 there.
        mm_per_px: `[M]`, used where the spec has no fixed spacing of its own.
        ids: names of images for error messages.
        failed: `[M, N]`, landmarks the decoder gave up on.

    Raises:
        DataError: as `check_points`, or no factor from pixels to mm can be had.
    """
    ids = ids if ids is not None else [str(index) for index in range(len(predicted))]
    check_points(predicted, true, ids)
    size = np.asarray(native_size, np.float64)[:, None, :]  # [M, 1, 2]
    # no half-pixel shift: the released code multiplies and rounds half to even
    on_grid = np.rint(np.asarray(predicted, np.float64) / size * grid)
    label = label_on_grid(true, native_size, grid)
    difference = (on_grid - label) * _paper_factors(label, size, spec, grid, mm_per_px)
    errors_px = np.linalg.norm(on_grid - label, axis=-1)
    scores = _scores(np.linalg.norm(difference, axis=-1), errors_px, spec, failed)
    return scores | {"unit": "px" if spec.paper_factor == "none" else "mm", "grid": grid}


def label_on_grid(true: np.ndarray, native_size: np.ndarray, grid: int = PAPER_GRID) -> np.ndarray:
    """Labels as the released code sees them: share of the size, rounded half to even, then the mask centroid.

    Away from the border that centroid is the rounded point itself, so only discs that the border cuts are drawn.
    """
    rounded = np.rint(np.asarray(true, np.float64) / np.asarray(native_size, np.float64)[:, None, :] * grid)
    for index in np.argwhere(((rounded < DISC_REACH_PX) | (rounded > grid - 1 - DISC_REACH_PX)).any(-1)):
        x, y = rounded[tuple(index)]
        rounded[tuple(index)] = _centroid_of_disc(int(x), int(y), grid)
    return rounded


@lru_cache(maxsize=65536)
def _centroid_of_disc(x: int, y: int, grid: int) -> tuple[float, float]:
    """Rounded centroid of the contour of a disc that the border may cut; (0, 0) where the contour has no area."""
    axis = np.arange(grid, dtype=np.float64)
    weight = np.exp(
        -((axis - x) ** 2)[None, :] / (2 * PAPER_SIGMA_PX**2) - ((axis - y) ** 2)[:, None] / (2 * PAPER_SIGMA_PX**2)
    )
    mask = (weight >= 0.5 * weight.max()).astype(np.uint8)
    # the released code takes moments of the contour polygon, not of the mask: a cut disc has another centroid by it
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    moments = cv2.moments(max(contours, key=cv2.contourArea))
    if moments["m00"] == 0:
        return 0.0, 0.0
    return float(np.rint(moments["m10"] / moments["m00"])), float(np.rint(moments["m01"] / moments["m00"]))


def _paper_factors(
    label: np.ndarray, size: np.ndarray, spec: DatasetSpec, grid: int, mm_per_px: ArrayLike
) -> np.ndarray:
    """Unit per grid pixel, broadcastable to `[M, N, 2]`; x and y of the cephalograms are swapped, as released."""
    if spec.paper_factor == "none":
        return np.ones((1, 1, 1))
    if spec.paper_factor == "swapped":
        fixed = spec.spacing.mm_per_px if spec.spacing.kind == "fixed" else None
        spacing = np.asarray(fixed if fixed is not None else mm_per_px, np.float64).reshape(-1, 1, 1)
        if not np.isfinite(spacing).all():
            raise DataError(f"{spec.name} needs mm_per_px for the paper's protocol, and some images have none")
        return size[..., ::-1] / grid * spacing  # (height, width) on (x, y): the mistake is part of the protocol
    pair = spec.paper_pair or spec.spacing
    if pair.kind != "pair":
        raise DataError(f"{spec.name} has paper_factor pair_squeezed, which needs a landmark pair; none is given")
    i, j, mm = pair.i, pair.j, pair.mm
    # the pair is measured on the squeezed grid, so one factor serves both axes, though their scales differ
    length = np.linalg.norm(label[:, i] - label[:, j], axis=-1)
    if not (length > 0).all():
        raise DataError(
            f"landmarks {i} and {j} of {spec.name} fall on one grid pixel in some image, so there is no mm factor"
        )
    return (mm / length).reshape(-1, 1, 1)


def _scores(errors: np.ndarray, errors_px: np.ndarray, spec: DatasetSpec, failed: np.ndarray | None) -> Scores:
    """The block of results.json for one protocol; `errors` and `errors_px` are `[M, N]`."""
    names = spec.landmark_names
    return {
        "unit": spec.unit,
        "mre": float(errors.mean()),
        "mre_px": float(errors_px.mean()),
        "median": float(np.median(errors)),
        "sdr": _sdr(errors, spec.sdr_thresholds),
        "failed": 0 if failed is None else int(np.asarray(failed).sum()),
        "per_landmark": [
            {
                "name": names[index],
                "mre": float(errors[:, index].mean()),
                "median": float(np.median(errors[:, index])),
                "sdr": _sdr(errors[:, index], spec.sdr_thresholds),
            }
            for index in range(errors.shape[1])
        ],
    }


def _sdr(errors: np.ndarray, thresholds: Sequence[float]) -> dict[str, float]:
    return {f"{threshold:g}": 100.0 * float((errors <= threshold).mean()) for threshold in thresholds}


def mean_shape(train_points: np.ndarray, train_sizes: np.ndarray) -> np.ndarray:
    """Mean landmark positions `[N, 2]` as shares of the picture, from native points `[K, N, 2]` and sizes `[K, 2]`.

    Landmarks missing in some pictures are averaged over the others.
    """
    points, sizes = np.asarray(train_points, np.float64), np.asarray(train_sizes, np.float64)
    seen = np.isfinite(points).all(-1).any(0)
    if not len(points) or not seen.all():
        raise DataError("the mean shape needs every landmark labelled in at least one training image")
    # shares of the side, so that pictures of other sizes add; halves since pixel (0, 0) is centred at (0.5, 0.5)
    return np.nanmean((points + 0.5) / sizes[:, None, :], axis=0)


def place_shape(shape: np.ndarray, native_size: np.ndarray) -> np.ndarray:
    """The prediction that never looks at a picture: `shape` stretched to each native size, `[M, N, 2]`."""
    return shape[None] * np.asarray(native_size, np.float64)[:, None, :] - 0.5


def mean_and_std(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation (None for a single value) and count."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array)


@dataclass(frozen=True)
class Labels:
    """The truth about a split, in order of id; M images, N landmarks, native px."""

    ids: list[str]
    points: np.ndarray  # [M, N, 2]
    native_size: np.ndarray  # [M, 2] (width, height)
    mm_per_px: np.ndarray  # [M], NaN where unknown


def read_labels(corpus: Corpus) -> Labels:
    """The labels of a corpus' rows, float64 as packed; raises DataError where an image has none."""
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
) -> dict[str, Scores]:
    """Both protocols for points `[M, N, 2]` native px; raises DataError as they do."""
    true, size, spacing, ids = labels.points, labels.native_size, labels.mm_per_px, labels.ids
    return {
        "original": score_original(points, true, spacing, spec, ids=ids, failed=failed),
        "paper": score_paper(points, size, true, spec, mm_per_px=spacing, ids=ids, failed=failed),
    }


def training_shape(shots: Corpus) -> np.ndarray:
    """Mean shape `[N, 2]` of labelled training images, as shares of the picture."""
    labels = read_labels(shots)
    return mean_shape(labels.points, labels.native_size)


def check_scorable(scored: Corpus, shots: Corpus) -> None:
    """Raise before training the DataError that scoring would raise after it: the labels are scored as predictions."""
    labels, spec = read_labels(scored), scored.manifest.spec
    for points in (labels.points, place_shape(training_shape(shots), labels.native_size)):
        score_points(spec, points, labels)
