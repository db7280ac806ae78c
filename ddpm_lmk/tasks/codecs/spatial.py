"""Our codec: one probability distribution over all pixels per landmark, taught a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_lmk.config import SpatialCodecConfig
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
        expected = (torch.matmul(logits, target_x.unsqueeze(-1)).squeeze(-1) * target_y).sum(-1)
        cross_entropy = logits.flatten(2).logsumexp(-1) - expected
        return (cross_entropy * counts).sum(-1) / counts.sum(-1).clamp(min=1)

    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """Mean of the distribution within `decode_radius_px` of its peak; the spread is taken over the whole map."""
        x, y = cell_centers(logits, frame.size)
        probability = logits.detach().float().flatten(2).softmax(-1).unflatten(-1, logits.shape[-2:])
        points = local_mean(probability, x, y, self.decode_radius_px)
        second_x = (probability.sum(-2) * (x - points[..., :1]).square()).sum(-1)
        second_y = (probability.sum(-1) * (y - points[..., 1:]).square()).sum(-1)
        return Decoded(points, (second_x + second_y).sqrt(), ~points.isfinite().all(-1))
