"""Learning rate, parameter groups, clipping, the plateau rule, and moments on their way to a file and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm_lmk.config import ClipConfig, OptimConfig, PlateauConfig
from ddpm_lmk.engine.optim import (
    build_optimizer,
    clip,
    global_norm,
    gradients,
    learning_rate,
    load_moments,
    moments,
    orthogonalised,
    set_learning_rate,
)
from ddpm_lmk.engine.rank_checks import kernels
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


def textbook(matrix: Tensor) -> Tensor:
    """Newton-Schulz as Jordan et al. write it, in double precision."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


@pytest.mark.parametrize("shape", [(3, 12, 90), (2, 40, 9), (1, 16, 16)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None, None]
    for found, matrix in zip(orthogonalised(matrices), matrices, strict=True):
        torch.testing.assert_close(found, textbook(matrix), rtol=0, atol=1e-4)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        turned = left.T @ found @ right.T  # of a polynomial of the matrix: diagonal, in the same order of vectors
        large = values > 0.02 * matrix.norm()
        assert large.sum() >= 0.8 * len(values)
        assert ((turned.diagonal() > 0.65) & (turned.diagonal() < 1.2))[large].all()
        torch.testing.assert_close(turned - turned.diagonal().diag(), torch.zeros_like(turned), rtol=0, atol=1e-4)


def test_a_matrix_without_rank_stays_without() -> None:
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    row = torch.zeros(1, 3, 4)
    row[0, 1] = 2.0
    assert orthogonalised(row)[0, 1].norm().item() == pytest.approx(0.9, abs=0.3)
    assert orthogonalised(row)[0, [0, 2]].abs().max() == 0


def test_singular_values_come_out_as_its_polynomial_says() -> None:
    values = torch.linspace(0, 1, 20001)
    found = orthogonalised(torch.stack([values, (1 - values**2).sqrt()], 1).diag_embed())[:, 0, 0]
    assert 0.68 < found[values >= 0.003].min() < 0.69
    assert 1.20 < found.max() < 1.21
    assert (found <= values * 3.4445**5 * 1.001 + 1e-6).all()


class Tf32(TorchFunctionMode):
    """Matrix products as GPUs do them in TF32: what goes in has ten bits of mantissa."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__matmul__, Tensor.matmul, torch.baddbmm) and not is_full():
            first = 1 if function is torch.baddbmm else 0
            args = (*args[:first], *(rounded(value) for value in args[first:]))
        return function(*args, **(kwargs or {}))


def is_full() -> bool:
    return not torch.backends.cuda.matmul.allow_tf32


def rounded(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_muon_multiplies_in_full_where_tf32_is_allowed() -> None:
    """With TF32 values would leave the range that is documented."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 64))[0] for size in (64, 576))
    gradient = (left * torch.logspace(0, -2, 64)) @ right.T

    def largest(update: Tensor) -> float:
        return torch.linalg.matrix_norm(update, 2).item()

    layer = nn.Linear(576, 64)
    before = layer.weight.detach().clone()
    layer.weight.grad = gradient
    with kernels("none", torch.device("cpu")), Tf32():
        assert largest(orthogonalised(gradient[None])[0]) > 1.25
        build_optimizer(settings(kind="muon", lr=1.0, weight_decay=0.0), layer).step()
        assert not is_full(), "others still may"
    assert largest((layer.weight.detach() - before) / (0.2 * 576**0.5)) < 1.21


def test_muon_is_the_one_of_torch_for_matrices_and_adamw_for_the_rest() -> None:
    """Torch's works in bf16, and takes kernels only when they are matrices already."""
    torch.manual_seed(0)
    cfg = settings(kind="muon", lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    layers = {"init_conv": (4, 6, 1), "middle": (6, 10, 3), "wide": (10, 5, 1), "final_conv": (5, 2, 1)}
    ours = nn.ModuleDict({name: nn.Conv2d(*shape, padding="same") for name, shape in layers.items()})
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    hidden = [f"{name}.weight" for name in ("middle", "wide")]
    rest = [value for name, value in theirs.items() if name not in hidden]
    flat = {name: nn.Parameter(theirs[name].detach().flatten(1)) for name in hidden}
    references = [
        torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    optimizer = build_optimizer(cfg, ours)
    for _ in range(4):
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone()
            if name in flat:
                flat[name].grad = parameter.grad.flatten(1)
        for one in (optimizer, *references):
            one.step()
    for name, parameter in ours.named_parameters():
        if name not in hidden:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)
            continue
        moved, wanted = (value.detach().flatten(1) - start[name].flatten(1) for value in (parameter, flat[name]))
        assert (moved - wanted).norm() < 0.02 * wanted.norm()
    assert {key.split("/")[0] for key in moments(optimizer, ours) if "middle.weight" in key} == {"momentum"}


def test_muon_has_the_rates_of_its_groups_and_frozen_weights_stay() -> None:
    model = ToyNet()
    optimizer = build_optimizer(settings(kind="muon", lr=1e-3, head_lr=5e-3, decay_all=False), model)
    set_learning_rate(optimizer, 1e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters() if name.endswith("weight")} == pytest.approx(
        {"stem.weight": 1e-4, "norm.weight": 1e-4, "unreached.weight": 1e-4, "final_conv.weight": 5e-4}
    )
    before = model.final_conv.weight.detach().clone()
    model.final_conv.weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.final_conv.weight.detach(), before - 5e-4 - 5e-4 * 0.01 * before)
    frozen = build_optimizer(settings(kind="muon", freeze="trunk"), model)
    assert [len(group["params"]) for group in frozen.param_groups] == [2]


def stepped(kind: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ToyNet().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(settings(kind=kind, lr=0.1), model)
    for _ in range(2):
        model(torch.rand(2, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize(("kind", "key"), [("adamw", "exp_avg"), ("muon", "momentum")])
def test_moments_come_back_bit_by_bit_in_the_layout_of_the_parameters(kind: str, key: str) -> None:
    model, optimizer = stepped(kind)
    saved = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in moments(optimizer, model).items()
    }
    assert f"{key}/stem.weight" in saved
    assert not any("unreached" in name for name in saved), "what has no gradient has no moments"
    other = build_optimizer(settings(kind=kind, lr=0.1), model)
    load_moments(other, model, saved)
    again = moments(other, model)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    strides = {name: p.stride() for name, p in model.named_parameters()}
    assert again[f"{key}/stem.weight"].stride() == strides["stem.weight"]


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
