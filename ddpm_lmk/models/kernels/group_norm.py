"""GroupNorm, scale and shift per image (FiLM), and SiLU as one function that keeps nothing but its input.

PyTorch's three operations keep three maps for the backward pass and walk over memory once each; here the two last maps
are recomputed. On CUDA the walks are fused too, by Triton kernels, which also keep channels-last
memory where PyTorch's own GroupNorm does not (`group_norm_triton`). Everywhere else `CpuNorm` does the same sums with
PyTorch's kernels. Both are tested against float64 and against each other. `choose_norm` decides once per run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_lmk.models.kernels.group_norm_gradients import parameter_gradients

NormChoice = Literal["auto", "native", "fused"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Norm:
    """How norms are computed in a run, and why: `native` (PyTorch's operations), `folded` (CpuNorm) or `triton`."""

    name: Literal["native", "folded", "triton"]
    reason: str


def choose_norm(wanted: NormChoice, device: torch.device, *, is_compiled: bool) -> Norm:
    """The norm of a run; `wanted` is train.group_norm."""
    if wanted == "native":
        return Norm("native", "as asked for")
    if wanted == "auto" and is_compiled:
        return Norm("native", "the compiler fuses it")
    if device.type == "cuda" and find_spec("triton") is not None:
        return Norm("triton", "one kernel for norm, scale, shift and SiLU that keeps channels-last")
    if device.type == "cuda" and wanted == "auto":
        return Norm("native", "no triton here; pip install triton")
    if wanted == "auto":
        return Norm("native", "faster than one function in PyTorch's kernels where maps are small, as they are on CPUs")
    return Norm("folded", "keeps half as many maps")


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, film: Tensor | None, silu: bool, use: str
) -> Tensor:
    """silu((GroupNorm(x) * weight + bias) * (1 + scale) + shift), channels-last, in the type of `x`.

    Args:
        x: maps [B, C, H, W].
        film: scale, then shift [B, 2 C]; None: neither.
        silu: False leaves the last function out.
        use: `triton` or `folded`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # meta: a pass that only counts memory
        if use == "triton" and x.dtype != torch.float64:
            from ddpm_lmk.models.kernels.group_norm_triton import TritonNorm

            return TritonNorm.apply(x, weight, bias, film, groups, eps, silu)
        return CpuNorm.apply(x, weight, bias, film, groups, eps, silu)


class CpuNorm(torch.autograd.Function):
    """The fused norm in PyTorch's own kernels; keeps its input and the statistics of each group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        """See `group_norm`."""
        batch, channels, height, width = x.shape
        scaled = (weight, bias) if x.dtype in HALF else (weight.to(x.dtype), bias.to(x.dtype))  # statistics in fp32
        out, mean, rstd = torch.native_group_norm(x, *scaled, batch, channels, height * width, groups, eps)
        if film is not None:
            scale, shift = film.to(x.dtype)[:, :, None, None].chunk(2, dim=1)
            torch.addcmul(shift, out, scale + 1, out=out)
        ctx.save_for_backward(x, weight, bias, film, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return torch.ops.aten.silu_(out) if silu else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Recomputes what SiLU was given, then leaves the rest to the kernel that is faster for the type."""
        x, weight, bias, film, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        wide = mean.dtype
        mean, rstd = (value.to(wide).repeat_interleave(channels // ctx.groups, 1) for value in (mean, rstd))  # [B, C]
        scale, shift = (0.0, 0.0) if film is None else film.to(wide).chunk(2, dim=1)
        factor = torch.as_tensor(1 + scale, dtype=wide, device=x.device).expand(batch, channels)
        coefficients = _Coefficients(mean, rstd, weight.to(wide) * factor, bias.to(wide) * factor + shift)
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, coefficients.applied(x))
        backward = _by_channel if x.dtype in HALF else _by_image
        dx, sums, moments = backward(grad, x, coefficients, ctx.groups)
        return (dx, *parameter_gradients(sums, moments, weight, bias, film), None, None, None)


@dataclass(frozen=True)
class _Coefficients:
    """z = (x - mean) * rstd * gain + offset, each [B, C]."""

    mean: Tensor
    rstd: Tensor
    gain: Tensor
    offset: Tensor

    def applied(self, x: Tensor) -> Tensor:
        """z, in the type of `x`."""
        slope = self.rstd * self.gain
        constant = self.offset - self.mean * slope
        return torch.addcmul(constant.to(x.dtype)[:, :, None, None], x, slope.to(x.dtype)[:, :, None, None])


def _by_image(dz: Tensor, x: Tensor, c: _Coefficients, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the input, sums, moments; with PyTorch's kernel, whose weight gradients are over a batch of one."""
    batch, channels, height, width = x.shape
    per_group = channels // groups
    parts = [
        torch.ops.aten.native_group_norm_backward(
            dz[i : i + 1],
            x[i : i + 1],
            c.mean[i : i + 1, ::per_group].contiguous(),
            c.rstd[i : i + 1, ::per_group].contiguous(),
            c.gain[i],
            *(1, channels, height * width, groups),
            [True, True, True],
        )
        for i in range(batch)
    ]
    dx, moments, sums = zip(*parts, strict=True)
    return torch.cat(dx), torch.stack(sums), torch.stack(moments)


def _by_channel(dz: Tensor, x: Tensor, c: _Coefficients, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with sums over pixels as matrix products: PyTorch's kernel is slow in 16 bits."""
    batch, channels, height, width = x.shape
    pixels = height * width
    flat_dz, flat_x = (value.permute(0, 2, 3, 1).reshape(batch, pixels, channels) for value in (dz, x))
    sums = torch.bmm(flat_dz.new_ones(1, 1, pixels).expand(batch, 1, pixels), flat_dz)[:, 0].to(c.mean.dtype)
    products = torch.sum(flat_dz * flat_x, dim=1, dtype=c.mean.dtype)
    moments = (products - c.mean * sums) * c.rstd

    def over_group(values: Tensor) -> Tensor:
        mean = (c.gain * values).view(batch, groups, -1).sum(2) / (pixels * (channels // groups))
        return mean.repeat_interleave(channels // groups, 1)

    slope = -c.rstd.square() * over_group(moments)
    constant = -c.rstd * over_group(sums) - slope * c.mean
    to_maps = [value.to(x.dtype)[:, :, None, None] for value in (constant, slope, c.rstd * c.gain)]
    dx = torch.addcmul(to_maps[0], x, to_maps[1]).addcmul_(dz, to_maps[2])
    return dx, sums, moments
