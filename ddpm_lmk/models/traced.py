"""What a network of plain layers costs, by building it without memory and watching one image go through.

For networks whose layers run as published, so that both counts of `cost` are one. Takes a tenth of a second for the
largest; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.models.cost import FLOAT_BYTES, ModelCost

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
