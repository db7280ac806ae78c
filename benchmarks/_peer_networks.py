"""The networks that `peers` measures: ours, the released one in plain PyTorch, and those of three public packages.

Each is built as its package's own examples build it; none gets a setting that slows it down. All take one-channel
images and timesteps. Sizes are those of `Shape`: equal width says what users get who pick the same numbers, `matched`
channels are chosen so that parameters and operations come close to ours. A package that is not there is None.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from _released import ReleasedUNet
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model

HEAD_DIM = 32
GRAIN = 16  # channels of matched networks are multiples of it: what vector units and norm groups like
GROUPS = (32, 16, 8, 4)
MATCHING_TRIES = 12  # half a second each
PACKAGES = {
    "diffusers": ("diffusers", "diffusers"),
    "lucidrains": ("denoising_diffusion_pytorch", "denoising-diffusion-pytorch"),
    "monai": ("monai", "monai"),
}  # short name -> module, distribution

Call = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What a network is built for: channels of each level, and what the operations are counted at."""

    channels: tuple[int, ...]
    size_px: int
    batch: int


@dataclass(frozen=True)
class Counts:
    """Parameters, and multiply-adds (two operations each) as `torch.utils.flop_counter` counts them for all alike."""

    params: int
    forward_flops: int  # of a batch
    train_flops: int  # forward and backward; forward alone where backward was not wanted


def is_installed(name: str) -> bool:
    """Is the package of a peer here? Ours and the released network always are."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name][0]) is not None


def build(name: str, shape: Shape) -> tuple[nn.Module, Call]:
    """The network and how it is called: images [B, 1, S, S] and timesteps [B] -> [B, 1, S, S]."""
    model = _BUILDERS[name](shape)
    if name == "diffusers":
        return model, lambda x, t: cast(Tensor, model(x, t).sample)
    return model, cast(Call, model)


@cache
def count(name: str, shape: Shape, *, backward: bool = True) -> Counts:
    """Counts by one rule for every network, on tensors without content; attention as products, fused or not."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model, call = build(name, shape)
        x = torch.empty(shape.batch, 1, shape.size_px, shape.size_px)
        t = torch.ones(shape.batch, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            out = call(x, t)
            forward = counter.get_total_flops()
            if backward:
                out.sum().backward()
    return Counts(sum(p.numel() for p in model.parameters()), forward, counter.get_total_flops())


def matched(name: str, shape: Shape, target: Counts) -> Shape:
    """The shape at which a network is nearest to `target` in parameters and operations, one level at a time."""
    best, apart, tries = shape, _apart(name, shape, target), 0
    improved = True
    while improved:
        improved = False
        for level in reversed(range(len(best.channels))):  # the deepest has most of the parameters
            for change in (-GRAIN, GRAIN):
                channels = list(best.channels)
                channels[level] += change
                if channels[level] < GRAIN or tries == MATCHING_TRIES:
                    continue
                candidate = Shape(tuple(channels), shape.size_px, shape.batch)
                found, tries = _apart(name, candidate, target), tries + 1
                if found < apart:
                    best, apart, improved = candidate, found, True
    return best


def _apart(name: str, shape: Shape, target: Counts) -> float:
    """The larger of the two relative differences."""
    counts = count(name, shape, backward=False)
    params, flops = counts.params / target.params, counts.forward_flops / target.forward_flops
    return max(abs(math.log(params)), abs(math.log(flops)))


def _ours(shape: Shape, *, checkpointing: bool = False) -> nn.Module:
    width = shape.channels[0]
    cfg = UNetConfig(width=width, multipliers=_multiples(shape.channels, width), checkpointing=checkpointing)
    return build_model(cfg, out_channels=1)


def _released(shape: Shape, *, checkpointing: bool) -> nn.Module:
    width = shape.channels[0]
    return ReleasedUNet(width, _multiples(shape.channels, width), checkpointing=checkpointing)


def _multiples(channels: Sequence[int], unit: int) -> tuple[int, ...]:
    assert all(count % unit == 0 for count in channels), f"channels {channels} are no multiples of {unit}"
    return tuple(count // unit for count in channels)


def _diffusers(shape: Shape) -> nn.Module:
    """Residual levels, attention in the deepest one and in the middle."""
    from diffusers import UNet2DModel

    plain = len(shape.channels) - 1
    model = UNet2DModel(
        sample_size=shape.size_px,
        in_channels=1,
        out_channels=1,
        block_out_channels=shape.channels,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=_head_dim(shape),
        norm_num_groups=_groups(shape),
    )
    return cast(nn.Module, model)


def _monai(shape: Shape) -> nn.Module:
    """The same levels and attention as for diffusers."""
    from monai.networks.nets import DiffusionModelUNet

    plain = len(shape.channels) - 1
    model = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2,
        channels=shape.channels,
        attention_levels=(False,) * plain + (True,),
        norm_num_groups=_groups(shape),
        num_head_channels=_head_dim(shape),
        use_flash_attention=torch.cuda.is_available(),  # MONAI refuses it without CUDA
    )
    return cast(nn.Module, model)


def _lucidrains(shape: Shape) -> nn.Module:
    """The network ours descends from. Its module imports torchvision for its trainer, which a network needs not."""
    _stand_in_for_torchvision()
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    unit = math.gcd(*shape.channels)
    model = Unet(dim=unit, init_dim=shape.channels[0], dim_mults=_multiples(shape.channels, unit), channels=1)
    return cast(nn.Module, model)


def _groups(shape: Shape) -> int:
    return next(groups for groups in GROUPS if all(count % groups == 0 for count in shape.channels))


def _head_dim(shape: Shape) -> int:
    return math.gcd(HEAD_DIM, shape.channels[-1])


def _stand_in_for_torchvision() -> None:
    """Empty modules under the names that are imported, where torchvision is missing or does not fit this torch."""
    with suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    parts = {name: types.ModuleType(f"torchvision.{name}") for name in ("transforms", "utils")}
    package: Any = types.ModuleType("torchvision")
    package.__path__ = []
    package.__dict__.update(parts)
    scores: Any = types.ModuleType("denoising_diffusion_pytorch.fid_evaluation")
    scores.FIDEvaluation = object
    sys.modules |= {"torchvision": package, **{f"torchvision.{name}": part for name, part in parts.items()}}
    sys.modules["denoising_diffusion_pytorch.fid_evaluation"] = scores


_BUILDERS: dict[str, Callable[[Shape], nn.Module]] = {
    "ours": _ours,
    "ours, checkpointing": lambda shape: _ours(shape, checkpointing=True),
    "released": lambda shape: _released(shape, checkpointing=False),
    "released, checkpointing": lambda shape: _released(shape, checkpointing=True),
    "diffusers": _diffusers,
    "lucidrains": _lucidrains,
    "monai": _monai,
}
PEERS = tuple(PACKAGES)
