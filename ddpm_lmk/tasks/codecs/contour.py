"""Contour-hugging heatmaps, the paper's [20] (docs/method.md, sections 3 and 5): one pixel is right, others compete.

A softmax over all pixels per landmark, minus the log probability of the landmark's pixel, the most probable pixel as
the answer, and the expected radial error as its uncertainty. Temperatures, one per landmark, make the probabilities
honest; `inference.calibration` fits them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_lmk.config import ContourCodecConfig
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.tasks.codecs.base import Decoded, Frame, cell_centers, grid_shift, inside, local_mean


class ContourCodec:
    """Negative log-likelihood of one pixel; peak and expected radial error.

    Attributes:
        temperatures: `[N]`, what the logits of each landmark are divided by before they are read; None: 1 for all.
            Training does not use them.
    """

    full_size = True

    def __init__(self, cfg: ContourCodecConfig) -> None:
        self.cfg = cfg
        self.temperatures: Tensor | None = None

    def loss(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """-log p(pixel of the landmark), mean over landmarks `[B]`; points without a label or outside do not count."""
        counts = self.counts(points, frame)
        return (self.negative_log_likelihood(logits.float(), points, frame) * counts).sum(-1) / counts.sum(-1).clamp(
            min=1
        )

    def counts(self, points: Tensor, frame: Frame) -> Tensor:
        """Which points `[B, N]` count: those with a label inside the picture."""
        return inside(points, frame.size)

    def negative_log_likelihood(self, logits: Tensor, points: Tensor, frame: Frame) -> Tensor:
        """-log p `[B, N]` of the landmarks' pixels under maps `[B, N, h, w]`; of any pixel where there is none."""
        flat = logits.flatten(2)
        return flat.logsumexp(-1) - flat.gather(-1, self.pixels(points, logits, frame)[..., None]).squeeze(-1)

    def pixels(self, points: Tensor, maps: Tensor, frame: Frame) -> Tensor:
        """Number `[B, N]` of each landmark's pixel, row by row; points outside get the nearest, NaN the first."""
        height, width = maps.shape[-2:]
        if self.cfg.pixel == "floor":
            points = points + grid_shift(frame)
        scale = to_device(torch.tensor((width / frame.size, height / frame.size), dtype=points.dtype), points.device)
        cell = (points.nan_to_num() + 0.5) * scale - 0.5
        cell = cell.floor() if self.cfg.pixel == "floor" else cell.round()
        column, row = cell[..., 0].clamp(0, width - 1), cell[..., 1].clamp(0, height - 1)
        return (row * width + column).long()

    def decode(self, logits: Tensor, frame: Frame) -> Decoded:
        """The peak, or the mean around it, and the expected radial error of the tempered map."""
        logits = logits.detach().float()
        if self.temperatures is not None:
            logits = logits / self._by_landmark(self.temperatures.to(logits), logits)
        x, y = cell_centers(logits, frame.size)
        probability = logits.flatten(2).softmax(-1).unflatten(-1, logits.shape[-2:])
        points = local_mean(probability, x, y, self.cfg.decode_radius_px)
        error = self.expected_radial_error(probability, points, x, y)
        if self.cfg.pixel == "floor":
            points = points - grid_shift(frame)
        return Decoded(points, error, ~points.isfinite().all(-1), probability.amax((-2, -1)))

    def with_prior(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """As of `SpatialCodec`."""
        return logits.float() + log_prior

    def expected_radial_error(self, probability: Tensor, points: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """ERE `[B, N]` px: sum over pixels of w |p - point|, w the map without what is below `ere_cut` of its peak."""
        # What is far below the peak covers most pixels: without the cut, its sum of distances would be the answer.
        kept = probability * (probability > self.cfg.ere_cut * probability.amax((-2, -1), keepdim=True))
        distance = torch.hypot((x - points[..., :1]).unsqueeze(-2), (y - points[..., 1:]).unsqueeze(-1))  # [B, N, h, w]
        return (kept * distance).sum((-2, -1)) / kept.sum((-2, -1))

    @staticmethod
    def _by_landmark(temperatures: Tensor, logits: Tensor) -> Tensor:
        if len(temperatures) != logits.shape[1]:
            raise CheckpointError(
                f"{len(temperatures)} temperatures for {logits.shape[1]} landmarks; they belong to another run"
            )
        return temperatures[:, None, None]
