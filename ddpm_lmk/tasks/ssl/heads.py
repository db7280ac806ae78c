"""Heads of self-supervised learning, and momentum copies of networks: moving averages that no optimizer knows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def batch_normed_head(count: int, widths: Sequence[int], *, ends_normed: bool) -> nn.Sequential:
    """Linear layers, BatchNorm and ReLU between them (MoCo v3, SimCLR v2).

    Args:
        ends_normed: a BatchNorm without scale and shift at the end, as in MoCo v3 and SimCLR v2.
    """
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        is_last = index == len(widths) - 1
        layers.append(nn.Linear(count, width, bias=False))
        if not is_last:
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        elif ends_normed:
            layers.append(nn.BatchNorm1d(width, affine=False))
        count = width
    return nn.Sequential(*layers)


class DinoHead(nn.Module):
    """Linear layers with GELU between them, a unit vector, and its cosines to a number of prototypes.

    The last layer is DINO's weight-normed one with its scale held at 1: only the directions of its rows count.

    Args:
        has_norm: BatchNorm before each GELU.
    """

    def __init__(self, count: int, widths: Sequence[int], prototypes: int, *, has_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(count, width), *([nn.BatchNorm1d(width)] if has_norm else []), nn.GELU()]
            count = width
        self.mlp = nn.Sequential(*layers, nn.Linear(count, widths[-1]))
        count = widths[-1]
        self.last = nn.Parameter(torch.empty(prototypes, count))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.last, std=0.02)

    def forward(self, x: Tensor, is_learning: Tensor) -> Tensor:
        """Logits [B, prototypes]; where `is_learning` is 0, the prototypes get a gradient of zero."""
        # A product with 0 instead of a branch: `is_learning` lies on the device, and reading it would wait for it.
        still = self.last.detach()
        directions = still + (self.last - still) * is_learning
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(directions, dim=-1))


def follower(module: nn.Module) -> nn.Module:
    """A copy whose parameters are buffers: saved and moved with the model, unknown to optimizers."""
    copied = copy.deepcopy(module)
    # As parameters without gradient they would still be averaged once more by the EMA.
    for part in copied.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach().clone())
    return copied


@torch.no_grad()
def follow(copied: nn.Module, leader: nn.Module, momentum: float) -> None:
    """Every parameter of the copy becomes momentum x itself + (1 - momentum) x the leader's."""
    own = dict(copied.named_buffers())
    pairs = [(own[name], parameter) for name, parameter in leader.named_parameters()]
    torch._foreach_lerp_([mine for mine, _ in pairs], [cast(Tensor, theirs) for _, theirs in pairs], 1 - momentum)
