"""Phantoms: x-ray-like pictures drawn from rules, with exact landmarks, for the demo and the tests.

Three kinds: `chest` (6 landmarks, the places of the Shenzhen set), `skull` (19, the cephalometric set) and `hand` (37,
the order of Payer's hand atlas). Each is a stack of attenuating layers (`chest`, `skull`, `hand`) in a random pose,
added up on a `canvas` and turned into a radiograph (`exposure`). They have the look and the difficulty of
radiographs, not their statistics: numbers measured on them say nothing about patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddpm_lmk.data.phantom.canvas import Canvas, pose
from ddpm_lmk.data.phantom.chest import Chest
from ddpm_lmk.data.phantom.exposure import Anatomy, develop
from ddpm_lmk.data.phantom.hand import Hand
from ddpm_lmk.data.phantom.skull import Skull
from ddpm_lmk.errors import ConfigError

ANATOMIES: dict[str, type[Anatomy]] = {"chest": Chest, "skull": Skull, "hand": Hand}
LANDMARK_NAMES: dict[str, tuple[str, ...]] = {kind: anatomy.names for kind, anatomy in ANATOMIES.items()}


@dataclass(frozen=True)
class Phantom:
    """`image` uint16 `[H, W]` over the full range; `points` float64 `[N, 2]`, (x, y) in its pixels; mm of one pixel."""

    image: np.ndarray
    points: np.ndarray
    mm_per_px: float


def render(kind: str, seed: int, index: int, size: int = 256) -> Phantom:
    """Draw phantom number `index` of the series `seed` (both >= 0): a pure function.

    The anatomy is the same at every `size` (long side, pixels). Raises `ConfigError` for an unknown kind or a size
    below 32.
    """
    if kind not in ANATOMIES:
        raise ConfigError(f"unknown phantom kind {kind!r}; use one of {', '.join(ANATOMIES)}")
    if size < 32:
        raise ConfigError(f"phantom size is {size} pixels, wanted at least 32")
    # One generator for each stage: a draw more in one of them does not change the others.
    root = np.random.SeedSequence([list(ANATOMIES).index(kind), seed, index])
    shape, place, texture, paint, exposure, grain = (np.random.default_rng(child) for child in root.spawn(6))
    anatomy = ANATOMIES[kind](shape)
    frame = pose(anatomy.landmarks, anatomy.warp, anatomy.pose_range, place, size=size)
    canvas = Canvas(frame, texture)
    anatomy.paint(canvas, paint)
    points = frame.px(anatomy.landmarks)
    image = develop(canvas, points, anatomy.exposure, rng=exposure, grain=grain)
    return Phantom(image, points, 1 / frame.px_per_mm)
