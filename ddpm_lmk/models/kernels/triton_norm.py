"""The fused norm of `fused` on CUDA: how maps are dealt out to the kernels of `norm_kernels`, and their autograd.

Only `fused` imports this module, where there is Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ddpm_lmk.models.kernels import group_norm_triton as kernels
from ddpm_lmk.models.kernels.group_norm import parameter_gradients

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
        """See `fused.group_norm`."""
        cut = Cut.of(x, groups)
        means, squares = cut.partial(x), cut.partial(x)
        channels = (cut.per_group(x), cut.per_group(x), cut.per_channel(x), cut.per_channel(x))
        sizes = (cut.pixels, cut.channels)
        kernels.chunk_statistics[cut.grid](x, means, squares, *sizes, cut.per_chunk, cut.chunks, **cut.tile)
        film = None if film is None else film.contiguous()
        kernels.combine_statistics[cut.groups](
            *(means, squares, weight, bias, weight if film is None else film, *channels, *sizes),
            *(cut.width, cut.per_chunk, cut.chunks, eps),
            HAS_FILM=film is not None,
            K=COMBINE,
            num_warps=4,
        )
        y = torch.empty_like(x)
        kernels.apply[cut.grid](x, y, *channels, *sizes, cut.width, cut.per_chunk, cut.chunks, SILU=silu, **cut.tile)
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
        kernels.chunk_gradients[cut.grid](x, dy, sums, moments, *channels, *sizes, *ends, SILU=ctx.silu, **cut.tile)
        sum_of, moment_of = cut.per_channel(x), cut.per_channel(x)
        means = (cut.per_group(x), cut.per_group(x))
        kernels.combine_gradients[cut.groups](
            *(sums, moments, channels[1], channels[2], sum_of, moment_of, *means, *sizes, cut.chunks), **cut.combining
        )
        dx = torch.empty_like(x)
        kernels.apply_gradients[cut.grid](x, dy, dx, *means, *channels, *sizes, *ends, SILU=ctx.silu, **cut.tile)
        return (dx, *parameter_gradients(sum_of, moment_of, weight, bias, film), None, None, None)
