"""Gaussian heatmaps: `SpatialCodec`, ours, and `GaussianCodec`, which GU2Net is trained on (docs/method.md, section 5).

Ours makes one probability distribution over all pixels per landmark, trained towards a Gaussian. In GU2Net's every
pixel is a probability of its own: binary cross-entropy against a Gaussian of height 1, the largest value as the answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.config import GaussianCodecConfig, SpatialCodecConfig
from ddpm_lmk.tasks.codecs.base import Decoded, Frame, cell_centers, inside, local_mean


class SpatialCodec:
    """Gaussian target, cross-entropy over pixels, local mean around the peak.

    Every pixel takes part in the softmax, so a response far from the landmark costs; the map is a probability, so
    its spread (root mean squared distance from the point) is an uncertainty. Maps may be smaller than the image.
    """

    full_size = False

    def __init__(self, cfg: SpatialCodecConfig) -> None:
        self.sigma_px = cfg.sigma_px
        self.decode_radius_px = cfg.decode_radius_px

    def loss(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """Cross-entropy between the Gaussian around each point and the softmax over pixels, mean over landmarks `[B]`.

        Points without a label, or moved out of the picture, do not count.
        """
        logits = logits.float()
        counts = inside(points, frame.size)
        x, y = cell_centers(logits, frame.size)
        target_x = (-(x - points[..., :1].nan_to_num()).square() / (2 * self.sigma_px**2)).softmax(-1)  # [B, N, w]
        target_y = (-(y - points[..., 1:].nan_to_num()).square() / (2 * self.sigma_px**2)).softmax(-1)
        # The target is a product of one factor per column and one per row: two small products instead of a map.
        expected = (torch.matmul(logits, target_x.unsqueeze(-1)).squeeze(-1) * target_y).sum(-1)
        cross_entropy = logits.flatten(2).logsumexp(-1) - expected
        return (cross_entropy * counts).sum(-1) / counts.sum(-1).clamp(min=1)

    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """Mean of the distribution within `decode_radius_px` of its peak; the spread is taken over the whole map."""
        x, y = cell_centers(logits, frame.size)
        probability = logits.detach().float().flatten(2).softmax(-1).unflatten(-1, logits.shape[-2:])
        points = local_mean(probability, x, y, self.decode_radius_px)
        return Decoded(points, spread(probability, points, x, y), ~points.isfinite().all(-1))

    def with_prior(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """Of a softmax over pixels: the product of two distributions is the sum of their logarithms."""
        return logits.float() + log_prior


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
        return Decoded(points, spread(weight, points, x, y), ~points.isfinite().all(-1))

    def with_prior(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """Of a probability per pixel: each is multiplied by the prior, and goes back to a logit."""
        # Below 1 by a float32's width: a pixel that is certain keeps a finite logit.
        log_probability = (F.logsigmoid(logits.float()) + log_prior).clamp(max=-1e-7)
        return log_probability - torch.log(-torch.expm1(log_probability))


def spread(probability: Tensor, points: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Root mean squared distance `[B, N]` of distributions `[B, N, h, w]` over cells at `x`, `y` from `points`."""
    second_x = (probability.sum(-2) * (x - points[..., :1]).square()).sum(-1)
    second_y = (probability.sum(-1) * (y - points[..., 1:]).square()).sum(-1)
    return (second_x + second_y).sqrt()
