"""Augmentation drawn from `(seed, position)`, and the affine geometry of pixels and points.

Only decides; `warp` executes on pixels. One 2x3 matrix per image, acting on the column (x, y, 1), moves pixels and
points alike. Pixel centres are at integers, so a square of side S has its centre at (S - 1) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.config import AugmentConfig
from ddpm_lmk.data.loading.order import keyed_uniform

Floats = NDArray[np.float64]

_COLUMNS = 10  # one per quantity, so that switching one on leaves the draws of the others alone


@dataclass(frozen=True)
class Changes:
    """How `P` images are changed; intensities are changed after scaling to [0, 1], in the order of the fields.

    Attributes:
        matrix: `[P, 2, 3]`, network px of the unchanged image to network px of the changed one.
        is_moved: `[P]`, False where the matrix is the identity.
        gamma: `[P]` exponent, 1 for none.
        contrast: `[P]` factor around the image's mean, 1 for none.
        brightness: `[P]` offset, 0 for none.
        noise_std: `[P]` standard deviation of added Gaussian noise, 0 for none.
    """

    matrix: Floats
    is_moved: NDArray[np.bool_]
    gamma: Floats
    contrast: Floats
    brightness: Floats
    noise_std: Floats

    @property
    def is_toned(self) -> NDArray[np.bool_]:
        """`[P]`, True where intensities change."""
        return (self.gamma != 1) | (self.contrast != 1) | (self.brightness != 0) | (self.noise_std != 0)

    def __getitem__(self, chosen: slice) -> Changes:
        """The changes of some of the images."""
        return Changes(*(getattr(self, field.name)[chosen] for field in fields(self)))


def draw_changes(
    cfg: AugmentConfig, seed: int, positions: np.ndarray, size: int, *, stream: str = "augment"
) -> Changes:
    """Changes of the images at `positions` `[P]`, for a network input of side `size` px; a pure function.

    With `p` the probability: a share `p` of images is changed, each by every quantity that is switched on. `stream`
    names the purpose: crops of an image are changed in other ways than the image.
    """
    u = keyed_uniform(seed, stream, positions, _COLUMNS)
    chosen = u[:, 0] < cfg.probability
    # An image that is not chosen draws zeros, which make the identity: one path, no branches.
    signed = np.where(chosen[:, None], 2 * u - 1, 0.0)
    second = 4 if cfg.scale_axes == "shared" else 5
    matrix = about_centre(
        size,
        shift_px=signed[:, 1:3] * cfg.shift * size,
        angle=np.deg2rad(signed[:, 3] * cfg.rotate_deg),
        factors=1 + signed[:, [4, second]] * cfg.scale,
    )
    return Changes(
        matrix=snapped(matrix, size),
        is_moved=chosen & (cfg.shift > 0 or cfg.rotate_deg > 0 or cfg.scale > 0),
        gamma=np.exp(signed[:, 8] * cfg.gamma),
        contrast=1 + signed[:, 7] * cfg.contrast,
        brightness=signed[:, 6] * cfg.brightness,
        noise_std=np.where(chosen, u[:, 9], 0.0) * cfg.noise,
    )


def no_changes(count: int) -> Changes:
    """`count` images as they are."""
    return Changes(
        matrix=np.tile(np.eye(2, 3), (count, 1, 1)),
        is_moved=np.zeros(count, dtype=bool),
        gamma=np.ones(count),
        contrast=np.ones(count),
        brightness=np.zeros(count),
        noise_std=np.zeros(count),
    )


def about_centre(size: int, *, shift_px: Floats, angle: Floats, factors: Floats) -> Floats:
    """Scale by `factors` `[P, 2]`, rotate by `angle` `[P]` (radians, x towards y), shift by `shift_px` `[P, 2]`.

    Scaling and rotating leave the image centre where it is. Returns `[P, 2, 3]`.
    """
    centre = np.full(2, (size - 1) / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    linear = rotation * factors[:, None, :]
    offset = centre + shift_px - linear @ centre
    return np.concatenate([linear, offset[:, :, None]], axis=2)


def snapped(matrix: Floats, size: int) -> Floats:
    """`matrix` `[P, 2, 3]`, moved by less than 0.01 px inside `size` px so that its inverse lies on a binary grid."""
    # DALI adds up the coordinates of a row in float32. On this grid every sum is exact, and the largest difference
    # between the backends falls from 0.17 to 0.0001 grey levels of 255 (noise at 256 px); torch gains a digit, too.
    back = invert(matrix)
    quantum = 2.0 ** (math.ceil(math.log2(2 * size)) - 24)  # float32 keeps 24 bits; coordinates stay below 2 * size
    linear = np.round(back[..., :2] / (2 * quantum)) * (2 * quantum)
    offset = np.round(back[..., 2:] / quantum) * quantum
    return invert(np.concatenate([linear, offset], axis=-1))


def resize_matrix(old: int, new: int) -> Floats:
    """`[2, 3]`: px of a square of side `old` to px of the same square resized to `new`, half-pixel centres."""
    factor = new / old
    return np.array([[factor, 0, 0.5 * factor - 0.5], [0, factor, 0.5 * factor - 0.5]])


def compose(second: Floats, first: Floats) -> Floats:
    """The matrix that applies `first`, then `second`; both `[..., 2, 3]`."""
    linear = second[..., :2] @ first[..., :2]
    offset = second[..., :2] @ first[..., 2:] + second[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def invert(matrix: Floats) -> Floats:
    """The way back of `[..., 2, 3]`."""
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], axis=-1)


def move(points: Floats, matrix: Floats) -> Floats:
    """`points` `[..., N, 2]` through `matrix` `[..., 2, 3]`."""
    return points @ np.swapaxes(matrix[..., :2], -1, -2) + np.swapaxes(matrix[..., 2:], -1, -2)
