"""What a process keeps in memory beside activations, counted in copies of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.device_fit import (
    copies_of_weights,
    is_half,
    is_out_of_memory,
    learning_bytes,
    process_bytes,
    training_cost,
)
from ddpm_lmk.engine.precision import missing_bf16
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.models import build_model
from ddpm_lmk.tasks import build_task
from tests.engine.toy import config

SGD: dict[str, Any] = {"kind": "sgd"}
NETWORK = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 4, "groups": 4}


@pytest.mark.parametrize(
    ("train", "optim", "world", "zero", "copies"),
    [
        ({}, {}, 1, 0, 5),  # weights, gradient, two moments, average
        ({"ema": None}, SGD, 1, 0, 2),
        ({}, {}, 8, 1, 1 + 1 + 1 + 3 / 8),
        ({}, {}, 8, 2, 1 + 1 + 1 / 8 + 3 / 8),
        (
            {"exactness": "exact", "micro_batch": 1, "global_batch_size": 16},
            {},
            2,
            0,
            5 + 5,
        ),  # 8 leaves: sums of 8, 4, 2, 1, 1
    ],
)
def test_copies_of_the_weights(
    train: dict[str, Any], optim: dict[str, Any], world: int, zero: int, copies: float
) -> None:
    assert copies_of_weights(config(train=train, optim=optim), world=world, zero=zero) == pytest.approx(copies)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"task": {"kind": "landmarks"}},
        {"task": {"kind": "landmarks", "timestep": 3}},
        {"task": {"kind": "landmarks"}, "optim": {"freeze": "trunk"}},
    ],
)
def test_only_what_learns_has_a_gradient_moments_and_an_average(sections: dict[str, Any]) -> None:
    cfg = config(**sections, model=NETWORK)
    task = build_task(cfg, SPECS["phantom-chest"])
    network = build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size)
    state = TrainState.fresh(cfg, task.wrap(network))
    cost = training_cost(cfg, task, is_fused=False)
    learning = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
    assert learning_bytes(cfg, cost) == 4 * learning
    needed = process_bytes(cfg, cost, 0, device="cpu", is_half=False)
    assert needed == 4 * (2 * cost.params + 4 * learning)  # and a standardised copy of all weights


def test_activations_are_half_as_large_in_sixteen_bits() -> None:
    assert is_half(config(train={"precision": "fp16"}), "cpu")
    assert is_half(config(), "cuda")
    assert is_half(config(), "cpu") == (not missing_bf16())
    assert not is_half(config(train={"precision": "fp32"}), "cuda")


def test_every_way_to_say_that_memory_is_out() -> None:
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError(), cpu)))
    assert not any(map(is_out_of_memory, (RuntimeError("shape mismatch"), None)))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
