"""From attenuation to a radiograph: beam, scatter, quantum noise, blur, window, collimation, marker.

Beer-Lambert: the primary beam behind the patient is I_0 exp(-path). The picture is bright where little arrives, as bone
is in clinical use. Everything but the photon noise is the same at every picture size; photons go with pixel area.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, PoseRange

FONT = cv2.FONT_HERSHEY_SIMPLEX
MARKER_GRID = 512  # markers are written on a grid with this long side, then resized


@dataclass(frozen=True)
class ExposureRange:
    """How x-rays of one kind are taken and shown; pairs are bounds of uniform draws."""

    texts: tuple[str, ...]  # one is burned in
    scatter: tuple[float, float]  # share of what arrives
    dark_pct: tuple[float, float]  # percentile shown as black
    bright_pct: tuple[float, float]  # percentile shown as white
    gamma: tuple[float, float]


class Anatomy:
    """One person's geometry in mm, drawn from the generator given to the constructor."""

    names: tuple[str, ...]
    pose_range: PoseRange
    exposure: ExposureRange
    layers: tuple[Callable[[Any, Canvas, np.random.Generator], None], ...] = ()
    landmarks: np.ndarray  # [N, 2], before `warp`

    def __init__(self, rng: np.random.Generator) -> None: ...

    def warp(self, points: np.ndarray) -> np.ndarray:
        """Proportions: points `[..., 2]` in mm to points in mm."""
        raise NotImplementedError

    def paint(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Add every layer to the canvas."""
        for layer in self.layers:
            layer(self, canvas, rng)


def develop(
    canvas: Canvas,
    landmarks_px: np.ndarray,
    style: ExposureRange,
    *,
    rng: np.random.Generator,
    grain: np.random.Generator,
) -> np.ndarray:
    """Turn the path of `canvas` into a picture uint16 `[H, W]` over the full range; `grain` draws per pixel."""
    signal = _expose(canvas, style, rng, grain)
    shown = _window(signal, style, rng)
    shown = _collimate(shown, landmarks_px, rng)
    shown = _mark(shown, landmarks_px, style, rng)
    return np.round(np.clip(shown, 0, 1) * 65535).astype(np.uint16)


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Normalised picture coordinates: x `[1, W]` and y `[H, 1]` in (-1, 1)."""
    height, width = shape
    x = (2 * np.arange(width, dtype=np.float32) + 1) / width - 1
    y = (2 * np.arange(height, dtype=np.float32) + 1) / height - 1
    return x[None, :], y[:, None]


def _expose(canvas: Canvas, style: ExposureRange, rng: np.random.Generator, grain: np.random.Generator) -> np.ndarray:
    """Log signal -ln(I / I_0) after heel effect, scatter, photon noise and detector blur."""
    x, y = _grid(canvas.frame.shape)
    tilt, dome, share = rng.uniform(-0.16, 0.16, 2), rng.uniform(0, 0.25), rng.uniform(*style.scatter)
    beam = 1 + np.float32(tilt[0]) * x + np.float32(tilt[1]) * y - np.float32(dome / 2) * (x * x + y * y)
    primary = np.exp(-np.maximum(canvas.path, 0)) * beam
    scatter = canvas.blur(primary, float(canvas.frame.size_mm.max() / 12))
    arriving = (1 - share) * primary + share * scatter + rng.uniform(0.0005, 0.003)
    dose = 10 ** rng.uniform(3.6, 4.9) * (256 / max(canvas.frame.shape)) ** 2  # photons per pixel of the open beam
    arriving = arriving + np.sqrt(arriving / np.float32(dose)) * grain.standard_normal(arriving.shape, dtype=np.float32)
    blur_share = rng.uniform(0.0009, 0.0024)
    arriving = canvas.blur(arriving, float(canvas.frame.size_mm.max() * blur_share))
    return -np.log(np.maximum(arriving, 2e-4))


def _window(signal: np.ndarray, style: ExposureRange, rng: np.random.Generator) -> np.ndarray:
    """Choose what is black and white from the image's own percentiles, then bend by gamma and a film curve."""
    dark, bright = rng.uniform(*style.dark_pct), rng.uniform(*style.bright_pct)
    gamma, curve = rng.uniform(*style.gamma), rng.uniform(0, 0.6)
    low, high = np.percentile(cv2.resize(signal, (64, 64), interpolation=cv2.INTER_AREA), [dark, bright])
    floor, ceiling = rng.uniform(0.0, 0.14), rng.uniform(0.82, 1.0)
    level = np.clip((signal - low) / max(float(high - low), 1e-3), 0, 1.15) ** gamma
    bent = level * level * (3 - 2 * np.minimum(level, 1))
    return floor + (ceiling - floor) * ((1 - curve) * level + curve * bent)


def _collimate(shown: np.ndarray, landmarks_px: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shade what lies outside the shutters, which never cover a landmark."""
    height, width = shown.shape
    sides = np.array([width, height], dtype=np.float64)
    low, high = (landmarks_px.min(axis=0) + 0.5) / sides, (landmarks_px.max(axis=0) + 0.5) / sides
    reach = np.maximum(np.concatenate([low, 1 - high]) - 0.04, 0) * 0.8
    closed = np.where(rng.random(4) < 0.35, rng.uniform(0, 1, 4) * np.minimum(reach, 0.22), -0.1)
    skew, sharpness = rng.uniform(-0.02, 0.02, 4), rng.uniform(250, 900)
    level = rng.choice([0.0, 0.04, 0.97], p=[0.5, 0.35, 0.15])
    x, y = _grid(shown.shape)
    u, v = (x + 1) / 2, (y + 1) / 2
    across = np.minimum(u - closed[0] + skew[0] * (v - 0.5), 1 - u - closed[2] + skew[2] * (v - 0.5))
    along = np.minimum(v - closed[1] + skew[1] * (u - 0.5), 1 - v - closed[3] + skew[3] * (u - 0.5))
    open_share = np.clip(np.minimum(across, along) * sharpness + 0.5, 0, 1)
    return (level + (shown - level) * open_share).astype(np.float32)


def _mark(shown: np.ndarray, landmarks_px: np.ndarray, style: ExposureRange, rng: np.random.Generator) -> np.ndarray:
    """Burn a letter or a text in, at the one of several places that is farthest from every landmark."""
    height, width = shown.shape
    ratio = MARKER_GRID / max(height, width)
    grid = np.array([round(width * ratio), round(height * ratio)])
    text, scale, value = str(rng.choice(style.texts)), rng.uniform(0.5, 1.3), rng.uniform(0.75, 1.0)
    thickness, draws = int(rng.integers(1, 4)), rng.uniform(0.02, 0.98, (10, 2))
    extent = np.array(cv2.getTextSize(text, FONT, scale, thickness)[0])
    centres = extent / 2 + draws * (grid - extent)
    gaps = np.linalg.norm(centres[:, None] - (landmarks_px + 0.5) * ratio, axis=2).min(axis=1)
    left, bottom = centres[np.argmax(gaps)] + extent * (-0.5, 0.5)
    glyphs = np.zeros((grid[1], grid[0]), np.uint8)
    cv2.putText(glyphs, text, (int(left), int(bottom)), FONT, scale, 255, thickness, cv2.LINE_AA)
    method = cv2.INTER_AREA if ratio > 1 else cv2.INTER_LINEAR
    ink = cv2.resize(glyphs, (width, height), interpolation=method).astype(np.float32) / 255
    return shown + (np.float32(value) - shown) * ink
