"""Networks: images in, maps out. `build_model` makes one, `model_cost` says what it costs unbuilt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from ddpm_lmk.config import EncoderUNetConfig, GU2NetConfig, Network, UNetConfig
from ddpm_lmk.models.cost import ModelCost, Part, count_parameters, total, trace
from ddpm_lmk.models.encoder_unet import EncoderUNet
from ddpm_lmk.models.gu2net import GU2Net
from ddpm_lmk.models.unet import UNet, is_recomputed

__all__ = ["ModelCost", "build_model", "model_cost"]


def build_model(cfg: Network, *, out_channels: int, full_size: bool = True, domains: Sequence[int] = ()) -> nn.Module:
    """The network of a run, randomly initialised.

    It maps images [B, 1, S, S] and timesteps [B] (or None: no time conditioning) to [B, out_channels, S, S]. When not
    `full_size`, a ddpm_unet gives maps smaller by `model.pixel_unshuffle`.

    Args:
        domains: outputs of each dataset of a mixture, for a network with layers of its own for each (gu2net, which is
            conditioned on the domain [B] instead of the timestep); empty: one dataset.
    """
    if isinstance(cfg, GU2NetConfig):
        return GU2Net(cfg, domains=domains or (out_channels,))
    if isinstance(cfg, EncoderUNetConfig):
        return EncoderUNet(cfg, out_channels=out_channels)
    return UNet(cfg, out_channels=out_channels, full_size=full_size)


def model_cost(
    cfg: Network, image_size: int, out_channels: int, *, full_size: bool = True, domains: Sequence[int] = ()
) -> ModelCost:
    """Cost of `build_model(cfg, ...)` for one image of `image_size` squared, with time conditioning.

    Of a mixture's network, operations are those for an image of the first dataset.
    """
    if not isinstance(cfg, UNetConfig):
        is_frozen = isinstance(cfg, EncoderUNetConfig) and cfg.frozen
        traced = _traced(cfg, image_size, out_channels, full_size, tuple(domains))
        return total(*traced, frozen=lambda name: is_frozen and name.startswith("encoder."))
    plain = cfg.model_copy(update={"checkpointing": False})  # choosing what to recompute asks many times
    traced = _traced(plain, image_size, out_channels, full_size, ())
    return total(*traced, recomputed=lambda name: is_recomputed(cfg, name))


@lru_cache(maxsize=32)
def _traced(
    cfg: Network, image_size: int, out_channels: int, full_size: bool, domains: tuple[int, ...]
) -> tuple[tuple[Part, ...], int]:
    """The parts of a network, and the number of its parameters."""
    with torch.device("meta"):
        model = build_model(cfg, out_channels=out_channels, full_size=full_size, domains=domains)
        image = torch.zeros(1, 1, image_size, image_size)
        time = (torch.zeros(1, dtype=torch.long),) if isinstance(model, UNet) else ()
    return tuple(trace(model, image, *time)), count_parameters(model)
