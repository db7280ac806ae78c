"""The DDPM U-Net of the paper (paper.md, section 1), at any width, with an optional patch stem.

With width 256, multipliers 1, 2, 4, 8 and patch 1 it computes what the released network computes, less the input
channel that network reserves for self-conditioning and never feeds. Loading weights is in `weights`, counting
operations in `cost`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models.blocks import (
    Attention,
    DoubleSizeConv2d,
    HalfSizeConv2d,
    LinearAttention,
    PointwiseConv2d,
    PreNorm,
    Residual,
    ResnetBlock,
    TimeEmbedding,
)


class UNet(nn.Module):
    """Images [B, 1, S, S] and timesteps [B] -> maps [B, out_channels, S, S], or at 1/patch of the side.

    `t=None` leaves out time conditioning: no embedding, no scale, no shift (the paper's fine-tuning). S must be a
    multiple of `side_multiple`, else ConfigError. The output layer is `final_conv`; everything else is the trunk.
    """

    def __init__(self, cfg: UNetConfig, *, out_channels: int, full_size: bool) -> None:
        super().__init__()
        self.patch, self.full_size, self.checkpointing = cfg.pixel_unshuffle, full_size, checkpointed_levels(cfg)
        width, time_dim = cfg.width, 4 * cfg.width
        channels = [width, *(width * m for m in cfg.multipliers)]
        levels = list(zip(channels[:-1], channels[1:], linear_levels(cfg), strict=True))
        self.side_multiple = cfg.pixel_unshuffle * 2 ** (len(levels) - 1)

        self.init_conv = PointwiseConv2d(cfg.pixel_unshuffle**2, width)
        self.time_mlp = TimeEmbedding(width, time_dim)
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()

        def resnet(channels_in: int, channels_out: int) -> ResnetBlock:
            return ResnetBlock(channels_in, channels_out, groups=cfg.groups, time_dim=time_dim)

        def linear(count: int, wanted: bool) -> nn.Module:
            attention = LinearAttention(count, heads=cfg.heads, head_dim=cfg.head_dim)
            return Residual(PreNorm(count, attention)) if wanted else nn.Identity()

        for index, (inner, outer, attends) in enumerate(levels):
            resample = _conv3(inner, outer) if index == len(levels) - 1 else _downsample(inner, outer)
            self.downs.append(
                nn.ModuleList([resnet(inner, inner), resnet(inner, inner), linear(inner, attends), resample])
            )
        deepest = channels[-1]
        self.mid_block1 = resnet(deepest, deepest)
        full = Attention(deepest, heads=cfg.heads, head_dim=cfg.head_dim)
        self.mid_attn = Residual(PreNorm(deepest, full))
        self.mid_block2 = resnet(deepest, deepest)
        for index, (inner, outer, attends) in reversed(list(enumerate(levels))):
            resample = _conv3(outer, inner) if index == 0 else _upsample(outer, inner)
            self.ups.append(
                nn.ModuleList(
                    [resnet(outer + inner, outer), resnet(outer + inner, outer), linear(outer, attends), resample]
                )
            )
        self.final_res_block = resnet(2 * width, width)
        self.final_conv = PointwiseConv2d(width, out_channels * (cfg.pixel_unshuffle**2 if full_size else 1))

    def freeze_time(self) -> None:
        """Have the layers that only a timestep reaches not learn: for training that tells the network none."""
        blocks = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        for layers in (self.time_mlp, *(block.mlp for block in blocks)):
            layers.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        if x.shape[-1] % self.side_multiple or x.shape[-2] % self.side_multiple:
            raise ConfigError(
                f"images are {x.shape[-1]} x {x.shape[-2]} pixels, but this model halves its maps down to 1/"
                f"{self.side_multiple}; set data.image_size to a multiple of {self.side_multiple}"
            )
        x = self.init_conv(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        time = None if t is None else self.time_mlp(t)
        first, skips = x, []
        for again, level in zip(self.checkpointing, self.downs, strict=True):
            block1, block2, attend, resample = cast(nn.ModuleList, level)
            x = _run(again, block1, x, time)
            skips.append(x)
            x = _run(again, attend, _run(again, block2, x, time))
            skips.append(x)
            x = _run(again, resample, x)
        x = _run(self.checkpointing[-1], self.mid_block1, x, time)
        x = _run(self.checkpointing[-1], self.mid_attn, x)
        x = _run(self.checkpointing[-1], self.mid_block2, x, time)
        for again, level in zip(reversed(self.checkpointing), self.ups, strict=True):
            block1, block2, attend, resample = cast(nn.ModuleList, level)
            x = _run(again, block1, torch.cat((x, skips.pop()), dim=1), time)
            x = _run(again, block2, torch.cat((x, skips.pop()), dim=1), time)
            x = _run(again, resample, _run(again, attend, x))
        x = self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), time))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 and self.full_size else x


def _run(again: bool, module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Call a block, keeping none of its activations if it shall run `again` in the backward pass.

    No block draws random numbers, so their state is not kept either.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


def checkpointed_levels(cfg: UNetConfig) -> tuple[bool, ...]:
    """Which levels recompute their activations; the middle goes with the deepest. `auto`, not yet chosen, is none."""
    if isinstance(cfg.checkpointing, tuple):
        return cfg.checkpointing
    return (cfg.checkpointing is True,) * len(cfg.multipliers)


def linear_levels(cfg: UNetConfig) -> tuple[bool, ...]:
    """Which levels have linear attention."""
    if isinstance(cfg.linear_attention, bool):
        return (cfg.linear_attention,) * len(cfg.multipliers)
    return cfg.linear_attention


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def _downsample(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), HalfSizeConv2d(channels_in, channels_out))


def _upsample(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), DoubleSizeConv2d(channels_in, channels_out))
