"""The network on the device: against float64 on the processor, in both precisions, and in its memory layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import OptimConfig, RunConfig, UNetConfig
from ddpm_lmk.engine.loop import build_updater
from ddpm_lmk.engine.optim import build_optimizer
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import compile_model
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.models import build_model
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import choose_norm, group_norm
from tests.models.norm_cases import CASES, Case

CONFIG = UNetConfig(width=32, multipliers=(1, 2, 4), heads=4, head_dim=32)
SHALLOW = UNetConfig(width=32, multipliers=(1, 2), heads=4, head_dim=32)  # compiles in half the time
SGD = {"kind": "sgd", "lr": 1e-3}


def network(device: torch.device, config: UNetConfig = CONFIG) -> nn.Module:
    """The network as a run has it."""
    torch.manual_seed(0)
    model = build_model(config, out_channels=1).to(device, memory_format=torch.channels_last)
    use_norm(model, choose_norm("auto", device, is_compiled=False))
    return model


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(4, 1, 64, 64, generator=draw).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.tensor([1, 20, 300, 499], device=device)


def loss_and_gradient(model: nn.Module, x: Tensor, t: Tensor, precision: torch.dtype | None) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype=precision, enabled=precision is not None):
        out = model(x, t)
    loss = F.mse_loss(out.to(x.dtype), x)
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_norm_of_this_device_is_the_norm_of_float64(case: Case, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    batch, channels = case.shape[:2]
    x = (torch.randn(case.shape, generator=draw) + case.mean).to(case.dtype)
    weight, bias = torch.randn(2, channels, generator=draw)
    film = torch.randn(batch, 2 * channels, generator=draw) if case.film else None
    towards = torch.randn(case.shape, generator=draw).to(case.dtype)
    use = choose_norm("fused", device, is_compiled=False).name
    assert use == ("triton" if device.type == "cuda" else "folded"), "install triton beside torch"
    results = []
    for place, how, dtype in ((device, use, None), (torch.device("cpu"), "folded", torch.float64)):
        values = [x, weight, bias, *([film] if film is not None else [])]
        leaves = [value.to(place, dtype or value.dtype).requires_grad_() for value in values]
        modulation = leaves[3] if film is not None else None
        out = group_norm(*leaves[:3], groups=case.groups, eps=1e-5, film=modulation, silu=case.silu, use=how)
        grads = torch.autograd.grad(out, leaves, towards.to(place, out.dtype))
        results.append([value.detach().double().cpu() for value in (out, *grads)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= case.limit(use) * wanted.norm()


def test_every_map_stays_channels_last(device: torch.device) -> None:
    model, broken = network(device), []

    def look(name: str, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            broken.append(f"{name} {tuple(out.shape)} {out.stride()}")

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        model(*inputs(device))
    assert broken == []


def test_fp32_here_is_float64_on_the_processor(device: torch.device) -> None:
    model = network(device)
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    use_norm(exact, choose_norm("native", torch.device("cpu"), is_compiled=False))
    here, there = model(*inputs(device)), exact(*inputs(torch.device("cpu"), torch.float64))
    limit = 3e-3 if device.type == "cuda" else 1e-5  # cuDNN convolves in TF32 unless told otherwise
    assert (here.double().cpu() - there).norm() < limit * there.norm()


def test_bf16_has_the_loss_and_the_direction_of_fp32(device: torch.device) -> None:
    model, (x, t) = network(device), inputs(device)
    loss, gradient = loss_and_gradient(model, x, t, None)
    half_loss, half_gradient = loss_and_gradient(model, x, t, torch.bfloat16)
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert F.cosine_similarity(gradient, half_gradient, dim=0) > 0.99


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_here_are_those_of_float64_on_the_processor(kind: str, device: torch.device) -> None:
    moved = []
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        draw, model = torch.Generator().manual_seed(1), network(torch.device("cpu")).to(place, dtype)
        before = weights_of(model)
        optimizer = build_optimizer(OptimConfig.model_validate({"kind": kind, "lr": 1e-3}), model)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)
            optimizer.step()
        moved.append(weights_of(model) - before)
    here, there = moved
    assert (here - there).norm() < 1e-4 * there.norm()


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager(device: torch.device) -> None:
    model, (x, t) = network(device, SHALLOW), inputs(device)
    use_norm(model, choose_norm("native", device, is_compiled=True))
    _, eager = loss_and_gradient(model, x, t, torch.bfloat16)
    model.compile()
    _, compiled = loss_and_gradient(model, x, t, torch.bfloat16)
    assert F.cosine_similarity(eager, compiled, dim=0) > 0.99
    assert compiled.norm() == pytest.approx(eager.norm().item(), rel=0.05)


@pytest.mark.slow
def test_steps_of_cuda_graphs_are_those_of_eager(device: torch.device) -> None:
    """Through the engine's own parts, with the average in the place of the weights once in between."""

    def weights(**train: Any) -> Tensor:
        settings = {"global_batch_size": 4, "precision": "fp32", "group_norm": "native", **train}
        cfg = RunConfig(data={"path": "."}, model=SHALLOW, task={"kind": "denoise"}, optim=SGD, train=settings)
        state = TrainState.fresh(cfg, network(device, SHALLOW))
        compile_model(state.model, cfg, device)
        updater = build_updater(cfg, state, Parallel("cuda" if device.type == "cuda" else "cpu"))
        x, t = inputs(device)
        for step in range(1, 7):
            with updater.micro_batch(0, of=1):
                updater.add(F.mse_loss(updater.net(x + step / 10, t), x, reduction="sum"), x.numel())
            updater.finish(0.0)
            updater.apply(None)
            updater.clear()
            state.ema.update(step)
            if step == 3:
                with state.ema.applied() as model, torch.no_grad():
                    model.eval()(x, t)
                state.model.train()
        updater.close()
        return weights_of(state.model)

    start = weights_of(network(device, SHALLOW))
    eager, graphs = weights(), weights(compile=True, cuda_graphs=device.type == "cuda")
    assert (graphs - eager).norm() < 0.02 * (eager - start).norm()
