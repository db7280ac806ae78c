"""The paper's codec (docs/method.md, section 3): discs, softmax over landmarks, contours, (0, 0) on failure."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from ddpm_lmk.config import DiscCodecConfig
from ddpm_lmk.tasks.codecs.base import Decoded, Frame, grid_shift

PRIOR_REACH = 3.0  # standard deviations of a Gaussian prior, within which a contour counts


class DiscCodec:
    """Discs, cross-entropy over landmark channels, centroid of the largest contour: the released way.

    The released code puts a landmark with ratio r = x / width on grid point round(r * S): its grid is the one of
    network pixels, moved by `grid_shift`. It draws the discs on the image as it is and warps them with it, nearest
    neighbour; drawn around the moved points they stay whole (`masks`).
    """

    full_size = True

    def __init__(self, cfg: DiscCodecConfig) -> None:
        self.radius_squared = 2.0 * cfg.sigma_px**2 * math.log(2.0)
        self.is_warped = cfg.masks == "warped"

    def encode(self, points: Tensor, image_size: int) -> Tensor:
        """Discs `[B, N, S, S]` float of the pixels where exp(-d^2 / 2 sigma^2) >= half its largest value on the grid.

        Points are rounded half to even first. A disc around an inner point has 109 pixels at sigma 5.
        """
        grid = torch.arange(image_size, device=points.device, dtype=points.dtype)
        center = points.round()
        dx = (grid - center[..., :1]).square()  # [B, N, S]
        dy = (grid - center[..., 1:]).square()
        distance = dx.unsqueeze(-2) + dy.unsqueeze(-1)  # [B, N, S(y), S(x)]
        # The released threshold is half the largest value on the grid: a landmark outside the image lights its border.
        nearest = dx.amin(-1) + dy.amin(-1)
        return (distance - nearest[..., None, None] <= self.radius_squared).to(points.dtype)

    def masks(self, points: Tensor, frame: Frame) -> Tensor:
        """Targets `[B, N, S, S]` for `points` in network pixels, all zero where a landmark has no label."""
        labelled = ~points.isnan().any(-1)
        if not self.is_warped:
            return self.encode((points + grid_shift(frame)).nan_to_num(), frame.size) * labelled[..., None, None]
        linear, offset = frame.to_native[..., :2], frame.to_native[..., None, :, 2]
        scale = (frame.size / frame.native_size).unsqueeze(1)  # [B, 1, 2], of a squeezed picture
        ratio = points.nan_to_num() @ linear.mT + offset  # native pixels
        still = self.encode(ratio * scale, frame.size)  # on the picture before augmentation
        axis = torch.arange(frame.size, device=points.device, dtype=points.dtype)
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)  # [S * S, 2]
        source = ((pixels @ linear.mT + offset + 0.5) * scale - 0.5).round().clamp(0, frame.size - 1).long()
        index = (source[..., 1] * frame.size + source[..., 0]).unsqueeze(1).expand(-1, still.shape[1], -1)
        return still.flatten(2).gather(2, index).view_as(still) * labelled[..., None, None]

    def loss(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """Cross-entropy with a softmax over landmarks at each pixel, averaged over all pixels `[B]`.

        Outside every disc the target is all zero, so there is neither loss nor gradient (docs/method.md, section 0, 4).
        """
        return -(self.masks(points, frame) * logits.float().log_softmax(1)).sum(1).mean((1, 2))

    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """Centroid of the largest outer contour of {logit >= half the largest}; without one (0, 0) and `failed`.

        The spread is the root mean squared radius of a disc of the contour's area.
        """
        maps = logits.detach().float().cpu().numpy()
        found = np.array([[_largest_contour(m) for m in image] for image in maps], dtype=np.float64)  # [B, N, 4]
        found = found.reshape(*maps.shape[:2], 4)
        values = torch.from_numpy(found).to(logits.device)
        return Decoded(values[..., :2].float() - grid_shift(frame), values[..., 2].float(), values[..., 3] > 0)

    def with_prior(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """Logits of a softmax over landmarks are no distribution over pixels: what is improbable is only left out."""
        return torch.where(log_prior >= -0.5 * PRIOR_REACH**2, logits.float(), -torch.inf)


def _largest_contour(logits: np.ndarray) -> tuple[float, float, float, float]:
    """(x, y, spread, failed) of one map, on its grid."""
    binary = (logits >= 0.5 * logits.max()).astype(np.uint8)
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return 0.0, 0.0, 0.0, 1.0
    moments = cv2.moments(max(contours, key=cv2.contourArea))
    if moments["m00"] == 0:  # a contour of one or two pixels has no area; the released code fails there too
        return 0.0, 0.0, 0.0, 1.0
    spread = math.sqrt(moments["m00"] / (2 * math.pi))
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"], spread, 0.0
