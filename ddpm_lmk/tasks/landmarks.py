"""Landmark detection: the fine-tuning task. A codec says what the maps mean; this file moves coordinates around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_lmk.config import LandmarksConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError
from ddpm_lmk.models.unet import UNet
from ddpm_lmk.tasks.codecs import Decoded, Frame, build_codec
from ddpm_lmk.tasks.task import Task

VIEW_SHIFT = 0.02  # of the image side
VIEW_SCALE = 0.04
VIEW_ROTATION = 0.05  # radians, about 3 degrees


@dataclass(frozen=True)
class Predictions:
    """Landmarks of a batch in network pixels."""

    points: Tensor  # [B, N, 2]
    spread_px: Tensor  # [B, N] uncertainty
    failed: Tensor  # [B, N] bool
    peak: Tensor | None = None  # [B, N] probability of the most probable pixel, mean over views


class LandmarkTask(Task):
    """Predict one map per landmark and read the points from it.

    Over a mixture of datasets there is a map for each landmark of each, and an image is scored on those of its own; the
    view of one dataset is `part`.
    """

    def __init__(
        self,
        cfg: LandmarksConfig,
        spec: DatasetSpec,
        *,
        is_told_domain: bool = False,
        part_of: DatasetSpec | None = None,
    ) -> None:
        """`is_told_domain`: the network is told which part of the mixture an image is of, and not a timestep."""
        self.cfg = cfg
        self.spec = spec
        self.is_told_domain = is_told_domain
        self._mixture = part_of
        self.codec = build_codec(cfg.codec)
        self.out_channels = spec.num_landmarks
        self.full_size = self.codec.full_size
        self.domains = tuple(part.num_landmarks for part in spec.domains)

    def part(self, spec: DatasetSpec) -> LandmarkTask:
        """The task for the images of one dataset, with its landmarks only; itself where there is no other.

        Raises:
            DataError: no dataset of the mixture has these landmarks.
        """
        for known in self.spec.domains:
            if known.landmark_names == spec.landmark_names:
                task = LandmarkTask(self.cfg, known, is_told_domain=self.is_told_domain, part_of=self.spec)
                return task if self.spec.parts else self
        found = "; ".join(f"the {part.num_landmarks} of {part.name}" for part in self.spec.domains)
        raise DataError(
            f"found the {spec.num_landmarks} landmarks of {spec.name}, but what was learnt is {found}; "
            "use a set with the same landmarks"
        )

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network itself; what learns from a timestep is left out of training where it is told none.

        Weights stay what they would be without: AdamW decays only what has a gradient (paper.md, section 3).
        """
        if isinstance(model, UNet) and self.cfg.timestep is None:
            model.freeze_time()
        return model

    def _maps(self, model: nn.Module, images: Tensor, domain: Tensor | None) -> Tensor:
        """Maps `[B, N, h, w]` of the landmarks of this task; `domain` `[B]` as in a batch."""
        index = 0 if self._mixture is None else self._mixture.domains.index(self.spec)
        if self._mixture is not None:
            domain = torch.full((len(images),), index)
        if self.is_told_domain or self.cfg.timestep is None:
            maps = model(images, domain if self.is_told_domain else None)
        else:
            maps = model(images, torch.full((len(images),), self.cfg.timestep, device=images.device))
        return maps if self._mixture is None else maps[:, self._mixture.columns(index)]

    def maps(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the network says of a batch: maps `[B, N, h, w]`."""
        return self._maps(model, batch.images, batch.domain)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The codec's loss, per image `[B]`."""
        return self._codec_loss(self.maps(model, batch), batch)

    def _codec_loss(self, maps: Tensor, batch: Batch) -> Tensor:
        assert batch.points is not None, "landmark batches carry points"
        return self.codec.loss(maps, batch.points, frame_of(batch))

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """Points in network pixels, over `views` slightly moved copies of each image when there are several.

        Views are combined with weights 1 / spread^2; the spread of the answer includes how far the views disagree.
        """
        frame = frame_of(batch)
        if self.cfg.views == 1:
            decoded = self.codec.decode(self.maps(model, batch), frame)
            return Predictions(decoded.points, decoded.spread_px, decoded.failed, decoded.peak)
        return _combine([self._predict_view(model, batch, frame, matrix) for matrix in view_matrices(self.cfg.views)])

    def _predict_view(self, model: nn.Module, batch: Batch, frame: Frame, matrix: Tensor) -> Decoded:
        """Points seen in the view whose pixel p shows the image at `matrix` applied to p (normalised coordinates)."""
        images, size = batch.images, frame.size
        matrix = matrix.to(images)
        grid = functional.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        decoded = self.codec.decode(self._maps(model, moved, batch.domain), frame)
        unit = (decoded.points + 0.5) * (2 / size) - 1  # [B, N, 2] in [-1, 1]
        back = unit @ matrix[:, :2].T + matrix[:, 2]
        points = torch.where(decoded.failed.unsqueeze(-1), decoded.points, (back + 1) * (size / 2) - 0.5)
        return Decoded(points, decoded.spread_px, decoded.failed, decoded.peak)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss per image, and radial error in network pixels per labelled landmark."""
        from ddpm_lmk.tasks.metrics import (
            MeanRadialError,  # torchmetrics takes seconds to import; only validation needs it
        )

        assert batch.points is not None, "landmark batches carry points"
        maps = self.maps(model, batch)
        error = MeanRadialError(self.spec.num_landmarks).to(maps.device)
        error.update(self.codec.decode(maps, frame_of(batch)).points, batch.points, weight=batch.weight)
        return {
            "loss": (self._codec_loss(maps, batch) * batch.weight).sum(),
            "count": batch.weight.sum(),
            "distance_px": error.total.sum(),
            "landmarks": error.count.sum(),
        }

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss (the score, as in the paper) and mean radial error in network pixels."""
        loss = sums["loss"] / max(sums["count"], 1.0)
        return {"loss": loss, "mre_network_px": sums["distance_px"] / max(sums["landmarks"], 1.0), "score": loss}

    def export(self) -> dict[str, Any]:
        """Dataset facts and the codec, which a reader of the maps needs."""
        facts = {"landmarks": self.cfg.model_dump(mode="json"), "spec": self.spec.model_dump(mode="json")}
        temperatures = getattr(self.codec, "temperatures", None)
        return facts if temperatures is None else {**facts, "temperatures": temperatures.tolist()}


def frame_of(batch: Batch) -> Frame:
    """Where the images of a batch lie."""
    return Frame(batch.images.shape[-1], batch.native_size, batch.to_native)


def view_matrices(count: int) -> list[Tensor]:
    """`count` matrices `[2, 3]` in normalised coordinates: the identity, then small moves spread by a fixed sequence.

    The moves are the first points of the additive recurrence on the generalised golden ratio (four dimensions), so any
    count is spread evenly and no random state is involved.
    """
    ratio = 1.1673039782614187  # the real root of x^5 = x + 1
    matrices = [torch.eye(2, 3)]
    for index in range(1, count):
        draws = [2 * ((0.5 + index * ratio**-dim) % 1.0) - 1 for dim in range(1, 5)]  # in [-1, 1)
        shift_x, shift_y, log_scale, angle = (
            2 * VIEW_SHIFT * draws[0],
            2 * VIEW_SHIFT * draws[1],
            VIEW_SCALE * draws[2],
            VIEW_ROTATION * draws[3],
        )
        scale, rotation = torch.tensor(log_scale).exp(), torch.tensor(angle)
        cos, sin = scale * rotation.cos(), scale * rotation.sin()
        matrices.append(torch.stack([cos, -sin, torch.tensor(shift_x), sin, cos, torch.tensor(shift_y)]).view(2, 3))
    return matrices


def _combine(views: list[Decoded]) -> Predictions:
    points = torch.stack([view.points for view in views])  # [V, B, N, 2]
    spread = torch.stack([view.spread_px for view in views])
    failed = torch.stack([view.failed for view in views])
    weight = torch.where(failed, 0.0, 1.0 / spread.square().clamp(min=1e-6))
    all_failed = failed.all(0)
    weight = torch.where(all_failed, 1.0, weight)
    share = weight / weight.sum(0)
    mean = (share.unsqueeze(-1) * points).sum(0)
    disagreement = (share * (points - mean).square().sum(-1)).sum(0)
    peaks = [view.peak for view in views if view.peak is not None]
    peak = torch.stack(peaks).mean(0) if peaks else None
    return Predictions(mean, ((share * spread.square()).sum(0) + disagreement).sqrt(), all_failed, peak)
