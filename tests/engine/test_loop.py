"""The loop: what an update is made of, what happens when numbers are not finite, when to stop, what is kept."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lmk import checkpoint
from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine import loop
from ddpm_lmk.engine.loop import evaluate, fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.errors import ConfigError, DivergedError, LaunchError, ResourceError, StoppedError
from ddpm_lmk.stop import InterruptedRunError
from tests.engine.processes import events
from tests.engine.toy import ToyTask, ToyTrain, ToyValidation, config, everything, fresh_state, pixels, start

SGD = {"kind": "sgd", "lr": 0.1}


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def train(
    cfg: RunConfig, path: Path, parallel: Parallel, *, task: ToyTask | None = None, **loader: Any
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Run to the end, or continue; the state and the lines of metrics.jsonl."""
    state, loaders, run = start(cfg, path, parallel, **loader)
    with run:
        fit(cfg, task or ToyTask(cfg.seed), state, loaders, parallel, run)
    return state, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


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
    cfg = config(optim=SGD, train={"length": 1, "micro_batch": micro_batch, "ema": None})
    state, _ = train(cfg, tmp_path / "run", parallel)
    wanted = gradient_of_mean(cfg, [0, 1, 2, 3])
    for name, found in step_taken(cfg, state).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_short_last_group_is_divided_by_its_own_size(tmp_path: Path, parallel: Parallel) -> None:
    whole = {"length": 1, "micro_batch": 2, "windows": "epoch", "group_size": 4, "ema": None}
    cfg = config(optim=SGD, train=whole)
    state, lines = train(cfg, tmp_path / "run", parallel, num_images=3)
    assert lines[0]["images"] == 3
    wanted = gradient_of_mean(cfg, [0, 1, 2], num_images=3)
    for name, found in step_taken(cfg, state).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6)


def test_gradient_sum_adds_the_means_of_micro_batches(tmp_path: Path, parallel: Parallel) -> None:
    mean = config(optim=SGD, train={"length": 1, "micro_batch": 1, "ema": None})
    both = config(optim=SGD, train={"length": 1, "micro_batch": 1, "ema": None, "gradient": "sum"})
    small = step_taken(mean, train(mean, tmp_path / "mean", parallel)[0])
    large = step_taken(both, train(both, tmp_path / "sum", parallel)[0])
    for name, value in small.items():
        torch.testing.assert_close(large[name], 4 * value, rtol=1e-4, atol=1e-6)


def test_the_reported_loss_is_the_mean_over_the_group(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(optim=SGD, train={"length": 2, "micro_batch": 2})
    _, lines = train(cfg, tmp_path / "run", parallel)
    task, model, stream = ToyTask(cfg.seed), fresh_state(cfg).model, ToyTrain(cfg)
    losses = [task.loss(model, batch) for batch in next(stream.groups(0)).micro_batches]
    assert lines[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "eta_s"} <= lines[0].keys()
    assert lines[1]["eta_s"] == 0


def test_a_run_stopped_and_continued_has_the_same_bits(tmp_path: Path, parallel: Parallel) -> None:
    settings = {"length": 9, "evaluate_every": 2, "select": "best", "micro_batch": 2}
    cfg = config(
        data={"validation_split": "val"},
        train=settings,
        optim={"lr": 0.05, "plateau": {"patience": 0, "threshold": 0.5}},
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


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 3})
    clean = config(train={"length": 1})
    state, lines = train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset({5, 9})))
    first, _ = train(clean, tmp_path / "clean", parallel)
    assert (state.step, state.health.skipped, state.images) == (3, 2, 12)
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
    assert (state.step, state.images, state.health.left_out, state.health.skipped) == (12, 48, [[2, 9]], 7)
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
    assert (state.step, state.health.skipped, state.health.in_a_row) == (24, 1, 0)
    assert len(state.health.losses) == len(state.health.norms) == 16
    assert max(state.health.losses) < 10, "a spike does not enter the statistics"
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"spike"' in line] == [21]


