"""The DDPM U-Net of the paper (docs/method.md, section 1), at any width, with optional pixel-unshuffling before it.

With width 256, multipliers 1, 2, 4, 8 and pixel_unshuffle 1 it computes what the released network computes, less the
input channel that network reserves for self-conditioning and never feeds. Loading weights is in `weights`, counting
operations in `cost`.
"""

from __future__ import annotations

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


class Level(nn.ModuleList):
    """Two residual blocks, attention (or nothing), and the change of size to the next level.

    A list, because released checkpoints number them: `downs.0.2` is the attention of the first level down.
    """

    def __init__(self, block1: nn.Module, block2: nn.Module, attention: nn.Module, resample: nn.Module) -> None:
        super().__init__((block1, block2, attention, resample))

    @property
    def block1(self) -> nn.Module:
        """The first residual block."""
        return self[0]

    @property
    def block2(self) -> nn.Module:
        """The second residual block."""
        return self[1]

    @property
    def attention(self) -> nn.Module:
        """Linear attention with its norm and residual, or the identity."""
        return self[2]

    @property
    def resample(self) -> nn.Module:
        """Half or double size; a 3x3 convolution at the ends."""
        return self[3]


class UNet(nn.Module):
    """Images [B, 1, S, S] and timesteps [B] -> maps [B, out_channels, S, S], or at 1/pixel_unshuffle of the side.

    `t=None` leaves out time conditioning: no embedding, no scale, no shift (the paper's fine-tuning). S must be a
    multiple of `side_multiple`, else ConfigError. The output layer is `final_conv`; everything else is the trunk.
    """

    def __init__(self, cfg: UNetConfig, *, out_channels: int, full_size: bool) -> None:
        super().__init__()
        self.pixel_unshuffle, self.full_size, self.recompute = cfg.pixel_unshuffle, full_size, recomputed_levels(cfg)
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

        def linear(count: int, is_used: bool) -> nn.Module:
            attention = LinearAttention(count, heads=cfg.heads, head_dim=cfg.head_dim)
            return Residual(PreNorm(count, attention)) if is_used else nn.Identity()

        for index, (inner, outer, attends) in enumerate(levels):
            resample = _conv3(inner, outer) if index == len(levels) - 1 else _downsample(inner, outer)
            self.downs.append(Level(resnet(inner, inner), resnet(inner, inner), linear(inner, attends), resample))
        deepest = channels[-1]
        self.mid_block1 = resnet(deepest, deepest)
        full = Attention(deepest, heads=cfg.heads, head_dim=cfg.head_dim)
        self.mid_attn = Residual(PreNorm(deepest, full))
        self.mid_block2 = resnet(deepest, deepest)
        for index, (inner, outer, attends) in reversed(list(enumerate(levels))):
            resample = _conv3(outer, inner) if index == 0 else _upsample(outer, inner)
            both = outer + inner  # channels from below and of the skip
            self.ups.append(Level(resnet(both, outer), resnet(both, outer), linear(outer, attends), resample))
        self.final_res_block = resnet(2 * width, width)
        self.final_conv = PointwiseConv2d(width, out_channels * (cfg.pixel_unshuffle**2 if full_size else 1))

    def time_layers(self) -> list[nn.Module]:
        """The layers that only a timestep reaches."""
        return [self.time_mlp, *(module.mlp for module in self.modules() if isinstance(module, ResnetBlock))]

    def freeze_time(self) -> None:
        """Have those layers not learn: for training without conditioning on a timestep."""
        for layers in self.time_layers():
            layers.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        if x.shape[-1] % self.side_multiple or x.shape[-2] % self.side_multiple:
            raise ConfigError(
                f"images are {x.shape[-1]} x {x.shape[-2]} pixels, but this model halves its maps down to 1/"
                f"{self.side_multiple}; set data.image_size to a multiple of {self.side_multiple}"
            )
        factor = self.pixel_unshuffle
        x = self.init_conv(F.pixel_unshuffle(x, factor) if factor > 1 else x)
        time = None if t is None else self.time_mlp(t)
        first, skips = x, []
        for recompute, level in zip(self.recompute, self.downs, strict=True):
            assert isinstance(level, Level)
            x = _run(recompute, level.block1, x, time)
            skips.append(x)
            x = _run(recompute, level.attention, _run(recompute, level.block2, x, time))
            skips.append(x)
            x = _run(recompute, level.resample, x)
        x = _run(self.recompute[-1], self.mid_block1, x, time)
        x = _run(self.recompute[-1], self.mid_attn, x)
        x = _run(self.recompute[-1], self.mid_block2, x, time)
        for recompute, level in zip(reversed(self.recompute), self.ups, strict=True):
            assert isinstance(level, Level)
            x = _run(recompute, level.block1, torch.cat((x, skips.pop()), dim=1), time)
            x = _run(recompute, level.block2, torch.cat((x, skips.pop()), dim=1), time)
            x = _run(recompute, level.resample, _run(recompute, level.attention, x))
        # The released network has one more skip, from before the first level, and a residual block for it.
        x = self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), time))
        return F.pixel_shuffle(x, factor) if factor > 1 and self.full_size else x


def _run(recompute: bool, module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Call a block; with `recompute` it keeps its inputs only, and runs once more in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # No block draws random numbers, so saving and restoring their state would cost time for nothing.
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return module(*inputs)


def recomputed_levels(cfg: UNetConfig) -> tuple[bool, ...]:
    """Which levels recompute their activations; the middle goes with the deepest. `auto`, not yet chosen, is none."""
    if isinstance(cfg.checkpointing, tuple):
        return cfg.checkpointing
    return (cfg.checkpointing is True,) * len(cfg.multipliers)


def is_recomputed(cfg: UNetConfig, name: str) -> bool:
    """Is the module of this name (`downs.1.0`, `mid_attn`, `ups.0.3`, ...) recomputed? The ends never are."""
    levels = recomputed_levels(cfg)
    part, _, rest = name.partition(".")
    if part.startswith("mid_"):
        return levels[-1]
    index = int(rest.partition(".")[0]) if part in ("downs", "ups") else -1
    return index >= 0 and (levels if part == "downs" else levels[::-1])[index]


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
