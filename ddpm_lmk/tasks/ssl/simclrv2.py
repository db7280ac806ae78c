"""SimCLR v2 (Chen et al., NeurIPS 2020): the two views of an image find each other among the views of all ranks.

NT-Xent over 2 W B vectors, with gradient through the vectors of other ranks, and a projector of three layers. The
method's momentum memory is left out, as in the paper's settings (docs/method.md, section 5). The encoder ends at its
pooling: a U-Net has no place for the first layer of the projector, which the method keeps for classification.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config.task import SimclrV2Config
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.models.encoder_unet import Encoder
from ddpm_lmk.tasks.ssl.base import EncoderTask, masked, pooled
from ddpm_lmk.tasks.ssl.heads import batch_normed_head
from ddpm_lmk.tasks.task import OneRank


class SimclrV2Net(nn.Module):
    """An encoder and its projector, for both views at once: BatchNorm sees 2 B images, as in the method's code."""

    def __init__(self, encoder: Encoder, cfg: SimclrV2Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = batch_normed_head(encoder.channels[-1], cfg.projector, ends_normed=True)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Unit vectors [2, B, D]."""
        vectors = self.projector(pooled(self.encoder, torch.cat(views)))
        return F.normalize(vectors.float(), dim=-1).unflatten(0, (2, -1))


class SimclrV2Task(EncoderTask[SimclrV2Config]):
    """Contrast between views."""

    def net(self, encoder: Encoder) -> nn.Module:
        """Encoder and projector."""
        return SimclrV2Net(encoder, self.cfg)

    def compare(self, model: nn.Module, views: list[Tensor], batch: Batch, ranks: OneRank) -> Tensor:
        """NT-Xent, the mean over an image's two views."""
        return nt_xent(model(views), batch.weight, ranks, temperature=self.cfg.temperature)


def nt_xent(vectors: Tensor, weight: Tensor, ranks: OneRank, *, temperature: float) -> Tensor:
    """The loss per image `[B]` of unit vectors `[2, B, D]`, by view.

    Args:
        weight: `[B]`; views of images that do not count (padding) are no negatives.
    """
    count, width = vectors.shape[1:]
    rows = ranks.all_gather(torch.cat((vectors[0], vectors[1], weight[:, None]), 1))  # [W B, 2 D + 1]
    first, second, counts = rows.split([width, width, 1], 1)
    logits = vectors.flatten(0, 1) @ torch.cat((first, second)).T / temperature  # [2 B, 2 W B]
    # Where this rank's own views stand among all: a vector is not its own negative.
    own = torch.arange(count, device=vectors.device) + ranks.rank * count
    is_self = F.one_hot(torch.cat((own, own + len(rows))), 2 * len(rows)).bool()
    logits = masked(logits, is_self | (counts.T == 0).repeat(1, 2))
    positive = (vectors[0] * vectors[1]).sum(-1) / temperature
    return (logits.logsumexp(-1).view(2, count) - positive).mean(0)
