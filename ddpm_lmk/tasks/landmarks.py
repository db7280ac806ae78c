"""Landmark detection: the fine-tuning task. A codec says what the maps mean; this file moves coordinates around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import LandmarksConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.models.unet import UNet
from ddpm_lmk.tasks.codecs import Decoded, Frame, build_codec
from ddpm_lmk.tasks.mixture import MixturePart
from ddpm_lmk.tasks.task import Task
from ddpm_lmk.tasks.test_time_views import predict_over_views


class LandmarkTask(Task):
    """Predict one map per landmark and read the points from it.

    Over a mixture of datasets there is a map for each landmark of each, and an image is scored on those of its own;
    the task of one dataset alone is `part`.
    """

    def __init__(
        self,
        cfg: LandmarksConfig,
        spec: DatasetSpec,
        *,
        is_domain_conditioned: bool = False,
        part: MixturePart | None = None,
    ) -> None:
        """`is_domain_conditioned`: the network is conditioned on the part of the mixture, and not on a timestep."""
        self.cfg = cfg
        self.spec = spec
        self.is_domain_conditioned = is_domain_conditioned
        self._part = part
        self.codec = build_codec(cfg.codec)
        self.out_channels = spec.num_landmarks
        self.full_size = self.codec.full_size
        self.domains = tuple(domain.num_landmarks for domain in spec.domains)

    def part(self, spec: DatasetSpec) -> LandmarkTask:
        """The task for the images of one dataset, with its landmarks only; itself where there is no other.

        Raises:
            DataError: no dataset of the mixture has these landmarks.
        """
        part = MixturePart.of(self.spec, spec)
        if not self.spec.parts:
            return self
        return LandmarkTask(self.cfg, part.spec, is_domain_conditioned=self.is_domain_conditioned, part=part)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network itself; layers that only a timestep reaches are left out of training where there is none.

        Weights stay what they would be without: AdamW decays only what has a gradient (docs/method.md, section 3).
        """
        if isinstance(model, UNet) and self.cfg.timestep is None:
            model.freeze_time()
        return model

    def maps(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the network says of a batch: maps `[B, N, h, w]` of the landmarks of this task."""
        return self._maps(model, batch.images, batch.domain)

    def _maps(self, model: nn.Module, images: Tensor, domain: Tensor | None) -> Tensor:
        if self._part is not None:  # its images come from a loader of that set alone, which knows of no domains
            domain = self._part.domain(len(images))
        if self.is_domain_conditioned:
            maps = model(images, domain)
        elif self.cfg.timestep is None:
            maps = model(images, None)
        else:
            maps = model(images, torch.full((len(images),), self.cfg.timestep, device=images.device))
        return maps if self._part is None else self._part.own(maps)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The codec's loss, per image `[B]`."""
        return self._codec_loss(self.maps(model, batch), batch)

    def _codec_loss(self, maps: Tensor, batch: Batch) -> Tensor:
        assert batch.points is not None, "landmark batches carry points"
        return self.codec.loss(maps, batch.points, frame_of(batch))

    def predict(self, model: nn.Module, batch: Batch) -> Decoded:
        """Points in network pixels, over `views` slightly moved copies of each image when there are several."""
        frame = frame_of(batch)
        if self.cfg.views == 1:
            return self.codec.decode(self.maps(model, batch), frame)
        return predict_over_views(
            lambda images: self._maps(model, images, batch.domain),
            batch.images,
            codec=self.codec,
            frame=frame,
            count=self.cfg.views,
        )

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss per image, and radial error in network pixels per labelled landmark."""
        from ddpm_lmk.tasks.validation_metrics import (
            MeanRadialError,  # torchmetrics takes seconds to import; few runs validate
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
