"""Codecs: landmarks to a training signal, and a network's maps back to landmarks with an uncertainty.

`DiscCodec` is the paper's (paper.md, section 3) with its quirks kept: softmax over landmarks, no gradient outside the
discs, contour centroids, (0, 0) on failure. `SpatialCodec` is ours: one probability distribution over all pixels per
landmark. The contour-hugging codec is to join them here. Every codec holds both ways: `loss` and `decode`.
Coordinates are (x, y) in network pixels; the centre of the top-left pixel is (0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from ddpm_lmk.config import DiscCodecConfig, SpatialCodecConfig


@dataclass(frozen=True)
class Decoded:
    """Landmarks read from maps: `points` and `spread_px` in network pixels, `failed` where nothing could be read."""

    points: Tensor  # [B, N, 2]
    spread_px: Tensor  # [B, N], root mean squared distance from the point under the map
    failed: Tensor  # [B, N] bool


class Codec(Protocol):
    """Both ways between points and maps."""

    full_size: bool  # maps have the size of the image, or are `model.patch` times smaller

    def grid_shift(self, native_size: Tensor, image_size: int) -> Tensor:
        """What to add to network pixels to get this codec's grid; native sizes `[B, 2]` (w, h) -> `[B, 1, 2]`."""

    def loss(self, logits: Tensor, points: Tensor, image_size: int) -> Tensor:
        """Loss per image `[B]` of maps `[B, N, h, w]` for `points` `[B, N, 2]`; NaN points do not count."""

    def decode(self, logits: Tensor, image_size: int) -> Decoded:
        """Points and uncertainties read from maps `[B, N, h, w]`."""


class DiscCodec:
    """Discs, cross-entropy over landmark channels, centroid of the largest contour: the released way.

    The released code puts a landmark with ratio r = x / width on grid point round(r * S): its grid is the one of
    network pixels, moved by `grid_shift`.
    """

    full_size = True

    def __init__(self, cfg: DiscCodecConfig) -> None:
        self.radius_squared = 2.0 * cfg.sigma_px**2 * math.log(2.0)

    def grid_shift(self, native_size: Tensor, image_size: int) -> Tensor:
        """Network pixel u = (x + 0.5) S / w - 0.5 against the released x S / w: a shift of 0.5 - 0.5 S / w."""
        return (0.5 - 0.5 * image_size / native_size).unsqueeze(1)

    def encode(self, points: Tensor, image_size: int) -> Tensor:
        """Discs `[B, N, S, S]` float of the pixels where exp(-d^2 / 2 sigma^2) >= half its largest value on the grid.

        Points are rounded half to even first. A disc around an inner point has 109 pixels at sigma 5.
        """
        grid = torch.arange(image_size, device=points.device, dtype=points.dtype)
        center = points.round()
        dx = (grid - center[..., :1]).square()  # [B, N, S]
        dy = (grid - center[..., 1:]).square()
        distance = dx.unsqueeze(-2) + dy.unsqueeze(-1)  # [B, N, S(y), S(x)]
        nearest = dx.amin(-1) + dy.amin(-1)
        return (distance - nearest[..., None, None] <= self.radius_squared).to(points.dtype)

    def loss(self, logits: Tensor, points: Tensor, image_size: int) -> Tensor:
        """Cross-entropy with a softmax over landmarks at each pixel, averaged over all pixels `[B]`.

        Outside every disc the target is all zero, so there is neither loss nor gradient (paper.md, section 0, fact 4).
        """
        labelled = ~points.isnan().any(-1)
        target = self.encode(points.nan_to_num(), image_size) * labelled[..., None, None]
        return -(target * logits.float().log_softmax(1)).sum(1).mean((1, 2))

    def decode(self, logits: Tensor, image_size: int) -> Decoded:
        """Centroid of the largest outer contour of {logit >= half the largest}; (0, 0) and `failed` without one."""
        maps = logits.detach().float().cpu().numpy()
        found = np.array([[_largest_contour(m) for m in image] for image in maps], dtype=np.float64)  # [B, N, 4]
        found = found.reshape(*maps.shape[:2], 4)
        values = torch.from_numpy(found).to(logits.device)
        return Decoded(values[..., :2].float(), values[..., 2].float(), values[..., 3] > 0)


