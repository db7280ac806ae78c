"""Standardising once per step is standardising in every pass, for any number of micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model
from ddpm_lmk.models.weight_standardization import OncePerStep, WeightStandardizedConv2d

SMALL = UNetConfig(width=8, multipliers=(1, 2), groups=4, heads=2, head_dim=4)
IMAGES = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.tensor([3, 420, 1, 77, 30, 499])


def gradients(model: nn.Module, *, cuts: int, once: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Gradients of a loss over six images, in `cuts` micro-batches."""
    model.zero_grad(set_to_none=True)
    standard = OncePerStep(model, dtype=dtype)
    if once:
        standard.begin()
    images = IMAGES.to(next(model.parameters()).dtype)
    for x, t in zip(images.chunk(cuts), TIMES.chunk(cuts)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            out = model(x, t).to(torch.promote_types(x.dtype, torch.float32))
        (out - x.square()).square().sum().backward()
    if once:
        standard.end()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def network(memory_format: torch.memory_format = torch.channels_last, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(SMALL.model_copy(update=changes), out_channels=1)
    return model.to(memory_format=memory_format)


@pytest.mark.parametrize("cuts", [1, 3, 6])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_those_of_standardising_in_every_pass(cuts: int, memory_format: torch.memory_format) -> None:
    model = network(memory_format).double()
    wanted = gradients(model, cuts=cuts, once=False)
    found = gradients(model, cuts=cuts, once=True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm(), name
        assert found[name].stride() == value.stride(), name


def test_gradients_are_the_same_with_recomputed_activations() -> None:
    model = network(checkpointing=True).double()
    wanted, found = (gradients(model, cuts=2, once=once) for once in (False, True))
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm(), name


def test_half_precision_is_as_near_to_the_exact_gradient_either_way() -> None:
    exact = gradients(network().double(), cuts=3, once=False)
    distances = [
        sum(float((found[name] - value).norm() / value.norm()) for name, value in exact.items() if "proj.w" in name)
        for found in (gradients(network(), cuts=3, once=once, dtype=torch.bfloat16) for once in (False, True))
    ]
    assert distances[1] < 1.1 * distances[0]


def test_weights_that_moved_are_standardised_anew_in_the_same_tensors() -> None:
    conv = WeightStandardizedConv2d(3, 4)
    standard = OncePerStep(conv)
    standard.begin()
    before = conv.unit
    assert before is not None
    first = before.clone()
    standard.end()
    assert conv.unit is None, "outside of a step, as in an evaluation with other weights, a pass standardises itself"
    with torch.no_grad():
        conv.weight.add_(torch.randn_like(conv.weight))
    standard.begin()
    assert conv.unit is before
    assert not torch.equal(conv.unit, first)


def test_a_step_that_is_given_up_leaves_nothing_behind() -> None:
    conv = WeightStandardizedConv2d(3, 4)
    standard = OncePerStep(conv)
    standard.begin()
    standard.drop()
    conv.weight.grad = torch.ones_like(conv.weight)
    standard.end()
    assert conv.unit is None
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight)), "a gradient of the weight itself stays"
