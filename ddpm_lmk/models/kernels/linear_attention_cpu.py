"""The two halves of linear attention on a processor: image by image, in its caches, with nothing kept but the input.

Queries and keys have 128 channels where the maps of the first level may have 32, so that they are the largest tensors
of the network. Written down for a whole batch, each is a walk through memory; an image's fits into the cache. Both are
computed again in the backward pass, which costs a sixth of the attention's operations and no more time than reading
them back would. On a GPU, and under autocast or a compiler, `blocks.LinearAttention` uses products over the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGE_BYTES = 4 * 2**20  # of the queries of a batch; what is smaller stays in the caches anyway (measured: 15 % slower)


def is_faster(pixels: Tensor, hidden: int) -> bool:
    """Is going image by image the way for these pixels [B, N, C], with `hidden` channels of queries?"""
    # Autocast and the compiler see into batch products, but not into a function with a backward pass of its own.
    is_plain = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    is_wide = pixels.dtype in (torch.float32, torch.float64)
    is_large = pixels.shape[0] * pixels.shape[1] * hidden * pixels.element_size() >= LARGE_BYTES
    return pixels.device.type == "cpu" and is_wide and is_plain and is_large


class Pool(torch.autograd.Function):
    """softmax over pixels of `weight pixels^T`, times pixels: [B, N, C] and [K, C] -> [B, K, C]."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor) -> Tensor:
        """Two products per image."""
        pooled = pixels.new_empty(len(pixels), *weight.shape)
        logits, keys = pixels.new_empty(2, len(weight), pixels.shape[1])
        for image, out in zip(pixels, pooled):
            torch.mm(_softmax(torch.mm(weight, image.T, out=logits), keys), image, out=out)
        ctx.save_for_backward(pixels, weight, pooled)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The sum in the softmax's gradient, over pixels of key times its gradient, is over channels of the result."""
        pixels, weight, pooled = ctx.saved_tensors
        d_pixels, d_weight = torch.empty_like(pixels), torch.zeros_like(weight)
        logits, keys = pixels.new_empty(2, len(weight), pixels.shape[1])  # [K, N]
        d_rows = pixels.new_empty(pixels.shape[2], pixels.shape[1])  # [C, N]: products with long rows are the fast ones
        sums = (grad * pooled).sum(2, keepdim=True)  # [B, K, 1]
        for image, d_image, d_out, total in zip(pixels, d_pixels, grad, sums):
            _softmax(torch.mm(weight, image.T, out=logits), keys)
            torch.mm(d_out.T, keys, out=d_rows)
            d_logits = torch.mm(d_out, image.T, out=logits).sub_(total).mul_(keys)
            d_image.copy_(d_rows.addmm_(weight.T, d_logits).T)
            d_weight.addmm_(d_logits, image)
        return d_pixels, d_weight


class Spread(torch.autograd.Function):
    """softmax over each head's features of `pixels weight^T`, times `mix`, plus `bias`: [B, N, C] -> [B, N, C].

    `weight` is [heads dim, C], `mix` [B, heads dim, C].
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, mix: Tensor, bias: Tensor, heads: int) -> Tensor:
        """Two products per image."""
        spread = torch.empty_like(pixels)
        logits, queries = pixels.new_empty(2, pixels.shape[1], len(weight))
        for image, mixed, out in zip(pixels, mix, spread):
            _softmax_by_head(torch.mm(image, weight.T, out=logits), queries, heads)
            torch.addmm(bias, queries, mixed, out=out)
        ctx.save_for_backward(pixels, weight, mix)
        ctx.heads = heads
        return spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Queries are computed once more, one image at a time."""
        pixels, weight, mix = ctx.saved_tensors
        grad = grad.contiguous()
        d_pixels, d_mix, d_weight = torch.empty_like(pixels), torch.empty_like(mix), torch.zeros_like(weight)
        first, queries, third = pixels.new_empty(3, pixels.shape[1], len(weight))  # [N, heads dim]
        by_head = [buffer.unflatten(1, (ctx.heads, -1)) for buffer in (first, queries, third)]
        for image, mixed, d_out, d_image, d_mixed in zip(pixels, mix, grad, d_pixels, d_mix):
            _softmax_by_head(torch.mm(image, weight.T, out=first), queries, ctx.heads)
            torch.mm(queries.T, d_out, out=d_mixed)
            torch.mm(d_out, mixed.T, out=first)  # the logits are not needed any more, and their buffer is warm
            torch.ops.aten._softmax_backward_data.out(by_head[0], by_head[1], 2, pixels.dtype, grad_input=by_head[2])
            torch.mm(third, weight, out=d_image)
            d_weight.addmm_(third.T, image)
        return d_pixels, d_weight, d_mix, grad.sum((0, 1)), None


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Over the last dimension, into `out`."""
    return torch.ops.aten._softmax.out(logits, logits.ndim - 1, False, out=out)


def _softmax_by_head(logits: Tensor, out: Tensor, heads: int) -> None:
    """Over the features of each head: [N, heads dim] into `out`, of the same shape."""
    _softmax(logits.unflatten(1, (heads, -1)), out.unflatten(1, (heads, -1)))