def _largest_contour(logits: np.ndarray) -> tuple[float, float, float, float]:
    """(x, y, spread, failed) of one map; the spread is the root mean squared radius of a disc of the contour's area."""
    binary = (logits >= 0.5 * logits.max()).astype(np.uint8)
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return 0.0, 0.0, 0.0, 1.0
    moments = cv2.moments(max(contours, key=cv2.contourArea))
    if moments["m00"] == 0:
        return 0.0, 0.0, 0.0, 1.0
    spread = math.sqrt(moments["m00"] / (2 * math.pi))
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"], spread, 0.0


class SpatialCodec:
    """One distribution over all pixels per landmark: Gaussian target, cross-entropy, local mean around the peak.

    Every pixel takes part in the softmax, so a response far from the landmark costs; the map is a probability, so
    its spread is an uncertainty. Maps may be smaller than the image: cell i at stride s lies at s i + (s - 1) / 2.
    """

    full_size = False

    def __init__(self, cfg: SpatialCodecConfig) -> None:
        self.sigma_px = cfg.sigma_px
        self.decode_radius_px = cfg.decode_radius_px

    def grid_shift(self, native_size: Tensor, image_size: int) -> Tensor:
        """None: this codec's grid is the one of network pixels."""
        return torch.zeros_like(native_size).unsqueeze(1)

    def loss(self, logits: Tensor, points: Tensor, image_size: int) -> Tensor:
        """Cross-entropy between the Gaussian around each point and the softmax over pixels, mean over landmarks `[B]`.

        Points without a label, or moved out of the picture, do not count.
        """
        logits = logits.float()
        inside = ((points >= -0.5) & (points <= image_size - 0.5)).all(-1)  # false for NaN
        x, y = _cell_centers(logits, image_size)
        target_x = (-(x - points[..., :1].nan_to_num()).square() / (2 * self.sigma_px**2)).softmax(-1)  # [B, N, w]
        target_y = (-(y - points[..., 1:].nan_to_num()).square() / (2 * self.sigma_px**2)).softmax(-1)
        expected = (torch.matmul(logits, target_x.unsqueeze(-1)).squeeze(-1) * target_y).sum(-1)
        cross_entropy = logits.flatten(2).logsumexp(-1) - expected
        return (cross_entropy * inside).sum(-1) / inside.sum(-1).clamp(min=1)

    def decode(self, logits: Tensor, image_size: int) -> Decoded:
        """Mean of the distribution within `decode_radius_px` of its peak; the spread is taken over the whole map."""
        x, y = _cell_centers(logits, image_size)
        probability = logits.detach().float().flatten(2).softmax(-1).unflatten(-1, logits.shape[-2:])
        peak = probability.flatten(2).argmax(-1)
        peak_x, peak_y = x[peak % len(x)], y[peak // len(x)]  # [B, N]
        near = (x - peak_x[..., None]).square().unsqueeze(-2) + (y - peak_y[..., None]).square().unsqueeze(-1)
        local = probability * (near <= self.decode_radius_px**2)
        local = local / local.sum((-2, -1), keepdim=True)
        point_x, point_y = (local.sum(-2) * x).sum(-1), (local.sum(-1) * y).sum(-1)
        second_x = (probability.sum(-2) * (x - point_x[..., None]).square()).sum(-1)
        second_y = (probability.sum(-1) * (y - point_y[..., None]).square()).sum(-1)
        points = torch.stack((point_x, point_y), -1)
        return Decoded(points, (second_x + second_y).sqrt(), ~points.isfinite().all(-1))


def _cell_centers(maps: Tensor, image_size: int) -> tuple[Tensor, Tensor]:
    """Where the columns and rows of `maps` `[..., h, w]` lie, in network pixels."""
    height, width = maps.shape[-2:]
    stride_x, stride_y = image_size / width, image_size / height
    x = torch.arange(width, device=maps.device) * stride_x + (stride_x - 1) / 2
    y = torch.arange(height, device=maps.device) * stride_y + (stride_y - 1) / 2
    return x, y


def build_codec(cfg: DiscCodecConfig | SpatialCodecConfig) -> Codec:
    """The codec a run file asks for."""
    if isinstance(cfg, DiscCodecConfig):
        return DiscCodec(cfg)
    return SpatialCodec(cfg)
