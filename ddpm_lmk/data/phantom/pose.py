"""Where a drawn anatomy lies in its picture: one map from millimetres to pixels, used for outlines and landmarks alike.

An anatomy is described in millimetres, x to the right and y down. `Frame.px` gives it the proportions of this person
(`warp`), bends it with a smooth low-frequency ripple, turns and shifts it. Because the same function moves what is
drawn and what is labelled, landmarks are exact. `pose` draws the map so that every landmark stays inside with a margin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Warp = Callable[[np.ndarray], np.ndarray]  # points `[N, 2]` in mm to points in mm
MARGIN = 0.04  # least distance of a landmark from the border, as a share of that side


@dataclass(frozen=True)
class PoseRange:
    """Bounds of the uniform draws of a pose.

    `height_mm`: physical height of the picture, at least. `turn_deg`: largest rotation. `aspect`: width / height.
    `shift`: largest move of the landmarks' box from `centre`; both are shares of the picture's sides.
    """

    height_mm: tuple[float, float]
    turn_deg: float
    aspect: tuple[float, float]
    centre: tuple[float, float]
    shift: tuple[float, float]
    ripple_mm: float


@dataclass(frozen=True)
class Ripple:
    """A smooth displacement field: a sum of plane waves, each `[waves, 2]` with its own direction and phase."""

    waves: np.ndarray  # radians per mm
    phases: np.ndarray
    push: np.ndarray  # mm

    @classmethod
    def draw(cls, rng: np.random.Generator, amplitude_mm: float, count: int = 3) -> Ripple:
        angles, lengths = rng.uniform(0, 2 * np.pi, count), rng.uniform(140, 320, count)
        waves = (2 * np.pi / lengths)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return cls(waves, rng.uniform(0, 2 * np.pi, count), rng.uniform(-amplitude_mm, amplitude_mm, (count, 2)))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points + np.sin(points @ self.waves.T + self.phases) @ self.push


@dataclass(frozen=True)
class Frame:
    """Map from anatomy (mm) to a picture of `shape` (rows, columns), pixel centres at integers."""

    warp: Warp
    ripple: Ripple
    turn: np.ndarray  # [2, 2] rotation
    offset_mm: np.ndarray  # [2] added after rotation: picture coordinates in mm from its top-left corner
    size_mm: np.ndarray  # [2] width and height of the picture
    shape: tuple[int, int]

    @property
    def px_per_mm(self) -> float:
        return float(max(self.shape) / self.size_mm.max())

    def px(self, points: np.ndarray) -> np.ndarray:
        """Pixels `[N, 2]` of anatomical points `[N, 2]` in mm."""
        inside = self.ripple(self.warp(np.asarray(points, dtype=np.float64))) @ self.turn.T + self.offset_mm
        return inside / self.size_mm * np.array([self.shape[1], self.shape[0]]) - 0.5


def picture_shape(aspect: float, size: int) -> tuple[int, int]:
    """Rows and columns of a picture whose long side is `size`."""
    return (size, max(1, round(size * aspect))) if aspect <= 1 else (max(1, round(size / aspect)), size)


def pose(landmarks: np.ndarray, warp: Warp, bounds: PoseRange, rng: np.random.Generator, *, size: int) -> Frame:
    """Draw a frame that keeps all `landmarks` (mm, before `warp`) inside; the draws do not depend on `size`."""
    ripple = Ripple.draw(rng, bounds.ripple_mm)
    angle = np.deg2rad(rng.uniform(-bounds.turn_deg, bounds.turn_deg))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    aspect, height = rng.uniform(*bounds.aspect), rng.uniform(*bounds.height_mm)
    placed = ripple(warp(landmarks)) @ turn.T
    low, high = placed.min(axis=0), placed.max(axis=0)
    room = (high - low) / (1 - 2 * MARGIN)
    height = max(height, room[1], room[0] / aspect)
    sides = np.array([height * aspect, height])
    middle = sides * (np.array(bounds.centre) + rng.uniform(-1, 1, 2) * np.array(bounds.shift))
    start = np.clip(middle - (high - low) / 2, MARGIN * sides, (1 - MARGIN) * sides - (high - low))
    return Frame(warp, ripple, turn, start - low, sides, picture_shape(aspect, size))
