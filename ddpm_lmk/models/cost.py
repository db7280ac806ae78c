"""What a network costs: parameters and operations, without computing anything.

The network is built without memory (device `meta`), one image goes through, and a formula per kind of block counts.
Two counts of operations are kept apart. `flops_forward` is that of the published algorithm (for the paper's network
at 256 x 256: 1,747.147 GMAC, docs/method.md, section 1), the number to compare methods by. `flops_executed` is what our
code runs for the same result, after the algebra described in `blocks`; the number to compare with a device's peak.
Both count convolutions, linear layers and attention products, one multiply-add as two; norms and activations are less
than a hundredth and are left out. PyTorch's own counter gives the same numbers (tests/models/test_cost.py), but not
the published count. Memory is measured, not counted: see `engine.device_fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.models.blocks import Attention, DoubleSizeConv2d, GroupNorm, HalfSizeConv2d, LinearAttention, ResnetBlock
from ddpm_lmk.models.vit import TokenAttention

FLOAT_BYTES = 4
COUNTED = (ResnetBlock, LinearAttention, Attention, TokenAttention, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class ModelCost:
    """Counts for one image of a given side."""

    params: int
    flops_forward: int  # published algorithm
    flops_executed: int  # this implementation
    flops_train: int  # forward and backward as executed, recomputation included

    @property
    def weight_bytes(self) -> int:
        """Of the parameters in fp32."""
        return self.params * FLOAT_BYTES


@dataclass(frozen=True)
class Part:
    """Multiply-adds of one block, published and executed, and its place in the network, e.g. `downs.0.1`."""

    name: str
    macs: int
    executed: int


def trace(model: nn.Module, image: Tensor, *more: Tensor) -> list[Part]:
    """The blocks of a network on device `meta`, in the order in which `image` [1, C, H, W] meets them."""
    parts: list[Part] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: parts.append(_part(name, module, inputs[0], output))

    for module in model.modules():
        if isinstance(module, GroupNorm):  # it switches off autocast, which device meta does not know; no shape changes
            module.forward = lambda x: x  # type: ignore[method-assign]
    for name, module in _counted(model, ""):
        module.register_forward_hook(watch(name))
    with torch.no_grad():
        model.eval()(image, *more)
    return parts


def total(
    parts: Collection[Part],
    params: int,
    *,
    recomputed: Callable[[str], bool] = lambda name: False,
    frozen: Callable[[str], bool] = lambda name: False,
) -> ModelCost:
    """The cost of a network of these parts and parameters; by a part's name, does it run once more, or never back?"""
    executed = 2 * sum(part.executed for part in parts)
    repeated = 2 * sum(part.executed for part in parts if recomputed(part.name))
    # A backward pass has two products for each of the forward pass: towards the input, and towards the weight.
    backward = 2 * 2 * sum(part.executed for part in parts if not frozen(part.name))
    return ModelCost(params, 2 * sum(part.macs for part in parts), executed, executed + backward + repeated)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def plain_cost(build: Callable[[], nn.Module], *shape: int) -> ModelCost:
    """Cost of a network of plain layers for an input of `shape` (C, H, W); both counts of operations are one."""
    with torch.device("meta"):
        model, image = build(), torch.zeros(1, *shape)
    return total(trace(model, image), count_parameters(model))


def _counted(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a formula, with their names."""
    if isinstance(module, COUNTED):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _counted(child, f"{name}.{key}" if name else key)


def _part(name: str, module: nn.Module, x: Tensor, out: Tensor) -> Part:
    channels, area = x.shape[1], prod(x.shape[2:])
    if isinstance(module, TokenAttention):  # tokens [B, N, D]
        tokens, dim = x.shape[1:]
        macs = 4 * tokens * dim**2 + 2 * tokens**2 * dim
        return Part(name, macs, macs)
    if isinstance(module, ResnetBlock):
        weights = sum(p.numel() for key, p in module.named_parameters() if key.endswith("weight") and p.ndim == 4)
        macs = weights * area + 2 * out.shape[1] * module.time_dim
        return Part(name, macs, macs)
    if isinstance(module, LinearAttention):  # ours never builds the values, see `blocks`
        hidden, dim = module.heads * module.head_dim, module.head_dim
        published = (4 * channels * hidden + 2 * hidden * dim) * area
        return Part(name, published, 4 * channels * hidden * area + 2 * hidden * dim * channels)
    if isinstance(module, Attention):
        hidden = module.heads * module.head_dim
        macs = 4 * channels * hidden * area + 2 * hidden * area**2
        return Part(name, macs, macs)
    if isinstance(module, HalfSizeConv2d):
        macs = channels * out.shape[1] * area
        return Part(name, macs, macs)
    if isinstance(module, DoubleSizeConv2d):  # 3x3 at the size of the output, run as 4x4 at that of the input
        return Part(name, 36 * channels * out.shape[1] * area, 16 * channels * out.shape[1] * area)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    macs = out.numel() * module.weight[0].numel()
    return Part(name, macs, macs)
