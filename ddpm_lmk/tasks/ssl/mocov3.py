"""MoCo v3 (Chen, Xie & He, ICCV 2021): each view's query finds the other view's key among the keys of all ranks.

Keys come from a momentum encoder and carry no gradient; there is no queue. Each view goes through the encoders by
itself, so that BatchNorm sees one view of the batch at a time, as in the method's code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config.task import MocoV3Config
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.models.encoder_unet import Encoder
from ddpm_lmk.tasks.ssl.base import EncoderTask, masked, pooled, scheduled
from ddpm_lmk.tasks.ssl.heads import batch_normed_head, follow, follower
from ddpm_lmk.tasks.task import OneRank


class MocoV3Net(nn.Module):
    """Queries from the encoder, keys from its follower."""

    def __init__(self, encoder: Encoder, cfg: MocoV3Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = batch_normed_head(encoder.channels[-1], cfg.projector, ends_normed=True)
        self.predictor = batch_normed_head(cfg.projector[-1], cfg.predictor, ends_normed=True)
        self.momentum = nn.ModuleDict({"encoder": follower(encoder), "projector": follower(self.projector)})

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Unit vectors: queries and keys, each [2, B, D]."""
        queries = torch.stack([self.predictor(self.projector(pooled(self.encoder, view))) for view in views])
        with torch.no_grad():
            follows, projects = self.momentum["encoder"], self.momentum["projector"]
            keys = torch.stack([projects(pooled(follows, view)) for view in views])
        return F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)


class MocoV3Task(EncoderTask[MocoV3Config]):
    """Contrast with the momentum encoder's keys."""

    num_followed = 2

    def net(self, encoder: Encoder) -> nn.Module:
        """Encoder, projector, predictor, and the momentum encoder."""
        return MocoV3Net(encoder, self.cfg)

    def compare(self, model: nn.Module, views: list[Tensor], batch: Batch, ranks: OneRank) -> Tensor:
        """Cross-entropy of both queries over the keys of the other view, summed, times 2 tau in the method."""
        queries, keys = model(views)
        losses = info_nce(queries, keys, batch.weight, ranks, temperature=self.cfg.temperature)
        return losses * 2 * self.cfg.temperature if self.cfg.loss_scale == "two_tau" else losses

    def after_step(self, model: nn.Module, step: int) -> None:
        """The momentum encoder follows."""
        assert isinstance(model, MocoV3Net)
        momentum = scheduled(self.cfg.momentum, self.cfg.momentum_schedule, step=step, total=self.total_steps)
        follow(model.momentum["encoder"], model.encoder, momentum)
        follow(model.momentum["projector"], model.projector, momentum)


def info_nce(queries: Tensor, keys: Tensor, weight: Tensor, ranks: OneRank, *, temperature: float) -> Tensor:
    """Symmetric InfoNCE per image `[B]`.

    Args:
        queries, keys: unit vectors `[2, B, D]`, by view.
        weight: `[B]`; keys of images that do not count (padding) are no negatives.
    """
    others = keys.flip(0)  # a query of one view is compared with keys of the other
    gathered = ranks.all_gather(torch.cat((others[0], others[1], weight[:, None]), 1))  # [W B, 2 D + 1]
    first, second, counts = gathered.split([keys.shape[-1], keys.shape[-1], 1], 1)
    all_keys = torch.stack((first, second))  # [2, W B, D]
    logits = masked(queries @ all_keys.mT / temperature, counts.T == 0)  # [2, B, W B]
    positive = (queries * others).sum(-1) / temperature
    return (logits.logsumexp(-1) - positive).sum(0)
