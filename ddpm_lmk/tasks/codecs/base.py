"""What every codec is: both ways between points and maps, in network pixels.

Coordinates are (x, y); the centre of the top-left pixel is (0, 0).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Where the images of a batch lie: `size` pixels wide and high, and the way back to their files.

    Attributes:
        native_size: `[B, 2]` (width, height) of the files.
        to_native: `[B, 2, 3]`, network pixels to native pixels, augmentation undone.
    """

    size: int
    native_size: Tensor
    to_native: Tensor


@dataclass(frozen=True)
class Decoded:
    """Landmarks read from maps: `points` and `spread_px` in network pixels, `failed` where nothing could be read."""

    points: Tensor  # [B, N, 2]
    spread_px: Tensor  # [B, N], the codec's own measure of how far off the point may be
    failed: Tensor  # [B, N] bool
    peak: Tensor | None = None  # [B, N] probability of the most probable pixel, from codecs that claim one
    coarse: Decoded | None = None  # what the first look found, where there was a second


class Codec(Protocol):
    """Both ways between points and maps."""

    full_size: bool = True  # maps have the size of the image, or are `model.pixel_unshuffle` times smaller

    @abstractmethod
    def loss(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """Loss per image `[B]` of maps `[B, N, h, w]` for `points` `[B, N, 2]`; NaN points do not count."""

    @abstractmethod
    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """Points and uncertainties read from maps `[B, N, h, w]`."""

    @abstractmethod
    def with_prior(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """Maps `[B, N, h, w]` that `decode` reads where `log_prior`, of the same shape and at most 0, is known too."""


def grid_shift(frame: Frame) -> Tensor:
    """What to add to network pixels `[B, 1, 2]` to get the released code's grid, where a landmark has x S / w.

    Its network pixel is (x + 0.5) S / w - 0.5: a shift of 0.5 - 0.5 S / w.
    """
    return (0.5 - 0.5 * frame.size / frame.native_size).unsqueeze(1)


def inside(points: Tensor, size: int) -> Tensor:
    """`[B, N]`, which points have a label that lies in the picture: augmentation may move one out."""
    return ((points >= -0.5) & (points <= size - 0.5)).all(-1)  # false for NaN


def cell_centers(maps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where the columns and rows of `maps` `[..., h, w]` lie, in network px: i at s i + (s - 1) / 2, s the stride."""
    height, width = maps.shape[-2:]
    stride_x, stride_y = size / width, size / height
    x = torch.arange(width, device=maps.device) * stride_x + (stride_x - 1) / 2
    y = torch.arange(height, device=maps.device) * stride_y + (stride_y - 1) / 2
    return x, y


def local_mean(probability: Tensor, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Mean `[B, N, 2]` of distributions `[B, N, h, w]` over the cells (at `x`, `y`) within `radius` of their peak."""
    peak = probability.flatten(2).argmax(-1)
    peak_x, peak_y = x[peak % len(x)], y[peak // len(x)]  # [B, N]
    # Only around the peak: a faint second mode across the image would pull the mean of the whole map away.
    near = (x - peak_x[..., None]).square().unsqueeze(-2) + (y - peak_y[..., None]).square().unsqueeze(-1)
    local = probability * (near <= radius**2)
    local = local / local.sum((-2, -1), keepdim=True)
    return torch.stack(((local.sum(-2) * x).sum(-1), (local.sum(-1) * y).sum(-1)), -1)
