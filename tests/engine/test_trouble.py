"""Numbers that are not finite, spikes, no memory, fp16 that overflows: what is left out, and when a run ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DivergedError, ResourceError, StoppedError
from ddpm_lmk.rundir import checkpoint
from tests.engine.processes import events
from tests.engine.toy import ToyTask, config, everything, train


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 3})
    clean = config(train={"length": 1})
    state, lines = train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset({5, 9})))
    first, _ = train(clean, tmp_path / "clean", parallel)
    assert (state.step, state.divergence.skipped, state.images) == (3, 2, 12)
    assert lines[1]["loss"] is None
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.count("update.skipped") == 2
    wanted = everything(first)
    assert all(torch.equal(value, wanted[name]) for name, value in everything(state).items())


def test_six_such_steps_in_a_row_go_back_once_and_leave_out_what_came_between(
    tmp_path: Path, parallel: Parallel
) -> None:
    cfg = config(train={"length": 12, "checkpoint_every": 2, "keep_checkpoints": 9})
    state, _ = train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset(range(12, 36))))
    assert (state.step, state.images, state.divergence.left_out, state.divergence.skipped) == (12, 48, [[2, 9]], 7)
    assert "run.went_back" in events(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} >= {"step-00000002", "step-00000009"}
    weights = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000009").tensors
    wanted = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002").tensors
    assert all(torch.equal(weights[file][name], v) for file, group in wanted.items() for name, v in group.items())


def test_going_back_is_replayed_when_the_run_dies_before_it_is_saved(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 12, "checkpoint_every": 2, "keep_checkpoints": 9})
    bad = ToyTask(0, frozenset(range(12, 36)))
    plain, _ = train(cfg, tmp_path / "plain", parallel, task=bad)
    cut = tmp_path / "cut"
    bad.after_step = lambda model, step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    with pytest.raises(StoppedError):  # saved at step 4, in the middle of the trouble
        train(cfg, cut, parallel, task=bad)
    resumed, _ = train(cfg, cut, parallel, task=ToyTask(0, frozenset(range(12, 36))))
    assert resumed.facts() | {"seconds": 0} == plain.facts() | {"seconds": 0}
    wanted = everything(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in everything(resumed).items())


def test_the_second_time_the_run_ends(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 20, "checkpoint_every": 2})
    with pytest.raises(DivergedError, match="6 steps in a row, up to step 15; it went back to a checkpoint once"):
        train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset(range(12, 99))))
    assert not (tmp_path / "run" / "snapshots").exists()


def test_without_a_checkpoint_the_run_ends_the_first_time(tmp_path: Path, parallel: Parallel) -> None:
    with pytest.raises(DivergedError, match="up to step 9; nothing of them is saved"):
        train(config(train={"length": 20}), tmp_path / "run", parallel, task=ToyTask(0, frozenset(range(12, 99))))


def test_a_spike_is_left_out_and_the_run_goes_on(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 24, "spikes": {"window": 16, "after": 0}}, optim={"lr": 1e-4})
    task = ToyTask(0)
    plain = task.loss
    task.loss = lambda model, batch: plain(model, batch) * (1e4 if 80 in batch.positions.tolist() else 1)
    state, _ = train(cfg, tmp_path / "run", parallel, task=task)
    assert (state.step, state.divergence.skipped, state.divergence.in_a_row) == (24, 1, 0)
    assert len(state.divergence.losses) == len(state.divergence.norms) == 16
    assert max(state.divergence.losses) < 10, "a spike does not enter the statistics"
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"spike"' in line] == [21]


@pytest.mark.parametrize("is_early", [True, False])
def test_no_memory_says_what_would_fit_or_asks_for_a_restart(
    tmp_path: Path, parallel: Parallel, is_early: bool
) -> None:
    task = ToyTask(0)
    plain, bad = task.loss, 4 if is_early else 24

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        if bad in batch.positions.tolist():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return plain(model, batch)

    task.loss = loss
    with pytest.raises(ResourceError if is_early else StoppedError) as error:
        train(config(), tmp_path / "run", parallel, task=task)
    assert error.value.exit_code == (6 if is_early else 75)
    said = "train.micro_batch=4 images at once do not fit" if is_early else "out of memory in step 7, after 6 steps"
    assert said in str(error.value)
    assert not is_early or "set train.micro_batch=2" in str(error.value)


def test_fp16_halves_its_scale_until_gradients_are_finite(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 12, "precision": "fp16", "checkpoint_every": 5}, optim={"kind": "sgd", "lr": 0.05})
    state, _ = train(cfg, tmp_path / "run", parallel)
    exact, _ = train(config(train={"length": 12}, optim={"kind": "sgd", "lr": 0.05}), tmp_path / "fp32", parallel)
    assert 1 < state.scale.value <= 2**16
    assert state.divergence.in_a_row == 0
    overflows = [line for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if "overflow" in line]
    assert 0 < state.divergence.skipped == len(overflows) == 16 - int(np.log2(state.scale.value))
    found, wanted = dict(state.model.named_parameters()), dict(exact.model.named_parameters())
    for name, value in wanted.items():  # an update less is taken in fp16
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.02)
    kept = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000010").state
    assert kept["scale"]["value"] == state.scale.value


def test_fp16_that_overflows_at_any_scale_ends_the_run(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 40, "precision": "fp16", "checkpoint_every": 2})
    with pytest.raises(DivergedError, match=r"even with a loss scale of 0\.5, up to step 18"):
        train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset(range(8, 999))))
