"""Networks: images in, maps out. `build_model` is the one door; `model_cost` tells what a network costs unbuilt."""

from __future__ import annotations

from torch import nn

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models.cost import ModelCost, model_cost
from ddpm_lmk.models.unet import UNet

__all__ = ["ModelCost", "build_model", "model_cost"]

_KINDS = {"ddpm_unet": UNet}


def build_model(cfg: UNetConfig, *, out_channels: int, full_size: bool = True) -> nn.Module:
    """The network of a run, randomly initialised.

    It maps images [B, 1, S, S] and timesteps [B] (or None: no time conditioning) to [B, out_channels, S, S], or to
    [B, out_channels, S / patch, S / patch] when not `full_size`. Raises ConfigError for widths that cannot be grouped.
    """
    if cfg.width % 2 or cfg.width % cfg.groups:
        raise ConfigError(
            f"model.width={cfg.width} must be even and divisible by model.groups={cfg.groups}; "
            f"nearest: {-(-cfg.width // (2 * cfg.groups)) * 2 * cfg.groups}"
        )
    return _KINDS[cfg.kind](cfg, out_channels=out_channels, full_size=full_size)
