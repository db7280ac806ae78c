"""The loop: what an update is made of, what happens when numbers are not finite, when to stop, what is kept."""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine import loop
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import LaunchError, StoppedError
from ddpm_lmk.rundir import checkpoint
from ddpm_lmk.system.signals import InterruptedRunError
from tests.engine.toy import ToyTask, ToyTrain, config, everything, fresh_state, pixels, train

SGD = {"kind": "sgd", "lr": 0.1}


def gradient_of_mean(cfg: RunConfig, positions: list[int], *, num_images: int = 6) -> dict[str, Tensor]:
    """The reference: one plain backward pass of the mean loss over the samples at `positions`."""
    model, places = fresh_state(cfg).model, np.array(positions)
    rows = ToyTrain(cfg, num_images=num_images).order.at(places)[1]
    images, noise = pixels(cfg.seed, "image", rows), pixels(cfg.seed, "noise", places)
    (model(images + 0.1 * noise) - (1 - images)).square().mean((1, 2, 3)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_taken(cfg: RunConfig, state: TrainState) -> dict[str, Tensor]:
    """How far one SGD step went, as a gradient."""
    before = dict(fresh_state(cfg).model.named_parameters())
    return {
        n: (before[n] - p).detach() / cfg.optim.lr
        for n, p in state.model.named_parameters()
        if n.split(".")[0] != "unreached"
    }


@pytest.mark.parametrize("micro_batch", [None, 2, 1])
def test_a_step_is_the_gradient_of_the_mean_over_the_group(
    tmp_path: Path, parallel: Parallel, micro_batch: int | None
) -> None:
    cfg = config(optim=SGD, train={"duration": 1, "micro_batch": micro_batch, "ema": None})
    state, _ = train(cfg, tmp_path / "run", parallel)
    wanted = gradient_of_mean(cfg, [0, 1, 2, 3])
    for name, found in step_taken(cfg, state).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_short_last_group_is_divided_by_its_own_size(tmp_path: Path, parallel: Parallel) -> None:
    whole = {"duration": 1, "micro_batch": 2, "epoch_boundary": "epoch", "global_batch_size": 4, "ema": None}
    cfg = config(optim=SGD, train=whole)
    state, lines = train(cfg, tmp_path / "run", parallel, num_images=3)
    assert lines[0]["images"] == 3
    wanted = gradient_of_mean(cfg, [0, 1, 2], num_images=3)
    for name, found in step_taken(cfg, state).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6)


def test_gradient_sum_adds_the_means_of_micro_batches(tmp_path: Path, parallel: Parallel) -> None:
    mean = config(optim=SGD, train={"duration": 1, "micro_batch": 1, "ema": None})
    both = config(optim=SGD, train={"duration": 1, "micro_batch": 1, "ema": None, "gradient": "sum"})
    small = step_taken(mean, train(mean, tmp_path / "mean", parallel)[0])
    large = step_taken(both, train(both, tmp_path / "sum", parallel)[0])
    for name, value in small.items():
        torch.testing.assert_close(large[name], 4 * value, rtol=1e-4, atol=1e-6)


def test_the_reported_loss_is_the_mean_over_the_group(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(optim=SGD, train={"duration": 2, "micro_batch": 2})
    _, lines = train(cfg, tmp_path / "run", parallel)
    task, model, stream = ToyTask(cfg.seed), fresh_state(cfg).model, ToyTrain(cfg)
    losses = [task.loss(model, batch) for batch in next(stream.global_batches(0)).micro_batches]
    assert lines[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "eta_s"} <= lines[0].keys()
    assert lines[1]["eta_s"] == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_stopped_and_continued_has_the_same_bits(kind: str, tmp_path: Path, parallel: Parallel) -> None:
    settings = {"duration": 9, "evaluate_every": 2, "select": "best", "micro_batch": 2}
    cfg = config(
        data={"validation_split": "val"},
        train=settings,
        optim={"kind": kind, "lr": 0.05, "plateau": {"patience": 0, "threshold": 0.5}},
    )
    plain, _ = train(cfg, tmp_path / "plain", parallel)
    task = ToyTask(cfg.seed)
    task.after_step = lambda model, step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
    with pytest.raises(StoppedError) as stopped:
        train(cfg, tmp_path / "cut", parallel, task=task)
    assert stopped.value.exit_code == 75
    resumed, lines = train(cfg, tmp_path / "cut", parallel)
    assert resumed.facts() | {"seconds": 0} == plain.facts() | {"seconds": 0}
    wanted = everything(plain)
    assert everything(resumed).keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in everything(resumed).items())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 10)), "lines after the checkpoint are written once"
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6, 8, 9]


