"""Counts of parameters, operations against the paper's figures and PyTorch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model, model_cost
from tests.reference.released_unet import ReleasedUNet, random_state, released_shapes

VARIANTS = [
    UNetConfig(width=8),
    UNetConfig(width=16, multipliers=(1, 2, 3), heads=2, head_dim=8, pixel_unshuffle=2),
    UNetConfig(width=12, multipliers=(2, 4), linear_attention=(False, True), pixel_unshuffle=4),
]
TIMES = torch.tensor([7])


@pytest.mark.parametrize(("size", "gmac"), [(256, 1747.147), (128, 436.762), (64, 109.213)])
def test_paper_preset_costs_what_the_released_network_was_measured_to_cost(size, gmac):
    dead_channel = 256 * size**2  # the released network's second input channel, which ours does not have
    macs = model_cost(UNetConfig(width=256), size, 1).flops_forward // 2 + dead_channel
    assert round(macs / 1e9, 3) == gmac


def test_published_count_is_the_counter_s_on_the_released_network():
    x = torch.rand(1, 1, 32, 32)
    with FlopCounterMode(display=False) as counter:
        ReleasedUNet(random_state(released_shapes(8), dtype=torch.float32))(x, TIMES)
    dead_channel = 2 * 8 * 32**2
    assert model_cost(UNetConfig(width=8), 32, 1).flops_forward == counter.get_total_flops() - dead_channel


@pytest.mark.parametrize("cfg", VARIANTS)
def test_executed_count_is_the_counter_s_on_our_network(cfg):
    model = build_model(cfg, out_channels=3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
        model(torch.rand(1, 1, 64, 64), TIMES)
    assert model_cost(cfg, 64, 3).flops_executed == counter.get_total_flops()


@pytest.mark.parametrize("full_size", [True, False])
@pytest.mark.parametrize("cfg", VARIANTS)
def test_parameters_are_counted_exactly(cfg, full_size):
    model = build_model(cfg, out_channels=5, full_size=full_size)
    cost = model_cost(cfg, 64, 5, full_size=full_size)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.weight_bytes == 4 * cost.params


def test_checkpointing_adds_at_most_one_forward_pass():
    plain, again = (model_cost(UNetConfig(width=16, checkpointing=flag), 64, 1) for flag in (False, True))
    assert plain.flops_train == 3 * plain.flops_executed
    assert 3.5 * plain.flops_executed < again.flops_train < 4 * plain.flops_executed
