"""What a model found in images, in their own pixels, beside the labels, and as predictions.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
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
class Found:
    """What a model found in one image, native px."""

    points: np.ndarray  # [N, 2] float64
    spread_px: np.ndarray  # [N]
    failed: np.ndarray  # [N] bool
    peak: np.ndarray | None = None  # [N] probability of the most probable pixel of the maps
    pixel_px: float = 1.0  # side of a network pixel


def to_native(predictions: Decoded, batch: Batch) -> list[Found]:
    """Predictions of a batch in native pixels, one `Found` per image; spreads grow with the mean of both scales."""
    matrix = batch.to_native.double().cpu().numpy()  # [B, 2, 3]
    points = predictions.points.double().cpu().numpy()
    native = points @ matrix[:, :, :2].swapaxes(1, 2) + matrix[:, None, :, 2]
    scale = np.sqrt(np.abs(np.linalg.det(matrix[:, :, :2])))[:, None]
    spread = predictions.spread_px.double().cpu().numpy() * scale
    failed = predictions.failed.cpu().numpy()
    peaks = [None] * len(native) if predictions.peak is None else predictions.peak.double().cpu().numpy()
    return [Found(*row) for row in zip(native, spread, failed, peaks, scale[:, 0], strict=True)]


def peak_error(found: list[Found], labels: Labels) -> dict[str, Any]:
    """ECE of the peaks' probabilities; nothing where the maps claim none."""
    peaks = [each.peak for each in found if each.peak is not None]
    if len(peaks) < len(found):
        return {}
    points = np.stack([each.points for each in found])
    errors = np.linalg.norm(points - labels.points, axis=-1)
    radius = np.array([each.pixel_px for each in found])[:, None] / np.pi**0.5
    return calibration_error(np.stack(peaks).ravel(), (errors < radius).ravel())


def predictions_csv(spec: DatasetSpec, found: Mapping[str, Found], labels: Labels) -> str:
    """The text of predictions.csv: native px, errors in px, and in mm where the spacing is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, true, spacing in zip(labels.ids, labels.points, labels.mm_per_px, strict=True):
        here = found[name]
        errors = np.linalg.norm(here.points - true, axis=-1)
        for index, landmark in enumerate(spec.landmark_names):
            numbers = [*here.points[index], *true[index], errors[index], errors[index] * spacing, here.spread_px[index]]
            cells = ["" if np.isnan(number) else f"{number:.4f}" for number in numbers]
            writer.writerow([name, index, landmark, *cells, int(here.failed[index])])
    return text.getvalue()