def test_ctrl_c_saves_and_says_130(tmp_path: Path, parallel: Parallel) -> None:
    cfg, task, before = config(), ToyTask(0), signal.getsignal(signal.SIGINT)
    task.after_step = lambda model, step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None
    with pytest.raises(InterruptedRunError) as stopped:
        train(cfg, tmp_path / "run", parallel, task=task)
    assert stopped.value.exit_code == 130
    # The signal came after the flags of step 2 were exchanged, so step 3 agrees on it.
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread(tmp_path: Path, parallel: Parallel) -> None:
    thread = threading.Thread(target=train, args=(config(), tmp_path / "run", parallel))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "snapshots" / "step-00000008").is_dir()


def test_zero_needs_deepspeed_and_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LaunchError, match=r"found no DeepSpeed; pip install 'ddpm-lmk\[deepspeed\]'") as error:
        Parallel("cpu", zero=1)
    assert error.value.exit_code == 5


def test_bf16_gives_nearly_the_same_first_loss(tmp_path: Path, parallel: Parallel) -> None:
    fp32, bf16 = config(train={"duration": 1}), config(train={"duration": 1, "precision": "bf16"})
    _, exact = train(fp32, tmp_path / "fp32", parallel)
    _, rough = train(bf16, tmp_path / "bf16", parallel)
    assert rough[0]["loss"] != exact[0]["loss"]
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)


def test_snapshots_come_at_their_interval_and_at_the_end(tmp_path: Path, parallel: Parallel) -> None:
    train(config(train={"duration": 7, "snapshot_every": 3}), tmp_path / "run", parallel)
    metas = {p.name: checkpoint.snapshot_meta(p) for p in (tmp_path / "run" / "snapshots").iterdir()}
    assert {name: meta["selected"] for name, meta in metas.items()} == {
        "step-00000003": False,
        "step-00000006": False,
        "step-00000007": True,
    }


def test_a_decay_too_long_for_the_run_is_told(
    tmp_path: Path, parallel: Parallel, caplog: pytest.LogCaptureFixture
) -> None:
    train(config(train={"ema": {"decay": 0.9999}}), tmp_path / "run", parallel)
    assert "train.ema.decay=0.9999 over 8 steps leaves 100% of the starting weights" in caplog.text


def test_an_interval_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"runtime\.log_every=0 steps is no interval"):
        config(runtime={"log_every": 0})


def test_nothing_in_the_engine_asks_which_task_it_runs() -> None:
    kinds = {
        "denoise",
        "landmarks",
        "kind",
        "DenoiseTask",
        "LandmarkTask",
        "DenoiseConfig",
        "LandmarksConfig",
        "isinstance",
    }
    beside = {"forecast.py", "starting_weights.py"}  # what tasks have at their end, and what networks begin with
    for path in set(Path(loop.__file__).parent.glob("*.py")) - {Path(loop.__file__).with_name(name) for name in beside}:
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and is_documented(node)
        }
        for node in ast.walk(tree):
            words = {getattr(node, field, None) for field in ("id", "attr", "name")}
            words.add(node.value if isinstance(node, ast.Constant) and id(node) not in docs else None)
            if isinstance(node, ast.Call) and "isinstance" in words:
                continue
            used = {word for word in words if isinstance(word, str)} & kinds
            assert not (used - ALLOWED.get(path.name, set())), f"{path.name}:{node.lineno} mentions {used}"


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
# The kind of an optimizer, a network, clipping or an exception is no task; nor are values that isinstance is asked of.
ALLOWED = {
    "device_fit.py": {"kind", "isinstance"},
    "optim.py": {"kind", "isinstance"},
    "gradients.py": {"isinstance"},
    "parallel.py": {"isinstance"},
    "requirements.py": {"kind"},
    "logger.py": {"isinstance"},
    "trackers.py": {"kind", "isinstance"},  # trackers show which kind of task a run is of
}


def is_documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
