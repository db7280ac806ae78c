"""Compilation: where its results are kept, its time beside the rates, and what CUDA graphs cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.gradients import StepOutcome
from ddpm_lmk.engine.logger import CompileClock, TrainLogger
from ddpm_lmk.engine.loop import build_updater, fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import COMPILE_CACHE, compile_cache, compile_model
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import ConfigError, LaunchError
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import read_lines
from tests.engine.toy import ToyTask, config, fresh_state, start

GRAPHS = {"compile": True, "cuda_graphs": True}
SEEN = StepOutcome(1.0, 1.0, 0.0, 0.0)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nobody has said where compiled code goes, and what the code under test says is forgotten."""
    monkeypatch.setenv(COMPILE_CACHE, "")
    monkeypatch.delenv(COMPILE_CACHE)
    monkeypatch.setenv("LMK_CACHE", str(tmp_path / "mine"))
    return monkeypatch


def test_compiled_code_is_kept_for_the_user_alone(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = compile_cache()
    assert folder == tmp_path / "mine" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    environment.setenv("LMK_CACHE", str(tmp_path / "other"))
    assert compile_cache() == folder, "chosen once in a process, whose children have it too"


def test_a_folder_that_was_said_is_taken(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv(COMPILE_CACHE, str(tmp_path / "said"))
    assert compile_cache() == tmp_path / "said"


def test_where_nothing_can_be_kept_it_is_told(
    environment: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine").write_text("a file")
    assert "torchinductor" in str(compile_cache())
    assert f"cannot be kept in {tmp_path / 'mine' / 'compiled'}" in caplog.text


def test_compilation_is_timed_told_and_recorded(
    environment: pytest.MonkeyPatch, tmp_path: Path, parallel: Parallel, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(train={"duration": 3, "compile": True})
    state, loaders, run = start(cfg, tmp_path / "run", parallel)
    compile_cache()  # as `compile_model` does, which has no cheap backend
    state.model.compile(backend="eager")
    with run:
        fit(cfg, ToyTask(cfg.seed), state, loaders, parallel, run)
    events = [line for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "model.compiled"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [event["cache"] for event in events] == [str(tmp_path / "mine" / "compiled")], "one graph, compiled once"
    assert facts["compile"]["seconds"] == pytest.approx(events[0]["seconds"], abs=0.02)
    assert f"so far; kept in {tmp_path / 'mine' / 'compiled'}" in capsys.readouterr().err


def test_rates_leave_compilation_out_once(parallel: Parallel, tmp_path: Path) -> None:
    cfg, lines = config(), []
    state, clock = TrainState.fresh(cfg, nn.Linear(1, 1)), CompileClock(cfg, parallel, RunDir(tmp_path, writes=False))
    with TrainLogger(state, parallel, clock, write=lines.append, total=2, every=1) as meter:
        state.step, clock.seconds = 1, 1e6  # more than the step took: nothing is left of it
        meter.step(SEEN, size=4, is_skipped=False, lr=0.1)
        with meter.paused():
            clock.seconds += 1e6  # inside an evaluation, which is no training time anyway
        state.step = 2
        meter.step(SEEN, size=4, is_skipped=False, lr=0.1)
    assert lines[0]["images_per_s"] == pytest.approx(4e9)
    assert lines[1]["images_per_s"] < 4e9


def test_cuda_graphs_are_refused_where_they_cannot_be(parallel: Parallel) -> None:
    with pytest.raises(LaunchError, match=r"train\.cuda_graphs=true, but this run is on cpu; use a GPU"):
        compile_model(nn.Linear(1, 1), config(train=GRAPHS), torch.device("cpu"))
    with pytest.raises(ValidationError, match="set compile=true too"):
        config(train={"cuda_graphs": True, "compile": "auto"})


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_cuda_graphs_add_no_gradients_up(parallel: Parallel, micro_batch: int | None) -> None:
    fits = config(train={**GRAPHS, "micro_batch": micro_batch})
    build_updater(fits, fresh_state(fits), parallel)
    several = config(train={**GRAPHS, "micro_batch": 2})
    with pytest.raises(ConfigError, match="with several micro-batches: a replayed graph writes its gradients over"):
        build_updater(several, fresh_state(several), parallel)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:torch")  # PyTorch's own, of its own
def test_a_compiled_run_learns_what_an_eager_one_does(
    environment: pytest.MonkeyPatch, tmp_path: Path, pretraining: Any, parallel: Parallel
) -> None:
    def losses(name: str, **train: Any) -> list[float]:
        cfg: RunConfig = pretraining(train={"duration": 3, **train}, runtime={"log_every": 1})
        execute(cfg, tmp_path / name, parallel=parallel)
        return [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]

    assert losses("compiled", compile=True) == pytest.approx(losses("eager"), rel=1e-4)
    assert json.loads((tmp_path / "compiled" / "run.json").read_text())["compile"]["seconds"] > 0
    assert list((tmp_path / "mine" / "compiled").rglob("*.so")), "the next run finds it"
