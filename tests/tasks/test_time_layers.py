"""Fine-tuning that tells the network no timestep: the layers of time take no part, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.tasks import LandmarkTask, build_task
from tests.conftest import NETWORK


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def tuning(packed: Path, *, timestep: int | None = None) -> RunConfig:
    sections: dict[str, Any] = {
        "data": {"path": str(packed), "image_size": 32, "shots": 2},
        "model": NETWORK,
        "task": {"kind": "landmarks", "timestep": timestep},
        "train": {"duration": 3, "global_batch_size": 4, "precision": "fp32", "exactness": "exact"},
        "runtime": {"workers": 0, "checkpoint_every": 2},
        "optim": {"lr": 1e-2, "weight_decay": 0.5},
        "evaluate": {"split": None},
    }
    sections["train"]["micro_batch"] = 2
    return RunConfig.model_validate(sections)


def is_of_time(name: str) -> bool:
    return name.startswith("time_mlp.") or ".mlp." in name


def weights(run: Path) -> dict[str, Tensor]:
    return {f"{use}/{name}": v for use in ("model", "ema") for name, v in load_weights(run, use)[0].items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_weights_and_average_are_those_of_training_with_them(
    tmp_path: Path, packed_phantoms: Path, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW leaves alone what has no gradient, its decay too, and an average of one value is that value."""
    cfg = tuning(packed_phantoms)
    execute(cfg, tmp_path / "without", parallel=parallel)
    with monkeypatch.context() as patch:
        patch.setattr(LandmarkTask, "wrap", lambda self, model: model)
        execute(cfg, tmp_path / "with", parallel=parallel)
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))


def test_they_are_in_no_optimizer_and_no_average_unless_a_timestep_is_told(packed_phantoms: Path) -> None:
    def fresh(timestep: int | None) -> TrainState:
        cfg = tuning(packed_phantoms, timestep=timestep)
        model = Session().model(cfg, task_of(cfg), torch.device("cpu"))
        return TrainState.fresh(cfg, model)

    for timestep, learns in ((None, False), (3, True)):
        state = fresh(timestep)
        named = dict(state.model.named_parameters())
        members = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
        time = [name for name in named if is_of_time(name)]
        assert len(time) == 4 + 2 * 11  # two linear layers, and one in each residual block
        for name, parameter in named.items():
            assert (id(parameter) in members) is (learns or not is_of_time(name)), name
            assert (name in state.ema._average) is (learns or not is_of_time(name)), name
        assert state.ema.weights().keys() == state.model.state_dict().keys()


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, packed_phantoms: Path, parallel: Parallel) -> None:
    cfg = tuning(packed_phantoms)
    execute(cfg, tmp_path / "whole", parallel=parallel)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for gone in ("done.json", "results.json"):
        (tmp_path / "cut" / gone).unlink()
    shutil.rmtree(tmp_path / "cut" / "snapshots")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000003")
    execute(cfg, tmp_path / "cut", parallel=parallel)
    assert "run.continued" in (tmp_path / "cut" / "events.jsonl").read_text()
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def task_of(cfg: RunConfig) -> LandmarkTask:
    from ddpm_lmk.data import open_loader

    task = build_task(cfg, open_loader(cfg, stage="train").spec)
    assert isinstance(task, LandmarkTask)
    return task
