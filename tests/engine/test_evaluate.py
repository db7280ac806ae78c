"""Scores on the way: what they decide, and what happens where one cannot be had (docs/faults.md, C14)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.evaluate import EvaluationError, evaluate
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DataError, StoppedError
from ddpm_lmk.rundir import checkpoint
from tests.engine.toy import FailingTask, ToyTask, ToyValidation, config, everything, train


def failures(path: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (path / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "validation.failed"]


def scored(**settings: Any) -> RunConfig:
    """Eight steps with an evaluation every second one."""
    return config(data={"validation_split": "val"}, train={"evaluate_every": 2, **settings})


def test_a_validation_that_fails_is_an_event_and_training_goes_on_to_the_same_weights(
    tmp_path: Path, parallel: Parallel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = train(scored(), tmp_path / "plain", parallel)
    errors = {0: DataError("shard 3: a sample cannot be read"), 1: ValueError("of Jane Doe"), 3: MemoryError()}
    state, lines = train(scored(), tmp_path / "run", parallel, task=FailingTask(0, errors))
    assert [line["step"] for line in lines if "validation" in line] == [6]
    found = [(line["step"], line["error"], line["in_a_row"]) for line in failures(tmp_path / "run")]
    assert found == [(2, "DataError", 1), (4, "EvaluationError", 2), (8, "EvaluationError", 1)]
    assert failures(tmp_path / "run")[0]["reason"] == "shard 3: a sample cannot be read"
    assert failures(tmp_path / "run")[1]["reason"] == "ValueError on rank 0, see its traceback above"
    assert "Jane Doe" not in (tmp_path / "run" / "events.jsonl").read_text()
    assert "ValueError: of Jane Doe" in capfd.readouterr().err, "the traceback is for who looks at the terminal"
    assert "validation at step 2 failed" in caplog.text
    assert state.model.training
    wanted = everything(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in everything(state).items())


def test_a_strict_run_ends_with_the_error_of_the_validation(tmp_path: Path, parallel: Parallel) -> None:
    with pytest.raises(DataError, match="unreadable"):
        train(scored(), tmp_path / "ours", parallel, task=FailingTask(0, {1: DataError("unreadable")}), is_strict=True)
    with pytest.raises(EvaluationError, match="KeyError on rank 0"):
        train(scored(), tmp_path / "bug", parallel, task=FailingTask(0, {1: KeyError("x")}), is_strict=True)
    assert failures(tmp_path / "ours") == []


def test_rules_do_not_see_a_validation_that_failed(tmp_path: Path, parallel: Parallel) -> None:
    """Nothing moves, so every evaluation after the first is a bad one: the failed one is not counted."""
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 1e-12, "plateau": {"patience": 1, "factor": 0.1}},
        train={"duration": 50, "evaluate_every": 2, "patience": 3, "select": "best", "ema": None},
    )
    task = FailingTask(0, {0: DataError("first"), 2: DataError("third")})
    state, lines = train(cfg, tmp_path / "run", parallel, task=task)
    assert [line["step"] for line in lines if "validation" in line] == [4, 8, 10, 12]
    assert (state.step, state.patience.best_step, state.patience.num_bad) == (12, 4, 3)
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert (rates[10], rates[11]) == pytest.approx((1e-12, 1e-13)), "lowered after the second bad one, at step 10"
    assert checkpoint.load_weights(tmp_path / "run", "model")[1]["step"] == 4


def test_without_any_score_the_last_weights_are_kept_and_it_is_said(
    tmp_path: Path, parallel: Parallel, caplog: pytest.LogCaptureFixture
) -> None:
    errors = dict.fromkeys(range(9), DataError("never"))
    state, _ = train(scored(select="best"), tmp_path / "run", parallel, task=FailingTask(0, errors))
    weights, meta = checkpoint.load_weights(tmp_path / "run", "model")
    assert (meta["step"], meta["selected"]) == (8, True)
    assert all(torch.equal(weights[name], value) for name, value in state.model.state_dict().items())
    assert "no validation gave a score; the last weights are kept" in caplog.text


def test_a_file_system_that_stays_away_in_a_validation_saves_and_leaves(tmp_path: Path, parallel: Parallel) -> None:
    plain, _ = train(scored(), tmp_path / "plain", parallel)
    away = {1: StoppedError("the data cannot be read after 5 tries")}
    with pytest.raises(StoppedError, match=r"after 5 tries; trained to step 4, saved in .*run"):
        train(scored(), tmp_path / "run", parallel, task=FailingTask(0, away))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    state, lines = train(scored(), tmp_path / "run", parallel)
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6, 8], "made up for"
    assert state.facts() | {"seconds": 0} == plain.facts() | {"seconds": 0}


def test_patience_ends_a_run_that_stands_still(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 1e-12},  # nothing moves: the first evaluation stays the best
        train={"duration": 50, "evaluate_every": 2, "patience": 3, "select": "best", "ema": None},
    )
    state, lines = train(cfg, tmp_path / "run", parallel)
    assert state.step == 8
    assert state.patience.best_step == 2
    assert sum("validation" in line for line in lines) == 4


def test_the_plateau_rule_lowers_the_rate_that_is_used(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 1e-12, "plateau": {"patience": 0, "factor": 0.1}},
        train={"duration": 6, "evaluate_every": 2, "ema": None},
    )
    _, lines = train(cfg, tmp_path / "run", parallel)
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([1e-12] * 4 + [1e-13] * 2)


def test_the_best_weights_are_the_ones_kept_and_handed_back(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 0.8},  # too large: it gets worse after the first steps
        train={"duration": 4, "evaluate_every": 1, "select": "best", "ema": None},
    )
    state, lines = train(cfg, tmp_path / "run", parallel)
    scores = [line["validation"]["score"] for line in lines if "validation" in line]
    best = min(range(len(scores)), key=scores.__getitem__) + 1
    assert best < 4
    figures = evaluate(ToyTask(0), state.model, ToyValidation(cfg), parallel)
    assert figures["score"] == pytest.approx(min(scores))
    weights, meta = checkpoint.load_weights(tmp_path / "run", "model")
    assert meta["step"] == best
    assert all(torch.equal(weights[name], value) for name, value in state.model.state_dict().items())


def test_validation_leaves_padding_out_and_uses_the_average(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(data={"validation_split": "val"}, train={"duration": 4, "ema": {"decay": 0.5}})
    state, lines = train(cfg, tmp_path / "run", parallel)
    with state.ema.applied() as model:
        [batch] = list(ToyValidation(cfg))
        losses = (model(batch.images) - (1 - batch.images)).square().mean((1, 2, 3))
        wanted = (losses * batch.weight).sum().item() / 5
    assert lines[-1]["validation"]["loss"] == pytest.approx(wanted, rel=1e-6)
