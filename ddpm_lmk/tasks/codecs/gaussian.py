"""Gaussian heatmaps of independent pixels, as GU2Net is trained on (paper.md, section 5).

Every pixel of every landmark's map is a probability of its own: binary cross-entropy, summed over pixels and landmarks,
against a Gaussian of height 1, and the largest value as the answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.config import GaussianCodecConfig
from ddpm_lmk.tasks.codecs.base import Decoded, Frame, cell_centers, inside, local_mean


class GaussianCodec:
    """Binary cross-entropy against a Gaussian in a box; the peak, or the mean around it."""

    full_size = True

    def __init__(self, cfg: GaussianCodecConfig) -> None:
        self.cfg = cfg

    def encode(self, points: Tensor, maps: Tensor, frame: Frame) -> Tensor:
        """Targets `[B, N, h, w]`: a Gaussian on the landmark's cell, moved and stretched to go from 0 to 1.

        It lives in a box of offsets -r <= d < r (r the radius) whose corner has the 0; outside there is nothing.
        """
        x, y = cell_centers(maps, frame.size)
        dx = x - x[(points[..., :1] - x).abs().argmin(-1)][..., None]  # [B, N, w]
        dy = y - y[(points[..., 1:] - y).abs().argmin(-1)][..., None]
        radius, variance = self.cfg.radius_px, self.cfg.sigma_px**2
        value_x = torch.exp(-dx.square() / (2 * variance)) * ((dx >= -radius) & (dx < radius))
        value_y = torch.exp(-dy.square() / (2 * variance)) * ((dy >= -radius) & (dy < radius))
        lowest = math.exp(-(radius**2) / variance)
        value = value_x.unsqueeze(-2) * value_y.unsqueeze(-1)
        return ((value - lowest) / (1 - lowest)).clamp(min=0.0)

    def loss(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """Sum over pixels and landmarks `[B]`; a landmark that was moved out of the picture has an empty map.

        Points without a label do not count.
        """
        logits = logits.float()
        labelled = ~points.isnan().any(-1)
        is_inside = inside(points, frame.size)
        target = self.encode(points.nan_to_num(), logits, frame) * is_inside[..., None, None]
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((-2, -1))  # [B, N]
        return (each * labelled).sum(-1)

    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """The largest value, or the mean around it; the spread is that of the map as a distribution."""
        probability = logits.detach().float().sigmoid()
        x, y = cell_centers(logits, frame.size)
        weight = probability / probability.sum((-2, -1), keepdim=True)
        points = local_mean(weight, x, y, self.cfg.decode_radius_px)
        second_x = (weight.sum(-2) * (x - points[..., :1]).square()).sum(-1)
        second_y = (weight.sum(-1) * (y - points[..., 1:]).square()).sum(-1)
        return Decoded(points, (second_x + second_y).sqrt(), ~points.isfinite().all(-1))
