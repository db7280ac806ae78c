"""Counts of parameters, operations and memory against the paper's figures, PyTorch's counter and autograd's store."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.kernels import linear_attention_cpu
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
    assert (cost.weight_bytes, cost.optimizer_bytes) == (4 * cost.params, 8 * cost.params)


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cfg", VARIANTS)
def test_activation_estimate_is_near_what_autograd_keeps(cfg, checkpointing, is_half, monkeypatch):
    """The estimate is for a GPU: on a processor the attention of large maps keeps less (`linear_attention`)."""
    monkeypatch.setattr(linear_attention_cpu, "LARGE_BYTES", math.inf)
    cfg = cfg.model_copy(update={"checkpointing": checkpointing})
    model = build_model(cfg, out_channels=3).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
        one, three = (_kept_bytes(model, torch.rand(batch, 1, 64, 64)) for batch in (1, 3))
    per_image = (three - one) / 2  # what does not grow with the batch, such as standardised weights, is left out
    estimate = model_cost(cfg, 64, 3).kept_bytes(is_half=is_half)
    if checkpointing:  # the estimate includes the one block that is recomputed at a time
        plain = model_cost(cfg.model_copy(update={"checkpointing": False}), 64, 3)
        assert per_image < estimate < 0.6 * plain.kept_bytes(is_half=is_half)
    else:
        assert estimate == pytest.approx(per_image, rel=0.15)


def test_checkpointing_adds_at_most_one_forward_pass():
    plain, again = (model_cost(UNetConfig(width=16, checkpointing=flag), 64, 1) for flag in (False, True))
    assert plain.flops_train == 3 * plain.flops_executed
    assert 3.5 * plain.flops_executed < again.flops_train < 4 * plain.flops_executed


def _kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes autograd keeps between forward and backward, parameters aside; each storage once."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, torch.full((len(x),), 7))
    return sum(kept.values())
