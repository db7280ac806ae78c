"""Learning rate, parameter groups, clipping, the plateau rule, and moments on their way to a file and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_lmk.config import ClipConfig, OptimConfig, PlateauConfig
from ddpm_lmk.engine.optim import (
    build_optimizer,
    clip,
    global_norm,
    gradients,
    learning_rate,
    load_moments,
    moments,
    set_learning_rate,
)
from ddpm_lmk.engine.training_state import Plateau
from ddpm_lmk.errors import CheckpointError
from tests.engine.toy import ToyNet


def settings(**fields: Any) -> OptimConfig:
    return OptimConfig.model_validate(fields)


def test_warm_up_rises_in_equal_parts_and_then_stays() -> None:
    rate = learning_rate(settings(lr=1.0), warmup=4, total=100)
    assert [rate(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 2.0, 2.0), ("linear", 1.0, 0.02), ("cosine", 1.0, 2 * 2.467e-4)]
)
def test_schedules_pass_through_the_middle_and_end_low(schedule: str, middle: float, end: float) -> None:
    rate = learning_rate(settings(lr=2.0, schedule=schedule), warmup=0, total=100)
    assert rate(0) == 2.0
    assert rate(50) == pytest.approx(middle)
    assert rate(99) == pytest.approx(end, rel=1e-3)


def test_the_output_layer_has_its_own_rate_and_norms_may_go_without_decay() -> None:
    model = ToyNet()
    optimizer = build_optimizer(settings(lr=1e-3, head_lr=5e-3, weight_decay=0.1, decay_all=False), model)
    set_learning_rate(optimizer, 1e-4)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["final_conv.weight"] == pytest.approx((5e-4, 0.1))
    assert by_name["final_conv.bias"] == pytest.approx((5e-4, 0.0))
    assert by_name["stem.weight"] == pytest.approx((1e-4, 0.1))
    assert by_name["norm.weight"] == pytest.approx((1e-4, 0.0))


def test_everything_decays_by_default_as_in_the_paper() -> None:
    optimizer = build_optimizer(settings(), ToyNet())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


def test_sgd_is_plain() -> None:
    model = ToyNet()
    optimizer = build_optimizer(settings(kind="sgd", lr=0.5), model)
    before = model.stem.weight.detach().clone()
    model.stem.weight.grad = torch.full_like(before, 2.0)
    optimizer.step()
    torch.testing.assert_close(model.stem.weight.detach(), before - 1.0)
    assert moments(optimizer, model) == {}


def test_clipping_by_norm_scales_all_gradients_alike() -> None:
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(5.0)
    clip(ClipConfig(kind="norm", limit=1.0), grads, norm)
    torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), torch.tensor([0.6, 0.0, 0.8]))
    clip(ClipConfig(kind="norm", limit=7.0), grads, global_norm(grads))
    assert global_norm(grads).item() == pytest.approx(1.0)


def test_clipping_by_value_cuts_each_element() -> None:
    grads = [torch.tensor([3.0, -0.5, -2.0])]
    clip(ClipConfig(kind="value", limit=1.0), grads, global_norm(grads))
    assert grads[0].tolist() == [1.0, -0.5, -1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_tells_of_one_bad_element(bad: float) -> None:
    assert not torch.isfinite(global_norm([torch.ones(3), torch.tensor([0.0, bad])]))


def test_triangular2_is_the_schedule_of_torch() -> None:
    """GU2Net trains with CyclicLR in mode triangular2 (docs/method.md, section 5)."""
    rate = learning_rate(
        settings(lr=1e-2, lr_low=1e-4, schedule="triangular2", cycle=20), warmup=0, total=100, cycle=20
    )
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.CyclicLR(sgd, base_lr=1e-4, max_lr=1e-2, step_size_up=10, mode="triangular2")
    for step in range(100):
        assert rate(step) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        reference.step()


def test_a_cycle_without_its_schedule_is_refused() -> None:
    for wrong in ({"cycle": 20}, {"schedule": "triangular2"}, {"lr_low": 1e-5}):
        with pytest.raises(ValueError, match="triangular2"):
            settings(**wrong)


def test_adam_decays_through_the_gradient() -> None:
    """The other half of the difference to AdamW: decay goes through the moments (GU2Net: Adam, weight decay 1e-4)."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    pairs = [
        (ours, build_optimizer(settings(kind="adam", lr=0.1, weight_decay=0.3), ours)),
        (theirs, torch.optim.Adam(theirs.parameters(), lr=0.1, weight_decay=0.3)),
    ]
    for _ in range(3):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_plateau_agrees_with_the_scheduler_of_torch() -> None:
    model = nn.Linear(1, 1)
    reference_optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cfg = PlateauConfig(factor=0.5, patience=2, threshold=1e-2)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference_optimizer, factor=0.5, patience=2, threshold=1e-2, threshold_mode="rel"
    )
    plateau = Plateau(cfg)
    for score in [5.0, 4.99, 4.98, 4.97, 4.96, 3.0, 3.1, 3.0, 2.99, 3.2, 3.2, 3.2, 3.2, 1.0, math.nan, 1.0, 1.0]:
        plateau.add_score(score)
        reference.step(score)
        assert plateau.factor == reference_optimizer.param_groups[0]["lr"]


def test_plateau_without_settings_does_nothing() -> None:
    plateau = Plateau(None)
    for _ in range(100):
        plateau.add_score(1.0)
    assert plateau.factor == 1.0


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ToyNet().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(settings(lr=0.1), model)
    for _ in range(2):
        model(torch.rand(2, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_moments_come_back_bit_by_bit_in_the_layout_of_the_parameters() -> None:
    model, optimizer = stepped()
    saved = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in moments(optimizer, model).items()
    }
    assert "exp_avg/stem.weight" in saved
    assert not any("unreached" in name for name in saved), "what has no gradient has no moments"
    other = build_optimizer(settings(lr=0.1), model)
    load_moments(other, model, saved)
    again = moments(other, model)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    strides = {name: p.stride() for name, p in model.named_parameters()}
    assert again["exp_avg/stem.weight"].stride() == strides["stem.weight"]


def test_foreign_moments_are_refused() -> None:
    model, optimizer = stepped()
    with pytest.raises(CheckpointError, match=r"exp_avg/stem\.weight \[3\]"):
        load_moments(optimizer, model, {"exp_avg/stem.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="nowhere"):
        load_moments(optimizer, model, {"exp_avg/nowhere": torch.zeros(3)})


def test_gradients_are_those_of_the_parameters_that_took_part() -> None:
    model = ToyNet()
    model(torch.rand(1, 1, 8, 8)).mean().backward()
    assert len(gradients(model)) == len(list(model.parameters())) - 2
