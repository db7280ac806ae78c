"""What a model predicted in images, in their own pixels, and as predictions.csv beside the labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.inference.calibration import calibration_error
from ddpm_lmk.inference.scoring import Labels
from ddpm_lmk.tasks.codecs import Decoded

COLUMNS = (
    "image_id",
    "landmark_index",
    "landmark_name",
    "x",
    "y",
    "true_x",
    "true_y",
    "error_px",
    "error_mm",
    "spread_px",
    "failed",
)


@dataclass(frozen=True)
class ImagePrediction:
    """What a model predicted in one image of N landmarks, native px."""

    points: np.ndarray  # [N, 2] float64
    spread_px: np.ndarray  # [N]
    failed: np.ndarray  # [N] bool
    peak: np.ndarray | None = None  # [N] probability of the most probable pixel of the maps
    pixel_px: float = 1.0  # side of a network pixel
    coarse: ImagePrediction | None = None  # by the first look, where there was a second

    def radius_px(self, factor: float) -> np.ndarray:
        """Radii `[N]` around the points (`inference.radius`), NaN where nothing could be read from the map."""
        return np.where(self.failed | (self.spread_px <= 0), np.nan, factor * self.spread_px)


@dataclass(frozen=True)
class PredictedFile:
    """What is known of one predicted file, for whoever writes it down (`inference.formats`).

    Points are pixels of the file as it is seen, after its EXIF rotation; the centre of the top-left one is (0, 0).
    """

    path: Path  # as the caller named it
    id: str  # the path below the folder that was given, without the suffix of a picture; no two files have the same
    grey: np.ndarray  # [H, W] uint8, the whole picture as it is seen
    landmark_names: tuple[str, ...]  # N
    prediction: ImagePrediction  # points, spread_px and failed, of N landmarks each
    radius_px: np.ndarray | None  # [N], NaN where unknown; None: the run has no radii
    coverage: float | None  # probability with which a radius holds its true point
    mm_per_px: float | None
    spacing: str | None  # where the millimetres are from, or why they are unknown
    frame: int | None  # which frame of a file with several, from 0
    weights: str  # sha256 of the file of the network's weights

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.grey.shape[1], self.grey.shape[0]


def to_native(predictions: Decoded, batch: Batch) -> list[ImagePrediction]:
    """Predictions of a batch in native pixels, one for each image; spreads grow with the mean of both scales."""
    matrix = batch.to_native.double().cpu().numpy()  # [B, 2, 3]
    points = predictions.points.double().cpu().numpy()  # [B, N, 2]
    native = points @ matrix[:, :, :2].swapaxes(1, 2) + matrix[:, None, :, 2]
    scale = np.sqrt(np.abs(np.linalg.det(matrix[:, :, :2])))[:, None]  # a squeezed image has two scales
    spread = predictions.spread_px.double().cpu().numpy() * scale
    failed = predictions.failed.cpu().numpy()
    peaks = [None] * len(native) if predictions.peak is None else predictions.peak.double().cpu().numpy()
    coarse = [None] * len(native) if predictions.coarse is None else to_native(predictions.coarse, batch)
    return [ImagePrediction(*row) for row in zip(native, spread, failed, peaks, scale[:, 0], coarse, strict=True)]


def peak_error(predictions: Sequence[ImagePrediction], labels: Labels) -> dict[str, Any]:
    """ECE of the peaks' probabilities (`calibration_error`); empty where the maps claim none."""
    peaks = [each.peak for each in predictions if each.peak is not None]
    if len(peaks) < len(predictions):
        return {}
    errors = np.linalg.norm(np.stack([each.points for each in predictions]) - labels.points, axis=-1)
    # right: within the circle that has the area of one pixel of the map
    radius = np.array([each.pixel_px for each in predictions])[:, None] / np.pi**0.5
    return calibration_error(np.stack(peaks).ravel(), (errors < radius).ravel())


def predictions_csv(spec: DatasetSpec, predictions: Sequence[ImagePrediction], labels: Labels) -> str:
    """The text of predictions.csv, in the order of `labels`: native px, errors in px, in mm where that is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each, name, true, spacing in zip(predictions, labels.ids, labels.points, labels.mm_per_px, strict=True):
        errors = np.linalg.norm(each.points - true, axis=-1)
        for index, landmark in enumerate(spec.landmark_names):
            numbers = [*each.points[index], *true[index], errors[index], errors[index] * spacing, each.spread_px[index]]
            # without a spacing there are no millimetres, and an empty cell is no number by accident
            cells = ["" if np.isnan(number) else f"{number:.4f}" for number in numbers]
            writer.writerow([name, index, landmark, *cells, int(each.failed[index])])
    return text.getvalue()
