"""A frontal chest: lungs with their corners, and the proportions of one person.

The 6 landmarks are those labelled on the Shenzhen set (paper.md, section 4), in its order: apex, costophrenic angle
and cardiophrenic angle of the lung on the picture's left, then of the other. Millimetres, origin at the middle of the
thorax. `chest_layers` draws it.
"""
# ruff: noqa: RUF005  (points are arrays: + adds, it does not join)

from __future__ import annotations

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, smooth
from ddpm_lmk.data.phantom.chest_layers import LAYERS
from ddpm_lmk.data.phantom.film import FilmStyle
from ddpm_lmk.data.phantom.pose import PoseRange

NAMES: tuple[str, ...] = (
    "right_apex", "right_costophrenic", "right_cardiophrenic", "left_apex", "left_costophrenic", "left_cardiophrenic",
)  # fmt: skip


class Chest:
    """Geometry of one thorax in mm; `landmarks [6, 2]`; `lungs` are two outlines with sharp lower corners."""

    names = NAMES
    pose_range = PoseRange(
        height_mm=(345, 455), turn_deg=9, aspect=(0.84, 1.14), centre=(0.5, 0.46), shift=(0.1, 0.09), ripple_mm=3.0
    )
    film = FilmStyle(
        texts=("L", "R", "L pa", "R AP", "PORTABLE", "PA 12"),
        scatter=(0.15, 0.5),
        dark_pct=(0.5, 8),
        bright_pct=(90, 99.7),
        gamma=(0.75, 1.5),
    )

    def __init__(self, rng: np.random.Generator) -> None:
        self.width, self.height = rng.uniform(0.82, 1.15), rng.uniform(0.78, 1.18)
        self.scoliosis, self.sag = rng.uniform(-14, 14), rng.uniform(-0.07, 0.07)
        self.heart = rng.uniform(0.72, 1.35)  # width of its left half, 1: normal
        apex, corner = rng.uniform(-7, 7, (2, 2)), rng.uniform((-8, -13), (8, 13), (2, 2))
        foot, dome = rng.uniform(-10, 10, 2), rng.uniform(0.3, 1.15, 2)
        border = np.array([(66, 42), (46, 2)]) * (self.heart, 1)
        right = np.array([(-47, -146) + apex[0], (-134, 104) + corner[0], (-38, 60 + foot[0])])
        left = np.array([(47, -146) + apex[1], (134, 104) + corner[1], (74 * self.heart, 76 + foot[1])])
        self.lungs = [
            _lung(right, np.array([(-40, 25), (-36, -15), (-30, -55), (-25, -100)]), rise=28 * dome[0]),
            _lung(left, np.array([*border, (34, -32), (33, -62), (24, -100)]), rise=20 * dome[1]),
        ]
        self.landmarks = np.concatenate([right, left])

    def warp(self, points: np.ndarray) -> np.ndarray:
        """Proportions of this person: width, height, a bent spine, one side lower than the other."""
        x, y = points[..., 0], points[..., 1]
        bent = self.width * x + self.scoliosis * np.sin(y / 110)
        return np.stack([bent, self.height * y + self.sag * x], axis=-1)

    def paint(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Draw every layer, the trunk first."""
        for layer in LAYERS:
            layer(self, canvas, rng)


def _lung(marks: np.ndarray, medial: np.ndarray, *, rise: float) -> np.ndarray:
    """Outline through apex, corner and foot (`marks`), along `medial` points and a diaphragm that is `rise` mm high."""
    apex, corner, foot = marks
    side = np.sign(corner[0])
    up = smooth([foot, *medial, apex + (-14 * side, 13), apex, apex + (25 * side, 5), apex + (51 * side, 31),
                 (119 * side, -62), (130 * side, -5), corner + (2 * side, -42), corner])  # fmt: skip
    share, lift = np.array([0.28, 0.6, 0.88])[:, None], np.array([0.75 * rise + 6, rise + 4, 0.5 * rise])
    arch = corner + share * (foot - corner) - np.stack([0 * lift, lift], axis=1)
    floor = smooth([corner, corner + (-8 * side, -17), *arch, foot])
    return np.concatenate([up[:-1], floor[:-1]])
