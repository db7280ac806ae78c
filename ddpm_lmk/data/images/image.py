"""A decoded x-ray, and what is refused: shapes and contents that no x-ray has, whatever the container of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

MAX_PIXELS = 64_000_000
_MIN_SIDE = 16
_MAX_ASPECT = 10.0
_MIN_LEVELS = 16  # distinct grey levels; the real sets have at least 105
_MAX_AT_EXTREME = 0.9  # black backgrounds of hand x-rays reach 0.75; a clipped 12-bit file 0.94


class RefusedImageError(Exception):
    """An image that is left out: a code that programs read and the reason; never seen by users as an error."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class ReadOptions:
    """What may be read, and what of it is applied."""

    frame: int | None = None  # of a file with several; None: such files are refused
    voi: bool = False  # apply the grey window a DICOM file carries
    allow_burned_in: bool = False
    only_dicom: bool = False  # an export of x-rays may hold pictures that are none


@dataclass(frozen=True)
class DecodedImage:
    """Grey pixels. `facts` are technical: format, bits, and what was applied to the stored values."""

    pixels: np.ndarray  # [H, W] uint8, uint16, or float32 for deeper files
    facts: dict[str, Any] = field(default_factory=dict)
    full_range: tuple[float, float] | None = None  # black and white by the file's own terms; None: that of the type
    is_windowed: bool = False  # the file's own grey window has been applied: full_range is what to show
    mm_per_px: float | None = None
    patient: str | None = None  # as the file has it: only its keyed hash may be written anywhere

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        height, width = self.pixels.shape
        return width, height


def check_frame(frames: int, frame: int | None) -> None:
    """Refuse files with several frames, unless one that exists is asked for."""
    if frames > 1 and frame is None:
        raise RefusedImageError("FRAMES", f"{frames} frames; one image per file is wanted, or name one with --frame")
    if frame is not None and frames > 1 and frame >= frames:
        raise RefusedImageError("FRAMES", f"{frames} frames, and --frame {frame} counts from 0")


def check_shape(width: int, height: int) -> None:
    """Refuse what is too large to decode, or no x-ray by its shape."""
    if width * height > MAX_PIXELS:
        raise RefusedImageError(
            "TOO_LARGE", f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} million pixels"
        )
    if min(width, height) < _MIN_SIDE or max(width, height) > _MAX_ASPECT * min(width, height):
        raise RefusedImageError("SHAPE", f"{width} x {height} is too small or too narrow for an x-ray")


def check_information(pixels: np.ndarray) -> None:
    """Refuse what no x-ray looks like: not finite, constant, a handful of grey levels, nearly all at one extreme."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedImageError("LOW_INFORMATION", "pixels that are not finite")
    low, high = pixels.min(), pixels.max()
    if low == high:
        raise RefusedImageError("LOW_INFORMATION", "constant image")
    # Strided rows are enough to prove there are many levels; only a poor image is counted in full.
    if len(np.unique(pixels[:: max(1, len(pixels) // 64)])) < _MIN_LEVELS and len(np.unique(pixels)) < _MIN_LEVELS:
        raise RefusedImageError("LOW_INFORMATION", f"low information: fewer than {_MIN_LEVELS} grey levels")
    for extreme in (low, high):
        share = np.count_nonzero(pixels == extreme) / pixels.size
        if share > _MAX_AT_EXTREME:
            raise RefusedImageError("LOW_INFORMATION", f"low information: {share:.0%} of the pixels have one value")


def luma(rgb: np.ndarray) -> np.ndarray:
    """Grey of `[H, W, 3]`; exactly the channels' value where the three are equal, which weights would round."""
    first = rgb[..., 0]
    if np.array_equal(first, rgb[..., 1]) and np.array_equal(first, rgb[..., 2]):
        return np.ascontiguousarray(first)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
