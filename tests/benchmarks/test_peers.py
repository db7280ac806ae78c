"""Networks that benchmarks compare: the plain one is the released one, operations are the paper's, steps learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _peer_networks import PEERS, Counts, Shape, build, count, matched
from _peer_process import Contender, Process, run_together
from _peer_worker import Spec, make_step
from _released import ReleasedUNet

from ddpm_lmk.bench import Budget
from ddpm_lmk.bench.budget import OutOfTime
from ddpm_lmk.config import UNetConfig
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.weights import from_upstream
from tests.reference.released_unet import ReleasedUNet as Reference
from tests.reference.released_unet import random_state, released_shapes

WIDTH, MULTIPLIERS = 8, (1, 2)
SMALL = Shape((8, 16), 16, 2)


def plain(*, checkpointing: bool) -> ReleasedUNet:
    model = ReleasedUNet(WIDTH, MULTIPLIERS, checkpointing=checkpointing)
    state = random_state(released_shapes(WIDTH, MULTIPLIERS), dtype=torch.float32)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_network_is_the_released_one(checkpointing: bool) -> None:
    model = plain(checkpointing=checkpointing)
    state = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    x, t = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 420])
    wanted = Reference(state, levels=len(MULTIPLIERS))(x, t)
    found = model(x, t)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
    wanted.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        distance = (parameter.grad - state[name].grad).norm()
        assert distance < 1e-3 * state[name].grad.norm() + 1e-5, f"{name}: {distance}"


def test_the_plain_network_and_ours_compute_the_same() -> None:
    model = plain(checkpointing=False)
    ours = build_model(UNetConfig(width=WIDTH, multipliers=MULTIPLIERS), out_channels=1)
    ours.load_state_dict(from_upstream(model.state_dict()))
    x, t = torch.rand(2, 1, 16, 16), torch.tensor([1, 499])
    torch.testing.assert_close(ours(x, t), model(x, t), rtol=1e-4, atol=1e-5)


def test_operations_are_counted_for_the_function_as_published_and_as_run() -> None:
    cost = model_cost(UNetConfig(width=WIDTH, multipliers=MULTIPLIERS), 16, 1)
    released, ours = count("released", SMALL), count("ours", SMALL)
    assert released.forward_flops == pytest.approx(2 * cost.flops_forward, rel=0.01)  # two images, one more input
    assert ours.forward_flops == pytest.approx(2 * cost.flops_executed, rel=0.01)
    assert ours.params == cost.params
    assert count("released, checkpointing", SMALL).train_flops > 1.15 * released.train_flops
    assert released.train_flops == pytest.approx(3 * released.forward_flops, rel=0.02)


@pytest.mark.parametrize("way", ["plain", "ours", "released"])
def test_every_way_of_a_step_learns_and_only_the_released_one_writes(way: str, tmp_path: Path) -> None:
    network = "ours" if way == "ours" else "released, checkpointing"
    spec = Spec(network, SMALL, "nchw", "fp32", "cpu", 1, way, micro_batches=2, save=True)
    losses: list[float] = []
    step = make_step(spec, torch.device("cpu"), tmp_path, note=losses.append)
    for _ in range(10):
        step()
    assert losses[-1] < 0.8 * losses[0]
    assert {file.name for file in tmp_path.iterdir()} == (
        {"last_model.pt", "last_ema_model.pt"} if way == "released" else set()
    )


def contender(network: str) -> Contender:
    spec = Spec(network, SMALL, "channels-last", "fp32", "cpu", 1)
    return Contender(network, spec, Counts(1, 1, 3), 1)


def test_a_process_tells_time_and_memory_of_its_steps_and_dies_with_its_words() -> None:
    with Process(contender("ours").spec) as process:
        process.ready()
        found = [process.step() for _ in range(2)]
        assert all(each["cpu_s"] > 0 and each["wall_s"] > 0 and each["peak_mib"] > 0 for each in found)
        assert found[0]["device_s"] is None
    with (
        pytest.raises(ChildProcessError, match="KeyError: 'nobody'"),
        Process(contender("nobody").spec) as process,
    ):
        process.ready()


def test_rounds_end_with_the_budget_and_of_one_that_is_cut_off_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes are played here: each step takes 10 s of the budget's clock, of which 104 s are for measuring."""
    now = [0.0]

    def step(spec: Spec) -> dict[str, Any]:
        now[0] += 10
        if spec.network == "second" and now[0] > cut_after_s:
            raise OutOfTime
        return {"wall_s": 10.0, "cpu_s": 10.0, "device_s": None, "peak_mib": 1.0}

    monkeypatch.setattr(Process, "__enter__", lambda process: process)
    monkeypatch.setattr(Process, "__exit__", lambda *_: None)
    monkeypatch.setattr(Process, "__init__", lambda process, spec: setattr(process, "spec", spec))
    monkeypatch.setattr(Process, "ready", lambda process: None)
    monkeypatch.setattr(Process, "step", lambda process: step(process.spec))
    for cut_after_s, left_out in ((1000, "3 of 6 rounds"), (75, "group, cut off after 104 s")):
        now[0], both = 0.0, [contender("first"), contender("second")]
        budget = Budget(115, clock=lambda: now[0])
        budget.run("group", lambda: run_together(both, warm_up=2, rounds=6, budget=budget))  # noqa: B023
        assert budget.left_out == [left_out]
        assert [len(each.peak_mib) for each in both] == [len(each.timings.wall_s) for each in both]
        assert {len(each.peak_mib) for each in both} == {3 if cut_after_s == 1000 else 2}


@pytest.mark.slow
def test_one_that_fails_does_not_end_the_others() -> None:
    both = [contender("ours"), contender("nobody")]
    run_together(both, warm_up=1, rounds=6, budget=Budget(math.inf))
    assert len(both[0].timings.cpu_s) == len(both[0].peak_mib) == 6
    assert both[0].failure == ""
    assert "KeyError" in both[1].failure


@pytest.mark.slow
@pytest.mark.extra("bench")
@pytest.mark.parametrize("peer", PEERS)
def test_matched_networks_are_near_ours_in_parameters_and_operations(peer: str) -> None:
    shape = Shape((32, 64, 128), 64, 1)
    target = count("released", shape, backward=False)
    found = count(peer, matched(peer, shape, target), backward=False)
    assert found.params == pytest.approx(target.params, rel=0.15)
    assert found.forward_flops == pytest.approx(target.forward_flops, rel=0.15)
    _, call = build(peer, Shape((32, 64), 16, 2))
    assert call(torch.rand(2, 1, 16, 16), torch.tensor([1, 2])).shape == (2, 1, 16, 16)