def test_zero_needs_deepspeed_and_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LaunchError, match=r"found no DeepSpeed; pip install 'ddpm-lmk\[deepspeed\]'") as error:
        Parallel("cpu", zero=1)
    assert error.value.exit_code == 5


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
    assert state.health.in_a_row == 0
    overflows = [line for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines() if "overflow" in line]
    assert 0 < state.health.skipped == len(overflows) == 16 - int(np.log2(state.scale.value))
    found, wanted = dict(state.model.named_parameters()), dict(exact.model.named_parameters())
    for name, value in wanted.items():  # an update less is taken in fp16
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.02)
    kept = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000010").state
    assert kept["scale"]["value"] == state.scale.value


def test_fp16_that_overflows_at_any_scale_ends_the_run(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(train={"length": 40, "precision": "fp16", "checkpoint_every": 2})
    with pytest.raises(DivergedError, match=r"even with a loss scale of 0\.5, up to step 18"):
        train(cfg, tmp_path / "run", parallel, task=ToyTask(0, frozenset(range(8, 999))))


def test_patience_ends_a_run_that_stands_still(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 1e-12},  # nothing moves: the first evaluation stays the best
        train={"length": 50, "evaluate_every": 2, "patience": 3, "select": "best", "ema": None},
    )
    state, lines = train(cfg, tmp_path / "run", parallel)
    assert state.step == 8
    assert state.patience.best_step == 2
    assert sum("validation" in line for line in lines) == 4


def test_the_plateau_rule_lowers_the_rate_that_is_used(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 1e-12, "plateau": {"patience": 0, "factor": 0.1}},
        train={"length": 6, "evaluate_every": 2, "ema": None},
    )
    _, lines = train(cfg, tmp_path / "run", parallel)
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([1e-12] * 4 + [1e-13] * 2)


def test_the_best_weights_are_the_ones_kept_and_handed_back(tmp_path: Path, parallel: Parallel) -> None:
    cfg = config(
        data={"validation_split": "val"},
        optim={"kind": "sgd", "lr": 0.8},  # too large: it gets worse after the first steps
        train={"length": 4, "evaluate_every": 1, "select": "best", "ema": None},
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
    cfg = config(data={"validation_split": "val"}, train={"length": 4, "ema": {"decay": 0.5}})
    state, lines = train(cfg, tmp_path / "run", parallel)
    with state.ema.applied() as model:
        [batch] = list(ToyValidation(cfg))
        losses = (model(batch.images) - (1 - batch.images)).square().mean((1, 2, 3))
        wanted = (losses * batch.weight).sum().item() / 5
    assert lines[-1]["validation"]["loss"] == pytest.approx(wanted, rel=1e-6)


def test_bf16_gives_nearly_the_same_first_loss(tmp_path: Path, parallel: Parallel) -> None:
    fp32, bf16 = config(train={"length": 1}), config(train={"length": 1, "precision": "bf16"})
    _, exact = train(fp32, tmp_path / "fp32", parallel)
    _, rough = train(bf16, tmp_path / "bf16", parallel)
    assert rough[0]["loss"] != exact[0]["loss"]
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)


def test_snapshots_come_at_their_interval_and_at_the_end(tmp_path: Path, parallel: Parallel) -> None:
    train(config(train={"length": 7, "snapshot_every": 3}), tmp_path / "run", parallel)
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


def test_an_interval_of_no_steps_is_refused(tmp_path: Path, parallel: Parallel) -> None:
    with pytest.raises(ConfigError, match=r"train\.log_every=0 steps is no interval"):
        train(config(train={"log_every": 0}), tmp_path / "run", parallel)


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
    for path in Path(loop.__file__).parent.glob("*.py"):
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
# The kind of an optimizer, of clipping or of an exception is no task; isinstance is asked of tensors, DDP and errors.
ALLOWED = {
    "optim.py": {"kind", "isinstance"},
    "updater.py": {"isinstance"},
    "parallel.py": {"isinstance"},
    "memory.py": {"kind", "isinstance"},
    "meter.py": {"isinstance"},
    "stop.py": {"kind"},
}


def is_documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
