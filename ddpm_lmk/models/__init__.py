"""Networks: images in, maps out. `build_model` is the one door; `model_cost` tells what a network costs unbuilt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ddpm_lmk.config import EncoderUNetConfig, GU2NetConfig, Network
from ddpm_lmk.models import cost
from ddpm_lmk.models.cost import ModelCost, traced_cost
from ddpm_lmk.models.encoder_unet import EncoderUNet
from ddpm_lmk.models.gu2net import GU2Net
from ddpm_lmk.models.unet import UNet

__all__ = ["ModelCost", "build_model", "model_cost"]


def build_model(cfg: Network, *, out_channels: int, full_size: bool = True, domains: Sequence[int] = ()) -> nn.Module:
    """The network of a run, randomly initialised.

    `domains` are the outputs of each dataset of a mixture, for a network with layers of their own for them (gu2net,
    which is told the domain [B] instead of the timestep); empty: one dataset.

    It maps images [B, 1, S, S] and timesteps [B] (or None: no time conditioning) to [B, out_channels, S, S]. When not
    `full_size`, a ddpm_unet gives [B, out_channels, S / patch, S / patch].
    """
    if isinstance(cfg, GU2NetConfig):
        return GU2Net(cfg, domains=domains or (out_channels,))
    if isinstance(cfg, EncoderUNetConfig):
        return EncoderUNet(cfg, out_channels=out_channels)
    return UNet(cfg, out_channels=out_channels, full_size=full_size)


def model_cost(
    cfg: Network,
    image_size: int,
    out_channels: int,
    *,
    full_size: bool = True,
    domains: Sequence[int] = (),
    is_fused: bool = False,
) -> ModelCost:
    """Cost of `build_model(cfg, out_channels=..., ...)` for one image of `image_size` squared, with time.

    Of a mixture's network, operations are those for an image of the first dataset. `is_fused` is for a ddpm_unet whose
    norms keep nothing but their input.
    """
    if isinstance(cfg, GU2NetConfig):
        return traced_cost(lambda: GU2Net(cfg, domains=domains or (out_channels,)), 1, image_size, image_size)
    if isinstance(cfg, EncoderUNetConfig):
        return traced_cost(lambda: EncoderUNet(cfg, out_channels=out_channels), 1, image_size, image_size)
    return cost.model_cost(cfg, image_size, out_channels, full_size=full_size, is_fused=is_fused)
