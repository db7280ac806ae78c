"""GroupNorm, scale and shift, and SiLU in Triton: six kernels, and how maps are dealt out to them.

Maps are walked over as [B, N, C] with N pixels. Forward: sums over chunks of pixels (`chunk_statistics`), then one
program per image and group that combines them (`combine_statistics`), then one walk that writes the result (`apply`).
Backward is the same three steps for the two sums the gradient needs. So a map is read twice and written once forward,
and read four times and written once backward, with hundreds of programs for one image of 256 x 256 x 256. There are no
atomics: how sums are cut depends on the shape of one image only, so results repeat bit for bit and do not depend on the
batch. All arithmetic is fp32. Variance is summed about the first pixel of a chunk, then about the mean (Chan et al.),
which survives means far larger than the deviation. Only `group_norm` imports this module, where there is Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_lmk.models.kernels.group_norm_gradients import parameter_gradients


@triton.jit
def _load_maps(pointer, rows, columns, last, C):
    """A tile [rows, columns] of one image in fp32, zero outside, and what is inside."""
    inside = (rows < last)[:, None] & (columns < C)[None, :]
    return tl.load(pointer + rows[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def chunk_statistics(x, means, squares, N, C, per_chunk, chunks, R: tl.constexpr, K: tl.constexpr):
    """Per chunk and channel: mean, and sum of squared distances from it."""
    part = tl.program_id(0)
    image = (part // chunks).to(tl.int64)
    first = (part % chunks) * per_chunk
    last = tl.minimum(first + per_chunk, N)
    columns = tl.program_id(1) * K + tl.arange(0, K)
    x += image * N * C
    pivot = tl.load(x + first * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    total = tl.zeros((R, K), tl.float32)
    square = tl.zeros((R, K), tl.float32)
    for start in range(first, last, R):
        values, inside = _load_maps(x, start + tl.arange(0, R), columns, last, C)
        distance = tl.where(inside, values - pivot[None, :], 0.0)
        total += distance
        square += distance * distance
    shift = tl.sum(total, axis=0) / (last - first)
    place = part.to(tl.int64) * C + columns
    tl.store(means + place, pivot + shift, mask=columns < C)
    tl.store(squares + place, tl.sum(square, axis=0) - shift * shift * (last - first), mask=columns < C)


@triton.jit
def combine_statistics(
    means, squares, weight, bias, film, mean_of, rstd_of, gain_of, offset_of,
    N, C, width, per_chunk, chunks, eps, HAS_FILM: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Per image and group: mean and 1 / deviation; per channel of it: gain and offset of z = (x - mean) gain + offset.

    `width` is the number of channels of a group.
    """
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * width
    groups = tl.num_programs(1)
    start_of = image * chunks * C + first
    pivot = tl.load(means + start_of)
    total = tl.zeros((K,), tl.float32)
    for start in range(0, chunks * width, K):
        index = start + tl.arange(0, K)
        inside = index < chunks * width
        count = tl.minimum(N - (index // width) * per_chunk, per_chunk).to(tl.float32)
        value = tl.load(means + start_of + (index // width) * C + index % width, mask=inside, other=0.0)
        total += tl.where(inside, (value - pivot) * count, 0.0)
    size = (N * width).to(tl.float32)
    mean = pivot + tl.sum(total, axis=0) / size
    spread = tl.zeros((K,), tl.float32)
    for start in range(0, chunks * width, K):
        index = start + tl.arange(0, K)
        inside = index < chunks * width
        count = tl.minimum(N - (index // width) * per_chunk, per_chunk).to(tl.float32)
        place = start_of + (index // width) * C + index % width
        distance = tl.load(means + place, mask=inside, other=0.0) - mean
        square = tl.load(squares + place, mask=inside, other=0.0)
        spread += tl.where(inside, square + distance * distance * count, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(spread, axis=0) / size + eps)
    tl.store(mean_of + image * groups + tl.program_id(1), mean)
    tl.store(rstd_of + image * groups + tl.program_id(1), rstd)
    for start in range(0, width, K):
        index = start + tl.arange(0, K)
        inside = index < width
        gain = tl.load(weight + first + index, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(bias + first + index, mask=inside, other=0.0).to(tl.float32)
        if HAS_FILM:
            scale = tl.load(film + image * 2 * C + first + index, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(film + image * 2 * C + C + first + index, mask=inside, other=0.0).to(tl.float32)
            gain = gain * (1.0 + scale)
            offset = offset * (1.0 + scale) + shift
        tl.store(gain_of + image * C + first + index, gain * rstd, mask=inside)
        tl.store(offset_of + image * C + first + index, offset, mask=inside)


@triton.jit
def _load_channels(mean_of, rstd_of, gain_of, offset_of, image, columns, C, width):
    """Mean, 1 / deviation, gain and offset of each of these channels of an image."""
    inside = columns < C
    group = image * (C // width) + columns // width
    mean = tl.load(mean_of + group, mask=inside, other=0.0)
    rstd = tl.load(rstd_of + group, mask=inside, other=0.0)
    gain = tl.load(gain_of + image * C + columns, mask=inside, other=0.0)
    return mean, rstd, gain, tl.load(offset_of + image * C + columns, mask=inside, other=0.0)


@triton.jit
def apply(
    x, y, mean_of, rstd_of, gain_of, offset_of, N, C, width, per_chunk, chunks,
    SILU: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write z, or silu(z)."""
    part = tl.program_id(0)
    image = (part // chunks).to(tl.int64)
    first = (part % chunks) * per_chunk
    last = tl.minimum(first + per_chunk, N)
    columns = tl.program_id(1) * K + tl.arange(0, K)
    mean, _, gain, offset = _load_channels(mean_of, rstd_of, gain_of, offset_of, image, columns, C, width)
    x += image * N * C
    y += image * N * C
    for start in range(first, last, R):
        rows = start + tl.arange(0, R)
        values, inside = _load_maps(x, rows, columns, last, C)
        z = (values - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + rows[:, None] * C + columns[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _towards_z(values, grad, mean, rstd, gain, offset, SILU: tl.constexpr):
    """dz, and the normalised input."""
    centred = values - mean[None, :]
    if SILU:
        z = centred * gain[None, :] + offset[None, :]
        s = tl.sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    return grad, centred * rstd[None, :]


@triton.jit
def chunk_gradients(
    x, dy, sums, moments, mean_of, rstd_of, gain_of, offset_of, N, C, width, per_chunk, chunks,
    SILU: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Per chunk and channel: sum of dz, and sum of dz times the normalised input."""
    part = tl.program_id(0)
    image = (part // chunks).to(tl.int64)
    first = (part % chunks) * per_chunk
    last = tl.minimum(first + per_chunk, N)
    columns = tl.program_id(1) * K + tl.arange(0, K)
    mean, rstd, gain, offset = _load_channels(mean_of, rstd_of, gain_of, offset_of, image, columns, C, width)
    x += image * N * C
    dy += image * N * C
    total = tl.zeros((R, K), tl.float32)
    product = tl.zeros((R, K), tl.float32)
    for start in range(first, last, R):
        rows = start + tl.arange(0, R)
        values, _ = _load_maps(x, rows, columns, last, C)
        grad, _ = _load_maps(dy, rows, columns, last, C)
        dz, unit = _towards_z(values, grad, mean, rstd, gain, offset, SILU)
        total += dz
        product += dz * unit
    place = part.to(tl.int64) * C + columns
    tl.store(sums + place, tl.sum(total, axis=0), mask=columns < C)
    tl.store(moments + place, tl.sum(product, axis=0), mask=columns < C)


@triton.jit
def combine_gradients(
    sums, moments, rstd_of, gain_of, sum_of, moment_of, mean_sum, mean_moment, N, C, width, chunks,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Per channel both sums over all chunks; per group their means over pixels and channels, weighted by the gain."""
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * width
    group = image * tl.num_programs(1) + tl.program_id(1)
    all_sums = tl.zeros((K,), tl.float32)
    all_moments = tl.zeros((K,), tl.float32)
    for start in range(0, width, K):
        index = start + tl.arange(0, K)
        columns = tl.where(index < width, first + index, C)
        total = tl.zeros((R, K), tl.float32)
        product = tl.zeros((R, K), tl.float32)
        for chunk in range(0, chunks, R):
            rows = chunk + tl.arange(0, R)
            values, _ = _load_maps(sums + image * chunks * C, rows, columns, chunks, C)
            total += values
            values, _ = _load_maps(moments + image * chunks * C, rows, columns, chunks, C)
            product += values
        inside = index < width
        channel_sum = tl.sum(total, axis=0)
        channel_moment = tl.sum(product, axis=0)
        tl.store(sum_of + image * C + columns, channel_sum, mask=inside)
        tl.store(moment_of + image * C + columns, channel_moment, mask=inside)
        gain = tl.load(gain_of + image * C + columns, mask=inside, other=0.0)
        all_sums += gain * channel_sum
        all_moments += gain * channel_moment
    size = (N * width).to(tl.float32)
    tl.store(mean_sum + group, tl.sum(all_sums, axis=0) / size)
    tl.store(mean_moment + group, tl.sum(all_moments, axis=0) / size)


@triton.jit
def apply_gradients(
    x, dy, dx, mean_sum, mean_moment, mean_of, rstd_of, gain_of, offset_of, N, C, width, per_chunk, chunks,
    SILU: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write gain dz - mean(gain dz) - unit mean(gain dz unit), with the means over the group."""
    part = tl.program_id(0)
    image = (part // chunks).to(tl.int64)
    first = (part % chunks) * per_chunk
    last = tl.minimum(first + per_chunk, N)
    columns = tl.program_id(1) * K + tl.arange(0, K)
    mean, rstd, gain, offset = _load_channels(mean_of, rstd_of, gain_of, offset_of, image, columns, C, width)
    group = image * (C // width) + columns // width
    constant = tl.load(mean_sum + group, mask=columns < C, other=0.0)
    slope = tl.load(mean_moment + group, mask=columns < C, other=0.0)
    x += image * N * C
    dy += image * N * C
    dx += image * N * C
    for start in range(first, last, R):
        rows = start + tl.arange(0, R)
        values, inside = _load_maps(x, rows, columns, last, C)
        grad, _ = _load_maps(dy, rows, columns, last, C)
        dz, unit = _towards_z(values, grad, mean, rstd, gain, offset, SILU)
        result = gain[None, :] * dz - constant[None, :] - unit * slope[None, :]
        tl.store(dx + rows[:, None] * C + columns[None, :], result.to(dx.dtype.element_ty), mask=inside)


TILE = 4096  # elements a program holds at once
TILES_PER_CHUNK = 8
COMBINE = 1024  # partial sums a combining program holds at once


@dataclass(frozen=True)
class Cut:
    """How one image [N, C] is dealt out to programs; a function of its shape alone."""

    batch: int
    pixels: int
    channels: int
    width: int  # channels of a group
    rows: int
    columns: int
    per_chunk: int
    chunks: int

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Cut:
        """The cut of channels-last maps [B, C, H, W]."""
        batch, channels, height, width = x.shape
        columns = min(triton.next_power_of_2(channels), 256)
        rows = TILE // columns
        per_chunk = rows * TILES_PER_CHUNK
        chunks = triton.cdiv(height * width, per_chunk)
        return cls(batch, height * width, channels, channels // groups, rows, columns, per_chunk, chunks)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs that walk over maps."""
        return self.batch * self.chunks, triton.cdiv(self.channels, self.columns)

    @property
    def groups(self) -> tuple[int, int]:
        """Programs that combine."""
        return self.batch, self.channels // self.width

    @property
    def tile(self) -> dict[str, int]:
        """Rows and columns a program holds at once."""
        return {"R": self.rows, "K": self.columns, "num_warps": 8}

    @property
    def combining(self) -> dict[str, int]:
        """Chunks and channels a combining program holds at once."""
        columns = min(triton.next_power_of_2(self.width), 256)
        return {"R": max(1, TILE // columns), "K": columns, "num_warps": 8}

    def partial(self, x: Tensor) -> Tensor:
        """Room for a number per chunk and channel."""
        return x.new_empty(self.batch * self.chunks, self.channels, dtype=torch.float32)

    def per_channel(self, x: Tensor) -> Tensor:
        """Room for a number per image and channel."""
        return x.new_empty(self.batch, self.channels, dtype=torch.float32)

    def per_group(self, x: Tensor) -> Tensor:
        """Room for a number per image and group."""
        return x.new_empty(self.groups, dtype=torch.float32)


class TritonNorm(torch.autograd.Function):
    """The fused norm on CUDA; keeps its input, the statistics of groups, and gain and offset of channels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        """See `group_norm.group_norm`."""
        cut = Cut.of(x, groups)
        means, squares = cut.partial(x), cut.partial(x)
        channels = (cut.per_group(x), cut.per_group(x), cut.per_channel(x), cut.per_channel(x))
        sizes = (cut.pixels, cut.channels)
        chunk_statistics[cut.grid](x, means, squares, *sizes, cut.per_chunk, cut.chunks, **cut.tile)
        film = None if film is None else film.contiguous()
        combine_statistics[cut.groups](
            *(means, squares, weight, bias, weight if film is None else film, *channels, *sizes),
            *(cut.width, cut.per_chunk, cut.chunks, eps),
            HAS_FILM=film is not None,
            K=COMBINE,
            num_warps=4,
        )
        y = torch.empty_like(x)
        apply[cut.grid](x, y, *channels, *sizes, cut.width, cut.per_chunk, cut.chunks, SILU=silu, **cut.tile)
        ctx.save_for_backward(x, weight, bias, film, *channels)
        ctx.cut, ctx.silu = cut, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Two walks over the maps, with the sums over groups between them."""
        x, weight, bias, film, *channels = ctx.saved_tensors
        cut: Cut = ctx.cut
        dy = dy.contiguous(memory_format=torch.channels_last)
        sizes = (cut.pixels, cut.channels, cut.width)
        ends = (cut.per_chunk, cut.chunks)
        sums, moments = cut.partial(x), cut.partial(x)
        chunk_gradients[cut.grid](x, dy, sums, moments, *channels, *sizes, *ends, SILU=ctx.silu, **cut.tile)
        sum_of, moment_of = cut.per_channel(x), cut.per_channel(x)
        means = (cut.per_group(x), cut.per_group(x))
        combine_gradients[cut.groups](
            *(sums, moments, channels[1], channels[2], sum_of, moment_of, *means, *sizes, cut.chunks), **cut.combining
        )
        dx = torch.empty_like(x)
        apply_gradients[cut.grid](x, dy, dx, *means, *channels, *sizes, *ends, SILU=ctx.silu, **cut.tile)
        return (dx, *parameter_gradients(sum_of, moment_of, weight, bias, film), None, None, None)
