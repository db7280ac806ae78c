"""What stays on the table between runs leaves no trace in their results."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config import InitConfig, RunConfig
from ddpm_lmk.engine.gradients import Updater
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights

NETWORK = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def config(packed: Path, kind: str, **sections: Any) -> RunConfig:
    data: dict[str, Any] = {"path": str(packed), "image_size": 32}
    data |= {"shots": 2} if kind == "landmarks" else {}
    train = {"duration": 2, "global_batch_size": 4, "ema": None}
    fields = {"data": data, "model": NETWORK, "task": {"kind": kind}, "train": train, "runtime": {"workers": 0}}
    return RunConfig.model_validate(fields | {"evaluate": {"batch": 4}} | sections)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, packed_phantoms: Path, parallel: Parallel) -> Path:
    out = tmp_path_factory.mktemp("session") / "parent"
    execute(config(packed_phantoms, "denoise"), out, parallel=parallel)
    return out


def test_cells_of_other_networks_and_frozen_ones_do_not_change_the_next(
    tmp_path: Path, packed_phantoms: Path, parent: Path, parallel: Parallel
) -> None:
    session = Session()
    init = {"weights": str(parent), "use": "model"}
    plain = config(packed_phantoms, "landmarks", init=init)
    frozen = config(packed_phantoms, "landmarks", init=init, optim={"freeze": "trunk", "lr": 1e-2})
    wide = config(packed_phantoms, "landmarks", model=NETWORK | {"width": 16})
    for name, cfg in {"frozen": frozen, "wide": wide, "warm": plain}.items():
        execute(cfg, tmp_path / name, parallel=parallel, session=session)
    execute(plain, tmp_path / "cold", parallel=parallel)
    found = {name: load_weights(tmp_path / name, "model")[0] for name in ("frozen", "warm", "cold")}
    start = load_weights(parent, "model")[0]
    for name, value in found["cold"].items():
        assert torch.equal(found["warm"][name], value), name
    trunk = [name for name in start if not name.startswith("final_conv")]
    assert all(torch.equal(found["frozen"][name], start[name]) for name in trunk)
    assert not all(torch.equal(found["cold"][name], start[name]) for name in trunk)
    scores = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("warm", "cold", "frozen")]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


def test_a_cell_that_breaks_off_within_a_step_does_not_change_the_next(
    tmp_path: Path, packed_phantoms: Path, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, session, sound = config(packed_phantoms, "denoise"), Session(), Updater.add

    def failing(self: Updater, *values: Any) -> None:
        sound(self, *values)
        raise RuntimeError("after the backward pass")

    monkeypatch.setattr(Updater, "add", failing)
    with pytest.raises(RuntimeError, match="after the backward pass"):
        execute(cfg, tmp_path / "broken", parallel=parallel, session=session)
    monkeypatch.undo()
    execute(cfg, tmp_path / "warm", parallel=parallel, session=session)
    execute(cfg, tmp_path / "cold", parallel=parallel)
    warm, cold = (load_weights(tmp_path / name, "model")[0] for name in ("warm", "cold"))
    assert all(torch.equal(warm[name], value) for name, value in cold.items())


def test_a_frozen_trunk_leaves_the_output_layer_to_learn(packed_phantoms: Path, parallel: Parallel) -> None:
    from ddpm_lmk.data import open_loader
    from ddpm_lmk.engine.optim import build_optimizer
    from ddpm_lmk.tasks import build_task

    cfg = config(packed_phantoms, "landmarks", optim={"freeze": "trunk"})
    task = build_task(cfg, open_loader(cfg, stage="train").spec)
    model = Session().model(cfg, task, torch.device("cpu"))
    members = {id(p) for group in build_optimizer(cfg.optim, model).param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in members} == {
        "final_conv.weight",
        "final_conv.bias",
    }
    assert all(p.requires_grad is (id(p) in members) for p in model.parameters())


def test_weights_are_read_once_and_again_when_they_were_written_anew(
    tmp_path: Path, packed_phantoms: Path, parent: Path, parallel: Parallel
) -> None:
    run = tmp_path / "run"
    shutil.copytree(parent, run)
    session, init = Session(), InitConfig(weights=str(run), use="model")
    first = session.weights(init)
    assert session.weights(init) is first
    shutil.rmtree(run)
    execute(config(packed_phantoms, "denoise", seed=5), run, parallel=parallel)
    again = session.weights(init)
    assert any(not torch.equal(value, first[0][name]) for name, value in again[0].items())


def test_old_networks_go_when_there_are_too_many(packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_lmk.data import open_loader
    from ddpm_lmk.tasks import build_task

    session, device = Session(), torch.device("cpu")
    narrow = config(packed_phantoms, "landmarks")
    wide = config(packed_phantoms, "landmarks", model=NETWORK | {"width": 16})
    task = build_task(narrow, open_loader(narrow, stage="train").spec)
    first = session.model(narrow, task, device)
    session.model(wide, task, device)
    assert session.model(narrow, task, device) is first
    monkeypatch.setattr("ddpm_lmk.engine.session.NETWORKS_GIB", 0.0)
    session.model(wide, task, device)
    assert session.model(narrow, task, device) is not first
