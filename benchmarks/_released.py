"""The network of the paper's released code as plain PyTorch, written from its description (docs/method.md, section 1).

This is the formulation that others start from, to measure ours against: NCHW tensors, weights standardised by mean and
variance in every forward pass, 1x1 convolutions as convolutions, attention as products over all pixels, enlargement
followed by a 3x3 convolution, two input channels of which one is always zero, and `torch.utils.checkpoint` around every
block, as released. Names are the released ones; tests hold it to `tests/reference/released_unet.py`, which is
independent of it, and to ours. It is no part of the package: nothing is trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GROUPS, HEADS, HEAD_DIM = 4, 4, 32
HIDDEN = HEADS * HEAD_DIM


class StandardisedConv2d(nn.Conv2d):
    """3x3 convolution whose weight is brought to mean 0 and variance 1 per output channel, in every call."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) * (variance + eps).rsqrt(), self.bias, padding=1)


class Block(nn.Module):
    """Convolution, GroupNorm, scale and shift, SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.proj = StandardisedConv2d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels_out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, film: Sequence[Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if film is not None:
            scale, shift = film
            x = x * (scale + 1) + shift
        return self.act(x)


class ResnetBlock(nn.Module):
    """Two blocks and a residual, the first modulated by time."""

    def __init__(self, channels_in: int, channels_out: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * channels_out))
        self.block1 = Block(channels_in, channels_out)
        self.block2 = Block(channels_out, channels_out)
        self.res_conv = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        film = None if time is None else self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, film)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """Softmax of queries over features and of keys over pixels; ends in GroupNorm with one group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * HIDDEN, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(HIDDEN, channels, 1), nn.GroupNorm(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)).flatten(3) for part in self.to_qkv(x).chunk(3, dim=1))
        q, k = q.softmax(dim=-2) * HEAD_DIM**-0.5, k.softmax(dim=-1)  # each [B, heads, dim, N]
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(out.flatten(1, 2).unflatten(2, x.shape[2:]))


class Attention(nn.Module):
    """Softmax attention over all pixels, with its whole matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * HIDDEN, 1, bias=False)
        self.to_out = nn.Conv2d(HIDDEN, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)).flatten(3) for part in self.to_qkv(x).chunk(3, dim=1))
        scores = torch.einsum("bhdi,bhdj->bhij", q * HEAD_DIM**-0.5, k)
        weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        out = torch.einsum("bhij,bhdj->bhid", weights, v)
        return self.to_out(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


class PreNorm(nn.Module):
    """GroupNorm with one group, then `fn`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """`fn` plus its input."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class TimeEmbedding(nn.Sequential):
    """Sines and cosines of the timestep, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Identity(), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 4 * width))
        self.num_waves = width // 2

    def forward(self, t: Tensor) -> Tensor:
        weight = cast(nn.Linear, self[1]).weight
        steps = torch.arange(self.num_waves, device=t.device, dtype=weight.dtype)
        angles = t[:, None] * torch.exp(steps * (-math.log(10_000) / (self.num_waves - 1)))[None]
        return super().forward(torch.cat((angles.sin(), angles.cos()), dim=-1))


class ReleasedUNet(nn.Module):
    """Images [B, 1, S, S] and timesteps [B] or None -> [B, out_channels, S, S]."""

    def __init__(self, width: int, multipliers: Sequence[int], *, out_channels: int = 1, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        channels, time_dim = [width, *(width * m for m in multipliers)], 4 * width
        levels = list(pairwise(channels))

        def level(channels_in: int, channels_out: int, resample: nn.Module) -> nn.ModuleList:
            blocks = [ResnetBlock(channels_in, channels_out, time_dim) for _ in range(2)]
            attention = Residual(PreNorm(channels_out, LinearAttention(channels_out)))
            return nn.ModuleList([*blocks, attention, resample])

        self.init_conv = nn.Conv2d(2, width, 1)
        self.time_mlp = TimeEmbedding(width)
        self.downs = nn.ModuleList(
            level(inner, inner, _conv3(inner, outer) if index == len(levels) - 1 else _halved(inner, outer))
            for index, (inner, outer) in enumerate(levels)
        )
        self.mid_block1 = ResnetBlock(channels[-1], channels[-1], time_dim)
        self.mid_attn = Residual(PreNorm(channels[-1], Attention(channels[-1])))
        self.mid_block2 = ResnetBlock(channels[-1], channels[-1], time_dim)
        self.ups = nn.ModuleList(
            level(outer + inner, outer, _conv3(outer, inner) if index == 0 else _doubled(outer, inner))
            for index, (inner, outer) in reversed(list(enumerate(levels)))
        )
        self.final_res_block = ResnetBlock(2 * width, width, time_dim)
        self.final_conv = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        x = self.init_conv(torch.cat((torch.zeros_like(x), x), dim=1))
        r, time, skips = x.clone(), None if t is None else self.time_mlp(t), []
        for level in self.downs:
            block1, block2, attend, resample = cast(nn.ModuleList, level)
            x = self._run(block1, x, time)
            skips.append(x)
            x = self._run(attend, self._run(block2, x, time))
            skips.append(x)
            x = self._run(resample, x)
        x = self._run(self.mid_attn, self._run(self.mid_block1, x, time))
        x = self._run(self.mid_block2, x, time)
        for level in self.ups:
            block1, block2, attend, resample = cast(nn.ModuleList, level)
            x = self._run(block1, torch.cat((x, skips.pop()), dim=1), time)
            x = self._run(block2, torch.cat((x, skips.pop()), dim=1), time)
            x = self._run(resample, self._run(attend, x))
        return self.final_conv(self.final_res_block(torch.cat((x, r), dim=1), time))

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(module, *inputs, use_reentrant=False))
        return cast(Tensor, module(*inputs))


def _conv3(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def _halved(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels_in, channels_out, 1))


def _doubled(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), _conv3(channels_in, channels_out))
