"""Running statistics: what a forward pass leaves in a model, in steps that count and in those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_lmk.config import EmaConfig
from ddpm_lmk.engine.loop import fit
from ddpm_lmk.engine.parallel import Parallel, RunningStatistics, is_running
from ddpm_lmk.engine.training_state import Ema, TrainState
from tests.engine.toy import ToyNet, ToyTask, config, start


class NormNet(ToyNet):
    """The toy with BatchNorm in the place of GroupNorm."""

    def __init__(self, ballast: int = 0) -> None:
        super().__init__(ballast)
        self.norm = nn.BatchNorm2d(6)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def running(model: nn.Module) -> list[Tensor]:
    return [model.norm.running_mean.clone(), model.norm.running_var.clone()]  # type: ignore[union-attr]


def test_a_step_left_out_leaves_no_trace(parallel: Parallel) -> None:
    model = NormNet()
    statistics = RunningStatistics(model, parallel)
    statistics.begin_step()
    before = running(model)
    model(torch.full((2, 1, 8, 8), torch.nan))
    assert all(value.isnan().all() for value in running(model))
    statistics.end_step(is_kept=False)
    assert all(map(torch.equal, running(model), before))


def test_a_step_that_counts_keeps_what_it_saw(parallel: Parallel) -> None:
    model = NormNet()
    statistics = RunningStatistics(model, parallel)
    statistics.begin_step()
    images = torch.rand(4, 1, 8, 8)
    model(images)
    statistics.end_step(is_kept=True)
    wanted = 0.1 * model.stem(images).mean((0, 2, 3))
    torch.testing.assert_close(model.norm.running_mean, wanted)


def test_those_of_a_frozen_part_are_not_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times 0.1 is not 0.3: a mean over three ranks would change what every rank has."""
    three = Parallel("cpu")
    monkeypatch.setattr(three, "world", 3)
    monkeypatch.setattr(three, "mean", lambda values: (values + values + values) / 3)
    model = nn.ModuleDict({"frozen": nn.BatchNorm2d(1000), "free": nn.BatchNorm2d(1000)})
    torch.manual_seed(0)
    before = {}
    for name, norm in model.items():
        norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        before[name] = norm.running_mean.clone()  # type: ignore[union-attr,operator]
    model["frozen"].eval()
    statistics = RunningStatistics(model, three)
    statistics.begin_step()
    statistics.end_step(is_kept=True)
    assert torch.equal(model["frozen"].running_mean, before["frozen"])  # type: ignore[arg-type]
    assert not torch.equal(model["free"].running_mean, before["free"])  # type: ignore[arg-type]


def test_the_average_has_statistics_of_its_own() -> None:
    model = NormNet()
    ema = Ema(EmaConfig(decay=0.5), model)
    with torch.no_grad():
        model.norm.running_mean.fill_(1.0)  # type: ignore[union-attr]
    ema.update(1)
    assert torch.equal(ema.weights()["norm.running_mean"], torch.full((6,), 0.5))
    with ema.applied():
        assert model.norm.running_mean.eq(0.5).all()  # type: ignore[union-attr]
    assert model.norm.running_mean.eq(1.0).all()  # type: ignore[union-attr]


def test_a_run_saves_them_and_an_update_left_out_does_not_reach_them(tmp_path: Path, parallel: Parallel) -> None:
    """The second of two groups has a loss that is not a number: statistics are those after the first."""
    found = []
    for length, bad in ((1, ()), (2, (5,))):
        cfg = config(train={"duration": length, "ema": None}, runtime={"checkpoint_every": 1})
        _, loaders, run = start(cfg, tmp_path / str(length), parallel)
        torch.manual_seed(0)
        state = TrainState.fresh(cfg, NormNet())
        with run:
            fit(cfg, ToyTask(cfg.seed, frozenset(bad)), state, loaders, parallel, run)
        assert state.divergence.skipped == len(bad)
        found.append(state.weights()["model"])
    for name, value in found[0].items():
        if is_running(name):
            assert value.abs().sum() > 0
            assert torch.equal(found[1][name], value), name
