"""The moving average: its recurrence, its warm-up, its swap with the weights, and its form that does nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpm_lmk.config import EmaConfig
from ddpm_lmk.engine.training_state import Ema
from ddpm_lmk.errors import CheckpointError


def scalar_model(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def follow(model: nn.Module, cfg: EmaConfig, values: list[float]) -> float:
    ema = Ema(cfg, model)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        ema.update(step)
    return ema.weights()["weight"].item()


def test_the_average_is_the_weighted_sum_of_all_weights_since_the_start() -> None:
    found = follow(scalar_model(1.0), EmaConfig(decay=0.9), [2.0, 3.0])
    assert found == pytest.approx(0.81 * 1.0 + 0.09 * 2.0 + 0.1 * 3.0)


def test_warm_up_follows_the_weights_early_on() -> None:
    found = follow(scalar_model(0.0), EmaConfig(decay=0.999, warmup=True), [1.0])
    assert found == pytest.approx(1 - 2 / 11)


def test_the_average_is_in_the_model_inside_the_block_only() -> None:
    model = scalar_model(1.0)
    ema = Ema(EmaConfig(decay=0.5), model)
    nn.init.constant_(model.weight, 3.0)
    ema.update(1)
    weight = model.weight
    with ema.applied() as inside:
        assert inside is model
        assert model.weight is weight
        assert weight.item() == 2.0
    assert weight.item() == 3.0
    assert ema.weights()["weight"].item() == 2.0


def test_buffers_are_those_of_the_model() -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("ballast", torch.zeros(2))
    ema = Ema(EmaConfig(), model)
    model.ballast.fill_(5.0)
    assert ema.weights()["ballast"].tolist() == [5.0, 5.0]


def test_without_settings_it_holds_and_does_nothing() -> None:
    model = scalar_model(1.0)
    ema = Ema(None, model)
    ema.update(1)
    assert not ema
    assert ema.weights() == {}
    with ema.applied() as inside:
        assert inside is model
    assert ema.warning(1) is None


def test_a_decay_too_long_for_the_run_is_worth_a_warning() -> None:
    model = scalar_model(1.0)
    assert "leaves 61% of the starting weights" in (Ema(EmaConfig(decay=0.995), model).warning(100) or "")
    assert Ema(EmaConfig(decay=0.995), model).warning(1000) is None
    assert Ema(EmaConfig(decay=0.995, warmup=True), model).warning(100) is None


def test_an_average_of_another_shape_is_refused() -> None:
    ema = Ema(EmaConfig(), scalar_model(1.0))
    with pytest.raises(CheckpointError, match=r"wanted \[1, 1\]"):
        ema.load({"weight": torch.zeros(2)})
    assert torch.equal(ema.weights()["weight"], torch.ones(1, 1))
