"""The second look: crops around landmarks, in which a network of its own finds them again (docs/method.md, section 9).

In training a crop lies near a labelled landmark, off by `jitter` at most. In prediction it lies around what the first
look found, and the first look is its prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lmk.config import RefineConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.order import keyed_uniform
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.tasks.codecs import Codec, Decoded, Frame
from ddpm_lmk.tasks.codecs.base import cell_centers, inside
from ddpm_lmk.tasks.crops import Cutter, inverted, moved
from ddpm_lmk.tasks.test_time_views import combined

# A landmark is read from every crop whose centre is so near it, as a share of the crop: it lies well inside.
REACH = 0.25
# The first look is never taken for surer than this, as a share of the image side (of a cephalogram: 2 mm).
LEAST_SPREAD = 0.008


class SecondLook:
    """Training crops with their loss, and points read from crops."""

    def __init__(self, cfg: RefineConfig, codec: Codec, cutter: Cutter, *, size: int, crops_at_once: int) -> None:
        """`size`: side of a crop, network pixels; `crops_at_once`: about as many go through the network together."""
        self.cfg, self.codec, self.cutter, self.size, self.crops_at_once = cfg, codec, cutter, size, crops_at_once

    def training_crops(self, batch: Batch, *, is_evaluation: bool = False) -> tuple[Tensor, Tensor]:
        """Crops `[C B, 1, s, s]`, the first of every image first, and all landmarks in their pixels `[C B, N, 2]`.

        Each is centred near one of the labelled landmarks of its image; those of an evaluation are others, unchanged.
        """
        assert batch.points is not None, "landmark batches carry points"
        assert batch.to_fine is not None, "RunConfig wants data.fine_size"
        stream = "refine-evaluate" if is_evaluation else "refine"
        points = moved(batch.points.double(), batch.to_fine.double())
        drawn = keyed_uniform(self.cutter.seed, stream, batch.positions.numpy(), 3 * self.cfg.crops)
        u = to_device(torch.from_numpy(drawn), points.device).unflatten(1, (self.cfg.crops, 3))
        images, inner = [], []
        for number in range(self.cfg.crops):
            which, offset = u[:, number, 0], (2 * u[:, number, 1:] - 1) * self.cfg.jitter * _side(batch)
            changes = None if is_evaluation else f"{stream}-{number}"
            crops, back = self._cut(batch, _labelled_point(points, which) + offset, changes)
            images.append(crops)
            inner.append(moved(points, inverted(back)))
        return torch.cat(images), torch.cat(inner).float()

    def loss(self, maps: Tensor, points: Tensor) -> Tensor:
        """Mean over the crops of each image `[B]`, of maps and points `[C B, ...]`; landmarks outside do not count."""
        counted = torch.where(inside(points, self.size)[..., None], points, torch.nan)
        return self.codec.loss(maps, counted, self._frame(maps)).unflatten(0, (self.cfg.crops, -1)).mean(0)

    def predict(self, maps_of: Callable[[Tensor], Tensor], batch: Batch, coarse: Decoded) -> Decoded:
        """Points in network pixels of the whole image, from one crop around each point of the first look.

        A landmark is read from all crops whose centre lies within `REACH` of its coarse point. What the first look says
        is a prior of the second: a Gaussian around its point, as wide as its spread. A crop alone knows little of where
        in the picture it lies, and would take a similar place for the right one. Where nothing is left, the coarse
        point stays.

        Args:
            maps_of: the network, crops to maps; crops `[K B, 1, s, s]` are one of every image, K times over.
        """
        assert batch.to_fine is not None, "RunConfig wants data.fine_size"
        side, to_fine = batch.images.shape[-1], batch.to_fine.double()
        to_network, centres = inverted(to_fine), moved(coarse.points.nan_to_num().double(), to_fine)
        zoom = self.size / (self.cfg.crop * side)  # crop pixels per network pixel
        prior_spread = coarse.spread_px.nan_to_num().clamp(min=LEAST_SPREAD * side) * zoom
        together = max(1, self.crops_at_once // len(batch))
        numbers = range(centres.shape[1])
        views = []
        for part in (numbers[begin : begin + together] for begin in range(0, len(numbers), together)):
            cut = [self._cut(batch, centres[:, number], None) for number in part]
            maps = maps_of(torch.cat([crops for crops, _ in cut]))
            expected = torch.cat([moved(centres, inverted(back)) for _, back in cut])
            prior = self._log_prior(maps, expected.float(), prior_spread.repeat(len(part), 1))
            read = self.codec.decode(self.codec.with_prior(maps, prior), self._frame(maps))
            shape = (len(part), len(batch))
            rows = (each.unflatten(0, shape).unbind(0) for each in (read.points, read.spread_px, read.failed))
            for number, (_, back), found, spread, failed in zip(part, cut, *rows, strict=True):
                points = moved(moved(found.double(), back), to_network).to(coarse.points.dtype)
                is_far = (coarse.points - coarse.points[:, number, None]).abs().amax(-1) > REACH * self.cfg.crop * side
                failed = failed | coarse.failed[:, number, None] | is_far | ~points.isfinite().all(-1)
                points = torch.where(failed[..., None], coarse.points, points)
                views.append(Decoded(points, spread / zoom, failed))
        refined = combined(views)
        stays = refined.failed | coarse.failed
        points = torch.where(stays[..., None], coarse.points, refined.points)
        spread = torch.where(stays, coarse.spread_px, refined.spread_px)
        return Decoded(points, spread, coarse.failed, coarse=coarse)

    def _log_prior(self, maps: Tensor, expected: Tensor, spread: Tensor) -> Tensor:
        """Logarithm `[B, N, h, w]` of a Gaussian of height 1 around `expected` `[B, N, 2]`, both in crop pixels."""
        x, y = cell_centers(maps, self.size)
        dx, dy = x - expected[..., :1], y - expected[..., 1:]
        squared = dx.square().unsqueeze(-2) + dy.square().unsqueeze(-1)
        return squared / (-2 * spread.square())[..., None, None]

    def facts(self) -> dict[str, Any]:
        """What a user of the weights needs to know beside the run file's section."""
        return {"size": self.size, "reach": REACH, "least_spread": LEAST_SPREAD}

    def _cut(self, batch: Batch, centre: Tensor, stream: str | None) -> tuple[Tensor, Tensor]:
        assert batch.fine is not None, "RunConfig wants data.fine_size"
        positions = batch.positions.numpy()
        side_px = np.full(len(batch), self.cfg.crop * _side(batch))
        return self.cutter.cut(batch.fine, centre, side_px, self.size, positions, stream)

    def _frame(self, maps: Tensor) -> Frame:
        """A crop is a picture of its own: its native pixels are those the network sees."""
        native_size = torch.full((len(maps), 2), float(self.size), device=maps.device)
        return Frame(self.size, native_size, torch.eye(2, 3, device=maps.device).expand(len(maps), 2, 3))


def _side(batch: Batch) -> int:
    """Side of the finer pictures, pixels."""
    assert batch.fine is not None, "RunConfig wants data.fine_size"
    return batch.fine.shape[-1]


def _labelled_point(points: Tensor, u: Tensor) -> Tensor:
    """One of the labelled `points` `[B, N, 2]` of each image, chosen by `u` `[B]` in [0, 1); (0, 0) where none is."""
    labelled = ~points.isnan().any(-1)
    count = labelled.sum(-1)
    place = torch.minimum((u * count).long(), count - 1)
    is_chosen = labelled & (labelled.cumsum(-1) == place[:, None] + 1)
    return torch.where(is_chosen[..., None], points, 0.0).sum(1)
