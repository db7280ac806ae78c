"""What MoCo v3, SimCLR v2 and DINO have in common: views, heads around an encoder, and losses over a whole batch.

A task of this kind trains the encoder of an `encoder_unet` under a head of its own; the decoder is not built into what
is trained, and fine-tuning takes tensors named `encoder.` only. Everything that changes while training (followers,
centre, schedules) is in the module's buffers, so that a checkpoint has it. Negatives come from all ranks and from one
micro-batch: micro-batches of a step do not see one another (docs/method.md, section 5; nor in the released code).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Generic, Literal, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import EncoderUNetConfig, Network
from ddpm_lmk.config.task import EncoderTaskConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.models import ModelCost
from ddpm_lmk.models.cost import count_parameters, plain_cost
from ddpm_lmk.models.encoder_unet import Encoder, EncoderUNet, build_encoder
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.tasks.ssl.views import draw_views
from ddpm_lmk.tasks.task import OneRank, Task

Config = TypeVar("Config", bound=EncoderTaskConfig)

MASKED = -1e9  # of a logit that takes no part: far below any, and finite times a weight of zero is zero


class EncoderTask(Task, Generic[Config]):
    """Learn an encoder without labels."""

    out_channels = 1
    num_followed = 0  # first views, which a follower sees too

    def __init__(self, cfg: Config, *, seed: int, channels: int) -> None:
        self.cfg, self.seed, self.channels = cfg, seed, channels
        self.ranks = OneRank()
        self.total_steps = 1

    def prepare(self, ranks: OneRank, *, total_steps: int) -> None:
        """Keep the other ranks, and the number of steps, for losses and schedules."""
        self.ranks, self.total_steps = ranks, total_steps

    def cost(self, network: Network, image_size: int) -> ModelCost:
        """All views through the encoder, those the follower sees once more, and the layers of the heads."""
        assert isinstance(network, EncoderUNetConfig), "RunConfig wants it"
        with torch.device("meta"):
            net = self.net(build_encoder(network))
        heads = sum(module.weight.numel() for module in net.modules() if _is_trained_linear(module))
        views = [view.size or image_size for view in self.cfg.views for _ in range(view.count)]
        cost = {s: plain_cost(lambda: build_encoder(network), network.in_channels, s, s) for s in set(views)}
        forward = sum(cost[side].flops_forward + 2 * heads for side in views)
        followed = sum(cost[side].flops_forward + 2 * heads for side in views[: self.num_followed])
        return ModelCost(count_parameters(net), forward + followed, forward + followed, 3 * forward + followed)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The encoder of `model` under this task's head."""
        assert isinstance(model, EncoderUNet), "RunConfig wants model.kind=encoder_unet"
        assert isinstance(model.encoder, Encoder), "RunConfig wants one of the paper's"
        return self.net(model.encoder)

    @abstractmethod
    def net(self, encoder: Encoder) -> nn.Module:
        """What is trained: called once per micro-batch with views, gives what `compare` wants."""

    @abstractmethod
    def compare(self, model: nn.Module, views: list[Tensor], batch: Batch, ranks: OneRank) -> Tensor:
        """The loss per image `[B]`, given normalised views `[B, C, s, s]`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per image `[B]`; all ranks call it together."""
        return self.compare(model, self.views(batch, "view"), batch, self.ranks)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss with views of its own, the same at every evaluation, against the images of one batch."""
        # Ranks may have different numbers of batches left, so that a collective call would wait for ever.
        losses = self.compare(model, self.views(batch, "view-evaluate"), batch, OneRank())
        return {"loss": (losses * batch.weight).sum(), "count": batch.weight.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss per image."""
        loss = sums["loss"] / max(sums["count"], 1.0)
        return {"loss": loss, "score": loss}

    def views(self, batch: Batch, stream: str) -> list[Tensor]:
        """Views of a batch, normalised, with the encoder's number of channels."""
        std = to_device(torch.tensor(self.cfg.std), batch.images.device).view(1, -1, 1, 1)
        drawn = draw_views(self.cfg, batch.images, batch.positions, seed=self.seed, stream=stream)
        return [((view - self.cfg.mean) / std).expand(-1, self.channels, -1, -1) for view in drawn]

    def export(self) -> dict[str, Any]:
        """The method, which says what the tensors beside the encoder are."""
        return {"encoder": self.cfg.model_dump(mode="json")}


def _is_trained_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter)


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """What a classifier would see: the mean over the deepest map, after its activation, `[B, C]`."""
    return F.relu(encoder(images)[-1]).mean((2, 3))


def scheduled(momentum: float, schedule: Literal["cosine", "constant"], *, step: int, total: int) -> float:
    """Momentum of the update after `step` of `total` steps; cosine: from `momentum` to 1 over the run."""
    if schedule == "constant":
        return momentum
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * min(1.0, step / total))) / 2


def masked(logits: Tensor, is_left_out: Tensor) -> Tensor:
    """`logits` without those that take no part in a softmax."""
    return logits.float().masked_fill(is_left_out, MASKED)
