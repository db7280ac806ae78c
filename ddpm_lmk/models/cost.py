"""What a network costs, from its configuration alone: parameters, operations, memory. Nothing is built or run.

Two counts of operations are kept apart. `flops_forward` is that of the published algorithm (for the paper's network
at 256 x 256: 1,747.147 GMAC, paper.md section 1), the number to compare methods by. `flops_executed` is what our code
runs for the same result, after the algebra described in `blocks`; the number to compare with a device's peak. Both
count convolutions, linear layers and attention products, one multiply-add as two, and leave out norms and activations.

What a network of plain layers costs, by building it without memory and watching one image go through.

For networks whose layers run as published, so that both counts of `cost` are one. Takes a tenth of a second for the
largest; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models.unet import checkpointed_levels, linear_levels

FLOAT_BYTES = 4
SEPARATE, FUSED = 6, 3  # maps a residual block keeps beside its input, by how its norms are computed


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
class _Part:
    """One block: parameters, multiply-adds (published, executed), values kept for the backward pass, values given.

    Attributes:
        time: parameters only a timestep reaches.
        wide: values kept in fp32 too where those above are in 16 bits.
    """

    params: int
    macs: int
    executed: int
    kept: int
    given: int
    time: int = 0
    wide: int = 0


def model_cost(
    cfg: UNetConfig, image_size: int, out_channels: int, *, full_size: bool = True, is_fused: bool = False
) -> ModelCost:
    """Cost of `build_model(cfg, out_channels=..., full_size=...)` for one image of `image_size` squared, with time.

    Args:
        is_fused: norms keep nothing but their input (`fused`).
    """
    outputs = out_channels * (cfg.pixel_unshuffle**2 if full_size else 1)
    maps = FUSED if is_fused else SEPARATE
    by_level = list(_parts_by_level(cfg, image_size // cfg.pixel_unshuffle, outputs, maps=maps))
    parts = [part for _, part in by_level]
    params = sum(part.params for part in parts)
    executed = 2 * sum(part.executed for part in parts)
    recomputed = _recomputed(cfg)
    again = [part for level, part in by_level if level in recomputed]
    kept = sum(part.kept for part in parts) + sum(part.given - part.kept for part in again)
    kept += max((part.kept for part in again), default=0)
    wide = sum(part.wide for level, part in by_level if level not in recomputed)
    wide += max((part.wide for part in again), default=0)
    repeated = 2 * sum(part.executed for part in again)
    return ModelCost(
        params=params,
        flops_forward=2 * sum(part.macs for part in parts),
        flops_executed=executed,
        flops_train=3 * executed + repeated,
        activation_bytes=kept * FLOAT_BYTES,
        weight_bytes=params * FLOAT_BYTES,
        optimizer_bytes=2 * params * FLOAT_BYTES,
        time_bytes=sum(part.time for part in parts) * FLOAT_BYTES,
        head_bytes=parts[-1].params * FLOAT_BYTES,
        wide_bytes=wide * FLOAT_BYTES,
    )


def _recomputed(cfg: UNetConfig) -> set[str]:
    """Names of the levels whose activations are computed again; the middle goes with the deepest."""
    wanted = checkpointed_levels(cfg)
    last = len(wanted) - 1
    names = [
        {f"downs.{level}", f"ups.{last - level}", *(["mid"] if level == last else [])} for level in range(last + 1)
    ]
    return {name for again, level in zip(wanted, names, strict=True) if again for name in level}


def _parts_by_level(cfg: UNetConfig, side: int, num_outputs: int, *, maps: int) -> Iterator[tuple[str, _Part]]:
    """The blocks in the order of the forward pass, each with the name of its level.

    Args:
        side: of the first level, pixels.
        maps: what a residual block keeps beside its input, in maps of its output's size.
    """

    def resnet(cin: int, cout: int, area: int) -> _Part:
        return _resnet(cin, cout, area, time_dim, maps=maps)

    width, time_dim, hidden = cfg.width, 4 * cfg.width, cfg.heads * cfg.head_dim
    channels = [width, *(width * m for m in cfg.multipliers)]
    levels = list(zip(channels[:-1], channels[1:], linear_levels(cfg), strict=True))
    last, area = len(levels) - 1, [(side >> level) ** 2 for level in range(len(levels))]
    yield "ends", _conv(cfg.pixel_unshuffle**2, width, area[0], taps=1)
    yield "ends", _time(width, time_dim)
    yield "ends", _time(time_dim, time_dim)
    for level, (inner, outer, attends) in enumerate(levels):
        name = f"downs.{level}"
        yield from ((name, resnet(inner, inner, area[level])) for _ in range(2))
        if attends:
            yield name, _linear_attention(inner, area[level], hidden, cfg.head_dim)
        is_last = level == last
        yield name, _conv(inner, outer, area[level], taps=9) if is_last else _half(inner, outer, area[level])
    deepest = channels[-1]
    yield "mid", resnet(deepest, deepest, area[last])
    yield "mid", _full_attention(deepest, area[last], hidden)
    yield "mid", resnet(deepest, deepest, area[last])
    for level, (inner, outer, attends) in reversed(list(enumerate(levels))):
        name = f"ups.{last - level}"
        yield from ((name, resnet(outer + inner, outer, area[level])) for _ in range(2))
        if attends:
            yield name, _linear_attention(outer, area[level], hidden, cfg.head_dim)
        is_first = level == 0
        yield name, _conv(outer, inner, area[level], taps=9) if is_first else _double(outer, inner, area[level])
    yield "ends", resnet(2 * width, width, area[0])
    yield "ends", _conv(width, num_outputs, area[0], taps=1)


def _conv(cin: int, cout: int, area: int, *, taps: int) -> _Part:
    macs = taps * cin * cout * area
    return _Part(taps * cin * cout + cout, macs, macs, cin * area, cin * area)


def _time(cin: int, cout: int) -> _Part:
    """A linear layer of the time embedding."""
    params = cin * cout + cout
    return _Part(params, cin * cout, cin * cout, cin, cin, time=params)


def _half(cin: int, cout: int, area: int) -> _Part:
    """Pixel-unshuffle and 1x1 convolution; `area` is that of the input."""
    macs = cin * cout * area
    return _Part(4 * cin * cout + cout, macs, macs, cin * area, cin * area)


def _double(cin: int, cout: int, area: int) -> _Part:
    """Enlargement and 3x3 convolution, run as one transposed 4x4 convolution; `area` is that of the input."""
    return _Part(9 * cin * cout + cout, 36 * cin * cout * area, 16 * cin * cout * area, cin * area, cin * area)


def _resnet(cin: int, cout: int, area: int, time_dim: int, *, maps: int) -> _Part:
    """Two 3x3 convolutions, two norms, the time projection and, where channels change, a 1x1 convolution.

    Kept: the input; what each norm, the modulation and each SiLU was given (fused: each norm only); the first block's
    output.
    """
    shortcut = cin * cout if cin != cout else 0
    weights = 9 * cin * cout + 9 * cout * cout + shortcut
    time = 2 * cout * (time_dim + 1)
    params = weights + (2 * cout + 4 * cout) + (cout if shortcut else 0) + time
    macs = weights * area + 2 * cout * time_dim
    return _Part(params, macs, macs, (cin + maps * cout) * area, cin * area, time)


def _linear_attention(channels: int, area: int, hidden: int, head_dim: int) -> _Part:
    """Kept: the input, its norm, query and key after their softmax (which is fp32), and the last norm's input."""
    params = 2 * channels + 3 * channels * hidden + (hidden + 1) * channels + 2 * channels
    published = (4 * channels * hidden + 2 * hidden * head_dim) * area
    executed = 4 * channels * hidden * area + 2 * hidden * head_dim * channels
    kept, wide = (3 * channels + 2 * hidden) * area, 2 * hidden * area
    return _Part(params, published, executed, kept, channels * area, wide=wide)


