"""Test-time augmentation: points as the mean over slightly moved views of an image, weighted by their certainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.tasks.codecs import Codec, Decoded, Frame

SHIFT = 0.02  # of the image side
SCALE = 0.04
ROTATION = 0.05  # radians, about 3 degrees
# The real root of x^5 = x + 1, the golden ratio of four dimensions: its powers give the additive recurrence that
# spreads points evenly however many there are, so 4 views are not the first half of a lattice of 8.
RATIO = 1.1673039782614187


def predict_over_views(
    maps_of: Callable[[Tensor], Tensor], images: Tensor, *, codec: Codec, frame: Frame, count: int
) -> Decoded:
    """Points of `images` `[B, 1, S, S]` in network pixels, from `count` views of each.

    Args:
        maps_of: the network, images to maps.
    """
    return combined([_decode_view(maps_of, images, codec, frame, matrix) for matrix in view_matrices(count)])


def view_matrices(count: int) -> list[Tensor]:
    """`count` matrices `[2, 3]` in normalised coordinates: the identity, then small moves of a fixed sequence."""
    matrices = [torch.eye(2, 3)]
    for index in range(1, count):
        right, down, larger, turned = (2 * ((0.5 + index * RATIO**-dim) % 1.0) - 1 for dim in range(1, 5))  # in [-1, 1)
        shift_x, shift_y = 2 * SHIFT * right, 2 * SHIFT * down  # twice: normalised coordinates span 2
        scale, rotation = torch.tensor(SCALE * larger).exp(), torch.tensor(ROTATION * turned)
        cos, sin = scale * rotation.cos(), scale * rotation.sin()
        matrices.append(torch.stack([cos, -sin, torch.tensor(shift_x), sin, cos, torch.tensor(shift_y)]).view(2, 3))
    return matrices


def _decode_view(
    maps_of: Callable[[Tensor], Tensor], images: Tensor, codec: Codec, frame: Frame, matrix: Tensor
) -> Decoded:
    """Points seen in the view whose pixel p shows the image at `matrix` applied to p (normalised coordinates)."""
    size, matrix = frame.size, to_device(matrix, images.device).to(images)
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    decoded = codec.decode(maps_of(F.grid_sample(images, grid, padding_mode="border", align_corners=False)), frame)
    unit = (decoded.points + 0.5) * (2 / size) - 1  # [B, N, 2] in [-1, 1]
    back = unit @ matrix[:, :2].T + matrix[:, 2]
    # A failed point is a marker such as (0, 0), which no view moves.
    points = torch.where(decoded.failed.unsqueeze(-1), decoded.points, (back + 1) * (size / 2) - 0.5)
    return Decoded(points, decoded.spread_px, decoded.failed, decoded.peak)


def combined(views: Sequence[Decoded]) -> Decoded:
    """The mean with weights 1 / spread^2 over views that did not fail; its spread includes how far they disagree."""
    points = torch.stack([view.points for view in views])  # [V, B, N, 2]
    spread = torch.stack([view.spread_px for view in views])
    failed = torch.stack([view.failed for view in views])
    weight = torch.where(failed, 0.0, 1.0 / spread.square().clamp(min=1e-6))
    all_failed = failed.all(0)
    weight = torch.where(all_failed, 1.0, weight)
    share = weight / weight.sum(0)
    mean = (share.unsqueeze(-1) * points).sum(0)
    # Law of total variance: the mean of the views' variances, and the variance of their means.
    disagreement = (share * (points - mean).square().sum(-1)).sum(0)
    peaks = [view.peak for view in views if view.peak is not None]
    peak = torch.stack(peaks).mean(0) if peaks else None
    return Decoded(mean, ((share * spread.square()).sum(0) + disagreement).sqrt(), all_failed, peak)
