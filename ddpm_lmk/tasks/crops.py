"""Crops of the finer pixels of images: where they are cut, how they are changed, and points in and out of them.

A crop is a square around a centre, then changed as `data.augment` says: turned, scaled, toned. Every draw is a function
of `(seed, position, stream)`. Coordinates are (x, y) with pixel centres at integers, in float64 between the grids.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_lmk.config import AugmentConfig, ZoomConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.augment import draw_changes, invert, no_changes
from ddpm_lmk.data.loading.order import keyed_uniform
from ddpm_lmk.data.loading.warp import Intensity, cut, tone
from ddpm_lmk.system.accelerator import to_device

Floats = NDArray[np.float64]


class Cutter:
    """Cuts one crop of each picture, on the device the pictures are on."""

    def __init__(self, augment: AugmentConfig, *, seed: int, intensity: Intensity) -> None:
        # Where a crop lies is drawn by whoever wants it; the shift of whole images would move it once more.
        self.augment = augment.model_copy(update={"shift": 0.0})
        self.seed, self.intensity = seed, intensity

    def cut(
        self, fine: Tensor, centre: Tensor, side_px: Floats, size: int, positions: NDArray[np.int64], stream: str | None
    ) -> tuple[Tensor, Tensor]:
        """Crops `[B, 1, size, size]` in [0, 1], and `[B, 2, 3]` float64: pixels of a crop to those of its picture.

        Args:
            fine: `[B, 1, F, F]` as in a batch.
            centre: `[B, 2]` float64, px of `fine`.
            side_px: `[B]` px of `fine`; all ask for one `oversampling`.
            stream: names the draw of changes; None: crops are not changed.
        """
        if stream is None:
            changes = no_changes(len(fine))
        else:
            changes = draw_changes(self.augment, self.seed, positions, size, stream=stream)
        # Pixels of the changed crop to pixels of the crop as cut, about its centre, and from there to those of `fine`.
        matrix = invert(changes.matrix)
        matrix[:, :, 2] -= (size - 1) / 2
        matrix *= (side_px / size)[:, None, None]
        back = to_device(torch.from_numpy(matrix), fine.device)
        back[:, :, 2] += centre
        finer = int(oversampling(side_px, size).max())
        crops = cut(fine, back, size, finer=finer, intensity=self.intensity)
        if stream is not None:
            tone(crops, changes, seed=self.seed, positions=positions, stream=stream)
        return crops, back

    def zoomed(self, cfg: ZoomConfig, batch: Batch) -> Tensor:
        """The images of a batch `[B, 1, S, S]`, a share of them replaced by crops of themselves.

        The side of a crop is log-uniform between `smallest` and all of the image; it lies inside the image.
        """
        assert batch.fine is not None, "RunConfig wants data.fine_size"
        positions, size, fine_size = batch.positions.numpy(), batch.images.shape[-1], batch.fine.shape[-1]
        u = keyed_uniform(self.seed, "zoom", positions, 4)
        side = cfg.smallest ** u[:, 1]
        centre = (side[:, None] / 2 + (1 - side[:, None]) * u[:, 2:]) * fine_size - 0.5
        finer = np.where(u[:, 0] < cfg.share, oversampling(side * fine_size, size), 0)  # 0: stays a whole image
        images = batch.images.clone()
        for value in np.unique(finer[finer > 0]):
            rows = np.flatnonzero(finer == value)
            index, middle = (to_device(torch.from_numpy(a), images.device) for a in (rows, centre[rows]))
            fine = batch.fine.index_select(0, index)
            crops, _ = self.cut(fine, middle, side[rows] * fine_size, size, positions[rows], "zoom")
            images.index_copy_(0, index, crops)
        return images


def oversampling(side_px: Floats, size: int) -> NDArray[np.int64]:
    """How many times finer than its `size` each crop of `side_px` `[B]` is sampled: a power of two that misses none."""
    return 2 ** np.ceil(np.log2(np.maximum(side_px / size, 1.0)) - 1e-9).astype(np.int64)


def moved(points: Tensor, matrix: Tensor) -> Tensor:
    """`points` `[B, N, 2]` through `matrix` `[B, 2, 3]`."""
    # Written out: a product of matrices may add in another order where there are more images.
    x, y, row = points[..., 0], points[..., 1], matrix[:, None]
    return torch.stack([row[..., k, 0] * x + row[..., k, 1] * y + row[..., k, 2] for k in (0, 1)], -1)


def inverted(matrix: Tensor) -> Tensor:
    """The way back of `[B, 2, 3]`."""
    # Not torch.linalg.inv, which waits for the device to say whether it could.
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in matrix.unbind(1))
    rows = [[d, -b, b * y - d * x], [-c, a, c * x - a * y]]
    return torch.stack([torch.stack(row, -1) for row in rows], 1) / (a * d - b * c)[:, None, None]
