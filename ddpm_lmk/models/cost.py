"""What a network costs: parameters, operations, and the memory of a training step, without computing anything.

The network is built without memory (device `meta`), one image goes through, and a formula per kind of block counts.
Two counts of operations are kept apart. `flops_forward` is that of the published algorithm (for the paper's network
at 256 x 256: 1,747.147 GMAC, docs/method.md, section 1), the number to compare methods by. `flops_executed` is what our
code runs for the same result, after the algebra described in `blocks`; the number to compare with a device's peak.
Both count convolutions, linear layers and attention products, one multiply-add as two; norms and activations are less
than a hundredth and are left out. PyTorch's own counter gives the same numbers (tests/models/test_cost.py), but neither
the published count nor what is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ddpm_lmk.models.blocks import Attention, DoubleSizeConv2d, GroupNorm, HalfSizeConv2d, LinearAttention, ResnetBlock

FLOAT_BYTES = 4
# Maps a residual block keeps beside its input: what each norm, the modulation and each SiLU was given, and the first
# block's output; a fused norm keeps its input only and recomputes the rest.
SEPARATE, FUSED = 6, 3
BLOCKS = (ResnetBlock, LinearAttention, Attention)
PLAIN = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.MaxPool2d)  # layers that need their input again


@dataclass(frozen=True)
class ModelCost:
    """Counts for one image of a given side; bytes are for fp32."""

    params: int
    flops_forward: int  # published algorithm
    flops_executed: int  # this implementation
    flops_train: int  # forward and backward as executed, recomputation included
    activation_bytes: int  # kept between forward and backward; an estimate
    weight_bytes: int
    optimizer_bytes: int  # the two moments of AdamW
    time_bytes: int = 0  # of the weights: what only a timestep reaches
    head_bytes: int = 0  # of the weights: the output layer; 0 where it is not counted apart
    wide_bytes: int = 0  # kept in fp32 under autocast, beside a copy in 16 bits

    def kept_bytes(self, *, is_half: bool) -> int:
        """Kept between forward and backward pass of one image, in fp32 or under autocast to 16 bits."""
        return self.activation_bytes // 2 + self.wide_bytes if is_half else self.activation_bytes


@dataclass(frozen=True)
class Part:
    """One block: multiply-adds (published, executed), values kept for the backward pass, values of its input.

    Attributes:
        name: its place in the network, e.g. `downs.0.1`.
        wide: values kept in fp32 too where those above are in 16 bits.
    """

    name: str
    macs: int
    executed: int
    kept: int
    given: int
    wide: int = 0


def trace(model: nn.Module, image: Tensor, *more: Tensor, is_fused: bool = False) -> list[Part]:
    """The blocks of a network on device `meta`, in the order in which `image` [1, C, H, W] meets them.

    Args:
        is_fused: norms keep nothing but their input.
    """
    parts: list[Part] = []
    seen: dict[int, Tensor] = {}  # inputs by identity: held, so that no other tensor takes the place of one

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            part = _part(name, module, inputs[0], output, maps=FUSED if is_fused else SEPARATE)
            is_kept = id(inputs[0]) in seen and not isinstance(module, BLOCKS)  # two plain layers share one input
            parts.append(Part(name, part.macs, part.executed, 0, part.given) if is_kept else part)
            seen[id(inputs[0])] = inputs[0]

        return hook

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
    time: int = 0,
    head: int = 0,
) -> ModelCost:
    """The cost of a network of these parts.

    Args:
        params: all its parameters; of those, `time` are reached by a timestep only, `head` are the output layer's.
        recomputed: by a part's name, does it keep its input only and run once more in the backward pass?
    """
    executed = 2 * sum(part.executed for part in parts)
    twice = [part for part in parts if recomputed(part.name)]
    # Of what is recomputed, one block at a time is there in full.
    kept = sum(part.kept for part in parts) + sum(part.given - part.kept for part in twice)
    kept += max((part.kept for part in twice), default=0)
    wide = sum(part.wide for part in parts) - sum(part.wide for part in twice)
    wide += max((part.wide for part in twice), default=0)
    return ModelCost(
        params=params,
        flops_forward=2 * sum(part.macs for part in parts),
        flops_executed=executed,
        flops_train=3 * executed + 2 * sum(part.executed for part in twice),
        activation_bytes=kept * FLOAT_BYTES,
        weight_bytes=params * FLOAT_BYTES,
        optimizer_bytes=2 * params * FLOAT_BYTES,
        time_bytes=time * FLOAT_BYTES,
        head_bytes=head * FLOAT_BYTES,
        wide_bytes=wide * FLOAT_BYTES,
    )


def count_parameters(*modules: nn.Module) -> int:
    """Numbers in the parameters of these modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def plain_cost(build: Callable[[], nn.Module], *shape: int) -> ModelCost:
    """Cost of a network of plain layers for an input of `shape` (C, H, W); both counts of operations are one."""
    with torch.device("meta"):
        model, image = build(), torch.zeros(1, *shape)
    return total(trace(model, image), count_parameters(model))


def _counted(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a formula, with their names."""
    if isinstance(module, (*BLOCKS, *PLAIN)):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _counted(child, f"{name}.{key}" if name else key)


def _part(name: str, module: nn.Module, x: Tensor, out: Tensor, *, maps: int) -> Part:
    given, channels, area = x.numel(), x.shape[1], prod(x.shape[2:])
    if isinstance(module, ResnetBlock):
        weights = sum(p.numel() for key, p in module.named_parameters() if key.endswith("weight") and p.ndim == 4)
        macs = weights * area + 2 * out.shape[1] * module.time_dim
        return Part(name, macs, macs, given + maps * out.numel(), given)
    if isinstance(module, LinearAttention):
        hidden, dim = module.heads * module.head_dim, module.head_dim
        published = (4 * channels * hidden + 2 * hidden * dim) * area
        executed = 4 * channels * hidden * area + 2 * hidden * dim * channels
        # The input, its norm and the last norm's input; query and key after their softmax, which is fp32.
        wide = 2 * hidden * area
        return Part(name, published, executed, 3 * given + wide, given, wide)
    if isinstance(module, Attention):
        hidden = module.heads * module.head_dim
        macs = 4 * channels * hidden * area + 2 * hidden * area**2
        return Part(name, macs, macs, 2 * given + 4 * hidden * area, given)  # input, norm, query, key, value, result
    if isinstance(module, HalfSizeConv2d):
        macs = channels * out.shape[1] * area
        return Part(name, macs, macs, given, given)
    if isinstance(module, DoubleSizeConv2d):  # 3x3 at the size of the output, run as 4x4 at that of the input
        return Part(name, 36 * channels * out.shape[1] * area, 16 * channels * out.shape[1] * area, given, given)
    macs = out.numel() * module.weight[0].numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
    return Part(name, macs, macs, given, given)
