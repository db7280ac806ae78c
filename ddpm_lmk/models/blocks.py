"""Blocks of the DDPM U-Net: weight-standardised residual blocks, both attentions, resampling, time embedding.

Module and parameter names, and what is computed, are those of the released code (paper.md, section 1), so that its
checkpoints load with almost no renaming (see `weights`). How it is computed differs where algebra allows less work:
1x1 convolutions are matrix products over pixels, linear attention never builds its values, and enlarging followed by a
3x3 convolution is one transposed convolution. Everything is channels-last: [B, C, H, W] in shape, [B, H, W, C] in
memory. Statistics and softmaxes are computed in fp32 whatever autocast says. Nothing here knows of levels or skips.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.models.kernels import linear_attention_cpu
from ddpm_lmk.models.kernels.group_norm import Norm, group_norm
from ddpm_lmk.models.weight_standardization import WeightStandardizedConv2d, at_least_fp32


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution, as one matrix product over all pixels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return from_pixels(F.linear(to_pixels(x), self.weight.flatten(1), self.bias))


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps the type and layout of its input.

    Statistics are fp32 inside the kernel. Left alone, autocast would return fp32, and some CUDA versions NCHW.

    Attributes:
        use: the implementation, see `fused.Norm`.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels)
        self.use = "native"

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "triton":
            return self.fused(x, film=None, silu=False)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            out = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return out.contiguous(memory_format=torch.channels_last)

    def fused(self, x: Tensor, *, film: Tensor | None, silu: bool) -> Tensor:
        """The norm, then scale and shift where `film` [B, 2 C] is given, then SiLU where asked for, in one."""
        return group_norm(
            x, self.weight, self.bias, groups=self.num_groups, eps=self.eps, film=film, silu=silu, use=self.use
        )


def use_norm(model: nn.Module, norm: Norm) -> None:
    """Have all norms of a model computed in this way."""
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.use = norm.name


def to_pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]: a view, no copy, for channels-last tensors."""
    return x.permute(0, 2, 3, 1)


def from_pixels(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], channels-last in memory."""
    return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """3x3 convolution, GroupNorm, optional scale and shift per image and channel (FiLM), SiLU."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.proj = WeightStandardizedConv2d(channels_in, channels_out)
        self.norm = GroupNorm(groups, channels_out)

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """Maps [B, I, H, W] and film [B, 2 O] (scale, then shift) -> [B, O, H, W]."""
        x = self.proj(x)
        if self.norm.use != "native":
            return self.norm.fused(x, film=film, silu=True)
        x = self.norm(x)
        if film is not None:
            scale, shift = film.to(x.dtype)[:, :, None, None].chunk(2, dim=1)
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Two blocks and a residual; the time embedding modulates the first block only."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * channels_out))
        self.block1 = Block(channels_in, channels_out, groups)
        self.block2 = Block(channels_out, channels_out, groups)
        self.res_conv = PointwiseConv2d(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """Maps [B, I, H, W] and time [B, time_dim] or None (no modulation at all) -> [B, O, H, W]."""
        hidden = self.block1(x, None if time is None else self.mlp(time))
        return self.block2(hidden) + self.res_conv(x)


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of pixels, not with its square; ends in GroupNorm with one group.

    With query softmaxed over its features and key over pixels, each head is `out = query (key^T value)`. Since
    `value = pixels Wv^T` and the result is multiplied by the output weight Wo, only `key^T pixels` and `query` times a
    small matrix run over all pixels: out = query [(key^T pixels) Wv^T Wo^T] + bias.
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * head_dim, channels, 1), GroupNorm(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        heads, dim, wide = self.heads, self.head_dim, at_least_fp32(x.dtype)
        pixels = to_pixels(x).reshape(batch, height * width, channels)
        to_query, to_key, to_value = self.to_qkv.weight.flatten(1).chunk(3)  # each [heads dim, C]
        by_image = linear_attention_cpu.is_wanted(pixels, heads * dim)
        if by_image:
            pooled = linear_attention_cpu.Pool.apply(pixels, to_key)
        else:
            key = torch.bmm(to_key.expand(batch, -1, -1), pixels.mT).softmax(2, dtype=wide)  # [B, heads dim, N]
            pooled = torch.bmm(key, pixels)  # [B, heads dim, C]
        context = pooled.unflatten(1, (heads, dim)) @ to_value.view(heads, dim, channels).mT  # [B, heads, dim, dim]
        project, norm = cast(nn.Conv2d, self.to_out[0]), self.to_out[1]
        mix = context @ project.weight.view(channels, heads, dim).permute(1, 2, 0)  # [B, heads, dim, C]
        assert project.bias is not None
        mix = mix.flatten(1, 2) * dim**-0.5
        if by_image:
            out = linear_attention_cpu.Spread.apply(pixels, to_query, mix, project.bias, heads)
        else:
            query = F.linear(pixels, to_query).unflatten(2, (heads, dim)).softmax(3, dtype=wide).flatten(2)
            out = torch.baddbmm(project.bias, query, mix)
        return norm(from_pixels(out.view(batch, height, width, channels)))


class Attention(nn.Module):
    """Full softmax attention over all pixels."""

    def __init__(self, channels: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = PointwiseConv2d(heads * head_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pixels = to_pixels(x).reshape(batch, height * width, channels)
        qkv = F.linear(pixels, self.to_qkv.weight.flatten(1)).unflatten(2, (3, self.heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, dim]
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.to_out(from_pixels(out.reshape(batch, height, width, -1)))


class PreNorm(nn.Module):
    """GroupNorm with one group, then `fn`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """`fn` plus its input."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class HalfSizeConv2d(nn.Conv2d):
    """pixel_unshuffle(2), then a 1x1 convolution: the same numbers as one 2x2 convolution of stride 2."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(4 * channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_channels, x.shape[1], 2, 2)
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), self.bias, stride=2)


class DoubleSizeConv2d(nn.Conv2d):
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution, in 4/9 of the operations.

    Each output pixel sees only 2x2 different inputs, so the pair is one transposed convolution of stride 2 whose 4x4
    kernel is the 3x3 kernel spread over a 2x2 box. (It also avoids `F.interpolate`, whose compiled CPU gradient under
    autocast is silently zero.)
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        flipped = self.weight.flip(2, 3).transpose(0, 1)
        boxes = [F.pad(flipped, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1)]
        kernel = (boxes[0] + boxes[1] + boxes[2] + boxes[3]).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class TimeEmbedding(nn.Sequential):
    """Integer timesteps [B] -> [B, time_dim]: sinusoids, then two linear layers with a GELU between them."""

    def __init__(self, width: int, time_dim: int) -> None:
        super().__init__(nn.Identity(), nn.Linear(width, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))

    def forward(self, t: Tensor) -> Tensor:
        weight = cast(nn.Linear, self[1]).weight
        return super().forward(sinusoids(t, weight.shape[1], dtype=at_least_fp32(weight.dtype)).to(weight.dtype))


def sinusoids(t: Tensor, width: int, *, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of `t * 10000^(-i / (width / 2 - 1))` for i = 0 .. width / 2 - 1: [B] -> [B, width]."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=dtype)
    angle = t.to(dtype)[:, None] * torch.exp(steps * (-math.log(10_000) / (half - 1)))
    return torch.cat((angle.sin(), angle.cos()), dim=1)
