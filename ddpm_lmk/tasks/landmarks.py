"""Landmark detection: the fine-tuning task. A codec says what the maps mean; this file moves coordinates around it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import LandmarksConfig, Network
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.models import ModelCost
from ddpm_lmk.models.coarse_to_fine import CoarseToFine
from ddpm_lmk.models.unet import UNet
from ddpm_lmk.tasks.codecs import Codec, Decoded, Frame, build_codec
from ddpm_lmk.tasks.mixture import MixturePart
from ddpm_lmk.tasks.second_look import SecondLook
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
        second_look: SecondLook | None = None,
    ) -> None:
        """`is_domain_conditioned`: the network is conditioned on the part of the mixture, and not on a timestep."""
        self.cfg = cfg
        self.spec = spec
        self.is_domain_conditioned = is_domain_conditioned
        self.second_look = second_look
        self._part = part
        self.codec = build_codec(cfg.codec)
        self.out_channels = spec.num_landmarks
        # Both looks have networks of one kind, which serves the codec that wants more.
        self.full_size = self.codec.full_size or (second_look is not None and second_look.codec.full_size)
        self.domains = tuple(domain.num_landmarks for domain in spec.domains)

    def part(self, spec: DatasetSpec) -> LandmarkTask:
        """The task for the images of one dataset, with its landmarks only; itself where there is no other.

        Raises:
            DataError: no dataset of the mixture has these landmarks.
        """
        part = MixturePart.of(self.spec, spec)
        if not self.spec.parts:
            return self
        kept: dict[str, Any] = {"is_domain_conditioned": self.is_domain_conditioned, "second_look": self.second_look}
        return LandmarkTask(self.cfg, part.spec, part=part, **kept)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network itself, or two of it for two looks; layers that only a timestep reaches learn nothing without.

        Weights stay what they would be without: AdamW decays only what has a gradient (docs/method.md, section 3).
        """
        if isinstance(model, UNet) and self.cfg.timestep is None:
            model.freeze_time()
        return model if self.second_look is None else CoarseToFine(model)

    def cost(self, network: Network, image_size: int) -> ModelCost:
        """A pass of the network and back for the image, and for each of its crops."""
        image = super().cost(network, image_size)
        if self.second_look is None:
            return image
        crops = self.cost_of_crops(network)
        return ModelCost(*(getattr(image, field.name) + getattr(crops, field.name) for field in fields(ModelCost)))

    def cost_of_crops(self, network: Network) -> ModelCost:
        """What the second look costs, of a training image."""
        assert self.second_look is not None
        crop, count = super().cost(network, self.second_look.size), self.second_look.cfg.crops
        flops = (crop.flops_forward, crop.flops_executed, crop.flops_train)
        return ModelCost(crop.params, *(count * each for each in flops))

    @property
    def reads_with(self) -> Codec:
        """The codec that the points of a prediction are read with."""
        return self.codec if self.second_look is None else self.second_look.codec

    @property
    def prediction_passes(self) -> float:
        """Passes of the network in a prediction: views, and a crop of each landmark; in passes of a training image."""
        if self.second_look is None:
            return self.cfg.views
        return (self.cfg.views + self.out_channels) / (1 + self.second_look.cfg.crops)

    def maps(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the network says of a batch: maps `[B, N, h, w]` of the landmarks of this task."""
        return self._maps(model, batch.images, batch.domain)

    def _maps(self, model: nn.Module, images: Tensor, domain: Tensor | None) -> Tensor:
        maps = model(images, self._condition(images, domain))
        return self._own(maps if self.second_look is None else maps[0])

    def _maps_of_crops(self, model: nn.Module, crops: Tensor, domain: Tensor | None) -> Tensor:
        return self._own(model(None, None, crops, self._condition(crops, domain))[1])

    def _condition(self, images: Tensor, domain: Tensor | None) -> Tensor | None:
        """What the network is conditioned on `[B]`; `domain`: of these images, or of one of several parts of them."""
        if self._part is not None:  # its images come from a loader of that set alone, which knows of no domains
            domain = self._part.domain(len(images))
        if self.is_domain_conditioned:
            return None if domain is None else domain.repeat(len(images) // len(domain))
        if self.cfg.timestep is None:
            return None
        return torch.full((len(images),), self.cfg.timestep, device=images.device)

    def _own(self, maps: Tensor) -> Tensor:
        return maps if self._part is None else self._part.own(maps)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The codec's loss, per image `[B]`; with a second look, plus the mean over its crops."""
        if self.second_look is None:
            return self._codec_loss(self.maps(model, batch), batch)
        crops, points = self.second_look.training_crops(batch)
        whole, inner = (self._condition(images, batch.domain) for images in (batch.images, crops))
        # One call of the module, for what is around it (`coarse_to_fine`).
        maps, fine = model(batch.images, whole, crops, inner)
        return self._codec_loss(self._own(maps), batch) + self.second_look.loss(self._own(fine), points)

    def _codec_loss(self, maps: Tensor, batch: Batch) -> Tensor:
        assert batch.points is not None, "landmark batches carry points"
        return self.codec.loss(maps, batch.points, frame_of(batch))

    def predict(self, model: nn.Module, batch: Batch) -> Decoded:
        """Points in network pixels, over `views` slightly moved copies of each image when there are several."""
        frame = frame_of(batch)
        if self.cfg.views == 1:
            found = self.codec.decode(self.maps(model, batch), frame)
        else:
            found = predict_over_views(
                lambda images: self._maps(model, images, batch.domain),
                batch.images,
                codec=self.codec,
                frame=frame,
                count=self.cfg.views,
            )
        return self._refined(model, batch, found)

    def _refined(self, model: nn.Module, batch: Batch, found: Decoded) -> Decoded:
        if self.second_look is None:
            return found
        return self.second_look.predict(lambda crops: self._maps_of_crops(model, crops, batch.domain), batch, found)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss per image, and radial error in network pixels per labelled landmark."""
        from ddpm_lmk.tasks.validation_metrics import (
            MeanRadialError,  # torchmetrics takes seconds to import; few runs validate
        )

        assert batch.points is not None, "landmark batches carry points"
        maps = self.maps(model, batch)
        loss, found = self._codec_loss(maps, batch), self.codec.decode(maps, frame_of(batch))
        if self.second_look is not None:
            crops, points = self.second_look.training_crops(batch, is_evaluation=True)
            loss = loss + self.second_look.loss(self._maps_of_crops(model, crops, batch.domain), points)
        with maps.device:  # made there: a copy would wait for it
            error = MeanRadialError(self.spec.num_landmarks)
        error.update(self._refined(model, batch, found).points, batch.points, weight=batch.weight)
        return {
            "loss": (loss * batch.weight).sum(),
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
        facts |= {} if self.second_look is None else {"second_look": self.second_look.facts()}
        return facts if temperatures is None else {**facts, "temperatures": temperatures.tolist()}


def frame_of(batch: Batch) -> Frame:
    """Where the images of a batch lie."""
    return Frame(batch.images.shape[-1], batch.native_size, batch.to_native)
