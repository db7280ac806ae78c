"""Landmarks drawn on x-rays: predictions as crosses, labels as rings, and a line between the two.

Pictures are made anew from pixels, so nothing else of a file goes into them. Coordinates are native pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

PREDICTED = (0, 140, 255)  # BGR: orange
TRUE = (120, 220, 60)  # green
INK = (20, 20, 20)
SHIFT = 5  # fractional bits of OpenCV's coordinates: landmarks lie between pixels


def draw_overlay(
    grey: np.ndarray,
    points: np.ndarray,
    *,
    true: np.ndarray | None = None,
    circles_px: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    side: int = 1024,
) -> np.ndarray:
    """Draw on `grey` `[H, W]` uint8, resized so that its longer side is `side`; returns BGR `[h, w, 3]`.

    Args:
        points: predictions `[N, 2]`, pixels of `grey`; so are the others.
        true: labels `[N, 2]`, NaN where there is none.
        circles_px: `[N]` radii of thin circles that show the uncertainty.
        names: short labels written beside the predictions.
    """
    scale = side / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    resized = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    canvas = cv2.cvtColor(resized, cv2.COLOR_GRAY2BGR)
    placed = (np.asarray(points, np.float64) + 0.5) * scale - 0.5  # the centre of a pixel is at an integer
    unit = side / 512  # line widths and sizes follow the picture
    if circles_px is not None:
        layer = canvas.copy()  # blended, so that large circles do not hide what is below
        for point, radius in zip(placed, np.asarray(circles_px) * scale):
            _circle(layer, point, radius, PREDICTED, max(1, round(0.6 * unit)))
        canvas = cv2.addWeighted(layer, 0.6, canvas, 0.4, 0)
    if true is not None:
        labels = (np.asarray(true, np.float64) + 0.5) * scale - 0.5
        for point, label in zip(placed, labels):
            if np.isfinite(label).all():
                cv2.line(canvas, _fixed(point), _fixed(label), TRUE, max(1, round(unit)), cv2.LINE_AA, SHIFT)
                _circle(canvas, label, 3.2 * unit, TRUE, max(1, round(1.2 * unit)))
    for point in placed:
        for colour, width in ((INK, 2.6), (PREDICTED, 1.2)):  # a dark edge, seen on bone too
            _cross(canvas, point, 3.6 * unit, colour, max(1, round(width * unit)))
    for point, name in zip(placed, names or ()):
        corner = (round(point[0] + 5 * unit), round(point[1] - 5 * unit))
        for ink, width in ((INK, 3), (PREDICTED, 1)):
            thickness = max(1, round(width * unit / 2))
            cv2.putText(canvas, name, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.34 * unit, ink, thickness, cv2.LINE_AA)
    return canvas


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Any grey image stretched to its own extremes, uint8."""
    values = pixels.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)


def encode_png(picture: np.ndarray) -> bytes:
    """PNG bytes of a BGR or grey picture."""
    return _encode(".png", picture, cv2.IMWRITE_PNG_COMPRESSION, 4)


def encode_jpeg(picture: np.ndarray, quality: int = 86) -> bytes:
    """JPEG bytes of a BGR picture, for pages that carry their pictures inside."""
    return _encode(".jpg", picture, cv2.IMWRITE_JPEG_QUALITY, quality)


def _encode(suffix: str, picture: np.ndarray, option: int, value: int) -> bytes:
    is_encoded, data = cv2.imencode(suffix, picture, [option, value])
    assert is_encoded, "OpenCV encodes every picture drawn here"
    return data.tobytes()


def _fixed(point: np.ndarray) -> tuple[int, int]:
    x, y = np.rint(np.asarray(point) * (1 << SHIFT)).astype(int)
    return int(x), int(y)


def _circle(canvas: np.ndarray, center: np.ndarray, radius: float, colour: tuple[int, int, int], width: int) -> None:
    cv2.circle(canvas, _fixed(center), round(radius * (1 << SHIFT)), colour, width, cv2.LINE_AA, SHIFT)


def _cross(canvas: np.ndarray, center: np.ndarray, arm: float, colour: tuple[int, int, int], width: int) -> None:
    for dx, dy in ((arm, arm), (arm, -arm)):
        begin, end = (_fixed(np.asarray(center) + sign * np.array([dx, dy])) for sign in (-1, 1))
        cv2.line(canvas, begin, end, colour, width, cv2.LINE_AA, SHIFT)