def _full_attention(channels: int, area: int, hidden: int) -> _Part:
    """Kept: the input, its norm, query, key, value and the result of the attention."""
    params = 2 * channels + 3 * channels * hidden + (hidden + 1) * channels
    macs = 4 * channels * hidden * area + 2 * hidden * area**2
    return _Part(params, macs, macs, (2 * channels + 4 * hidden) * area, channels * area)


KEEPING = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.MaxPool2d)  # layers that need their input again


def traced_cost(build: Callable[[], nn.Module], *shape: int) -> ModelCost:
    """Cost of `build()` for an input of `shape` (C, H, W); activations are an estimate: what layers are given."""
    with torch.device("meta"):
        model = build()
        image = torch.zeros(1, *shape)
    macs, kept = 0, {}

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d | nn.Linear):
            per_output = module.weight[0].numel()
            macs += output.numel() * per_output
        kept[id(inputs[0])] = inputs[0]  # held, so that no other tensor takes its place

    for module in model.modules():
        if isinstance(module, KEEPING):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model.eval()(image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(
        params=params,
        flops_forward=2 * macs,
        flops_executed=2 * macs,
        flops_train=6 * macs,
        activation_bytes=sum(tensor.numel() for tensor in kept.values()) * FLOAT_BYTES,
        weight_bytes=params * FLOAT_BYTES,
        optimizer_bytes=2 * params * FLOAT_BYTES,
    )
