"""Channels-last is kept through the whole network: a layer that loses it makes every layer after it copy its maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_maps_and_their_gradients_stay_channels_last(checkpointing: bool, dtype: torch.dtype | None) -> None:
    cfg = UNetConfig(width=8, multipliers=(1, 2), heads=2, head_dim=4, groups=4, patch=2, checkpointing=checkpointing)
    model = build_model(cfg, out_channels=2).to(memory_format=torch.channels_last)
    broken: list[str] = []

    def look(what: str, value: Tensor) -> None:
        if value.shape[1] > 1 and value.stride(1) > 1:
            broken.append(what)

    for name, module in model.named_modules():

        def watch(module: object, inputs: object, out: object, name: str = name) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and name and not name.startswith("final_conv"):
                look(name, out)
                out.register_hook(lambda gradient: look(f"gradient of {name}", gradient))

        module.register_forward_hook(watch)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(torch.rand(2, 1, 16, 16), torch.tensor([3, 7]))
    (out * torch.rand_like(out)).sum().backward()
    assert broken == []
