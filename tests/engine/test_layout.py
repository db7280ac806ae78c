"""The first micro-batch tells whether channels-last is kept, and which module loses it first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.engine.compile import KEPT, Layout, LayoutWatch
from ddpm_lmk.engine.loop import fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.models import build_model
from ddpm_lmk.rundir.log import read_lines
from tests.engine.toy import ToyTask, config, start, train

NETWORK: dict[str, Any] = {
    "width": 8,
    "multipliers": (1, 2),
    "heads": 2,
    "head_dim": 4,
    "groups": 4,
    "pixel_unshuffle": 2,
}


class ToNchw(nn.Module):
    """Gives what it is given, in the other layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.contiguous_format)


class GradientToNchw(nn.Module):
    """Keeps the layout of the map, and loses that of the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return _Lose.apply(x)


class _Lose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.contiguous_format)


def network(*between: nn.Module) -> nn.Module:
    """Two convolutions, with something between them."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), *between, nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1))
    return layers.to(memory_format=torch.channels_last)


def watched(model: nn.Module, *inputs: Tensor, passes: int = 1) -> list[Layout]:
    seen: list[Layout] = []
    with LayoutWatch(model, seen.append):
        for _ in range(passes):
            out = model(*inputs)
            (out * torch.rand_like(out)).sum().backward()
    return seen


def image(channels: int = 3, side: int = 8) -> Tensor:
    return torch.rand(2, channels, side, side).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_our_network_keeps_it_forward_and_backward(checkpointing: bool, dtype: torch.dtype | None) -> None:
    model = build_model(UNetConfig(**NETWORK, checkpointing=checkpointing), out_channels=2)
    model = model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        seen = watched(model, image(1, 16), torch.tensor([3, 7]))
    assert [str(layout) for layout in seen] == [KEPT]


def test_the_first_module_that_loses_it_is_named() -> None:
    [seen] = watched(network(ToNchw(), nn.Identity()), image())
    assert seen.maps[:2] == ["1", "2"]
    assert str(seen).startswith("lost in what 1 gives and ")
    [seen] = watched(network(GradientToNchw()), image())
    assert (seen.maps, seen.gradients) == ([], ["0"])
    assert str(seen) == "lost in the gradient of what 0 gives"


def test_a_part_of_the_channels_is_in_order() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2]

    model = nn.Sequential(Part(), nn.Conv2d(2, 2, 1)).to(memory_format=torch.channels_last)
    assert str(watched(model, image(), passes=3)[0]) == KEPT


def test_it_is_told_once_and_nothing_stays_in_the_network() -> None:
    model = network(ToNchw())
    assert len(watched(model, image(), passes=3)) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_passes_of_a_validation_do_not_count() -> None:
    model, seen = network(ToNchw()), []
    with LayoutWatch(model, seen.append), torch.no_grad():
        model.eval()(image())
        model.train()(image())
    assert seen == []


def test_a_run_records_it_and_warns(tmp_path: Path, parallel: Parallel, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(train={"duration": 3})
    state, loaders, run = start(cfg, tmp_path / "run", parallel)
    state.model.stem = nn.Sequential(state.model.stem, ToNchw())
    with run:
        fit(cfg, ToyTask(cfg.seed), state, loaders, parallel, run)
    lost = "lost in what stem.1 gives and "
    assert run.facts()["channels_last"].startswith(lost)
    warned = [line["message"] for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "warning"]
    assert sum(message.startswith(f"channels-last is {lost}") for message in warned) == 1
    assert f"channels-last is {lost}" in caplog.text


@pytest.mark.parametrize(("settings", "said"), [({}, KEPT), ({"channels_last": False}, None)])
def test_it_is_looked_at_where_it_is_asked_for(
    tmp_path: Path, parallel: Parallel, settings: dict[str, Any], said: str | None
) -> None:
    train(config(train={"duration": 1, **settings}), tmp_path / "run", parallel)
    assert json.loads((tmp_path / "run" / "run.json").read_text()).get("channels_last") == said
