"""The host never waits for its device inside a step, but once: the exchange that decides about the update.

That is so for every task, with or without a line of the log: the numbers of a line come with that exchange. The step is
the real one, on devices that nothing can be read from (`far`); so is a validation, whose sums are read once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.gradients import StepOutcome
from ddpm_lmk.engine.logger import CompileClock, TrainLogger
from ddpm_lmk.engine.loop import Loaders, fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import read_lines
from ddpm_lmk.tasks import DenoiseTask, build_task
from ddpm_lmk.tasks.codecs.contour import ContourCodec
from tests.engine.far import DEVICES, SPEC, Copies, FullTrain, far_device, far_model, real
from tests.engine.toy import config

STEPS = 3
NETWORK = {"width": 8, "multipliers": [1], "heads": 2, "head_dim": 4, "groups": 4}
ENCODER = {"kind": "encoder_unet", "encoder": "vgg19"}
CODECS = {
    **{kind: {"kind": kind} for kind in ("spatial", "disc", "gaussian")},
    "warped": {"kind": "disc", "masks": "warped"},
    "contour": {"kind": "contour", "pixel": "floor"},
}
CASES: dict[str, dict[str, Any]] = {
    "denoise": {"train": {"ema": {}}},
    "zoom": {"task": {"kind": "denoise", "zoom": {}}, "data": {"fine_size": 64}},
    "exact": {"train": {"exactness": "exact", "gradient": "sum", "micro_batch": 2}, "optim": {"clip": {}}},
    "muon": {"optim": {"kind": "muon"}},
    "accumulated": {"train": {"micro_batch": 2, "ema": {}}, "optim": {"clip": {"kind": "value"}}},
    **{name: {"task": {"kind": "landmarks", "codec": codec}} for name, codec in CODECS.items()},
    "second look": {"task": {"kind": "landmarks", "refine": {"size": 16}}, "data": {"fine_size": 64}},
    **{kind: {"task": {"kind": kind}, "model": ENCODER} for kind in ("simclrv2", "mocov3", "dino")},
    "gu2net": {"task": {"kind": "landmarks"}, "model": {"kind": "gu2net"}},
}


class EnoughError(Exception):
    """Ends a run in the middle."""


def run_file(case: dict[str, Any], kind: str) -> RunConfig:
    """The toy's, with a network of the case."""
    how = {"precision": "fp32", "group_norm": "native", **case.get("train", {})}
    size = {"image_size": 32} if "model" in case else {}
    task = case.get("task", {"kind": "denoise"})
    model = case.get("model", NETWORK)
    return config(optim=case.get("optim", {}), task=task, model=model, train=how, data={**size, **case.get("data", {})})


def steps(cfg: RunConfig, kind: str, path: Path) -> tuple[int, Copies]:
    """Exchanges in `STEPS` steps of the real loop, and copies in all but the first, which brings what stays there."""
    copies = Copies()
    task = build_task(cfg, SPEC)

    after = task.after_step

    def after_step(model: nn.Module, step: int) -> None:
        after(model, step)
        if step == 1:
            copies.waiting.clear()
        if step == STEPS:
            raise EnoughError

    task.after_step = after_step  # type: ignore[method-assign]
    with far_device(kind, copies) as parallel, pytest.MonkeyPatch.context() as patch:
        if kind == "meta":  # the fused one refuses it
            fused = torch.optim.AdamW
            patch.setattr(torch.optim, "AdamW", lambda groups, **how: fused(groups, **{**how, "fused": False}))
        state = TrainState.fresh(cfg, far_model(cfg, task, parallel.device))
        with RunDir.lock(path, cfg) as run:
            run.begin(cfg, {"fingerprint": "toy"})
            with pytest.raises(EnoughError), copies.watched():
                fit(cfg, task, state, Loaders(FullTrain(cfg)), parallel, run)
        return parallel.exchanged, copies


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_waits_for_the_device_once(case: dict[str, Any], kind: str, tmp_path: Path) -> None:
    exchanged, copies = steps(run_file(case, kind), kind, tmp_path / "run")
    assert exchanged == STEPS
    assert copies.waiting == []
    assert copies.home == []
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS)), "lines before the crash are all there"


def clock(parallel: Parallel) -> CompileClock:
    """Of a run that compiles nothing."""
    return CompileClock(config(), parallel, RunDir(Path(), writes=False))


def host(loss: Tensor) -> Tensor:
    """As many numbers on the host, with values."""
    with real():
        return torch.ones(len(loss))


def put(loss: Tensor, place: Any, value: Any) -> Tensor:
    loss = loss.clone()
    loss[place] = value
    return loss


# What makes the host wait, or no device takes, and what is said or noted of it.
FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "read": (lambda loss: loss * loss.sum().item(), "item|_local_scalar_dense"),
    "decided by": (lambda loss: loss if loss.sum() > 0 else -loss, "item|_local_scalar_dense"),
    "brought home": (lambda loss: loss.cpu(), "copy"),
    "picked by a mask": (lambda loss: loss[loss > 0], "nonzero|aten.index.Tensor"),
    "put where a mask is true": (lambda loss: put(loss, loss > 0, loss.detach()), "mask is true"),
    "one put where a mask is true": (lambda loss: put(loss, loss > 0, loss.detach().sum()), "mask is true"),
    "picked by a list": (lambda loss: loss[[0, 1]], "by a list"),
    "put by a list": (lambda loss: put(loss, [0, 1], 0.0), "by a list"),
    "picked by a tensor of the host": (lambda loss: loss[host(loss).long()], "by a tensor of the host"),
    "picked by an array": (lambda loss: loss[np.zeros(len(loss), int)], "copy|by a tensor of the host"),
    "put from the host": (lambda loss: put(loss, slice(None), host(loss)), "copy_"),
    "made of numbers": (lambda loss: loss * torch.tensor([1.0] * len(loss), device=loss.device), "tensor"),
    "carried": (lambda loss: loss * host(loss).to(loss.device), "_to_copy"),
    "carried, not pinned": (lambda loss: loss * host(loss).to(loss.device, non_blocking=True), "_to_copy"),
    "copied, not pinned": (lambda loss: torch.empty_like(loss).copy_(host(loss), non_blocking=True), "copy_"),
    "mixed": (lambda loss: loss * host(loss), "mul: wanted all on the same device"),
    "mixed in a product": (lambda loss: loss @ host(loss), "dot: wanted all on the same device"),
    "mixed in a convolution": (
        lambda loss: F.conv1d(loss[None, None], host(loss)[None, None, :1]),
        "convolution: wanted all on the same device",
    ),
    "mixed by rows": (lambda loss: loss.index_select(0, host(loss).long()), "index_select: wanted all"),
    "inverted": (lambda loss: torch.linalg.inv(loss[:1, None]), "_linalg_check_errors"),
    "solved": (lambda loss: torch.linalg.solve(loss[:1, None], loss[:1, None]), "_linalg_check_errors"),
    "with eigenvalues": (lambda loss: torch.linalg.eigvalsh(loss[:1, None]), "_linalg_eigh"),
    "drawn by probability": (lambda loss: loss.multinomial(1), "multinomial"),
}
SOUND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a number": lambda loss, pinned: loss * 2.0 + torch.tensor(1.0),
    "a number where a mask is true": lambda loss, pinned: put(loss, loss > 0, 0.0),
    "rows": lambda loss, pinned: put(loss, slice(0, 2), loss[:2])[loss.long(), None],
    "pinned": lambda loss, pinned: loss * pinned.to(loss.device, non_blocking=True),
    "copied": lambda loss, pinned: loss.copy_(pinned, non_blocking=True),
    "made there": lambda loss, pinned: loss * torch.ones(4, device=loss.device) + torch.full_like(loss, 2.0),
}


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(("fault", "noted"), FAULTS.values(), ids=FAULTS)
def test_what_waits_is_found(fault: Callable[[Tensor], Any], noted: str, kind: str) -> None:
    copies = Copies()
    with far_device(kind, copies) as parallel:
        loss = torch.ones(4, device=parallel.device)
        with copies.watched():
            try:
                fault(loss)
            except (RuntimeError, NotImplementedError) as error:
                copies.home.append(str(error))
    assert re.search(noted, " ".join(copies.home + copies.waiting))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("sound", SOUND.values(), ids=SOUND)
def test_what_does_not_wait_is_not_found(sound: Callable[[Tensor, Tensor], Any], kind: str) -> None:
    copies = Copies()
    with far_device(kind, copies) as parallel:
        loss = torch.ones(4, device=parallel.device)
        pinned = host(loss).pin_memory()
        with copies.watched():
            sound(loss, pinned)
    assert (copies.waiting, copies.home) == ([], [])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("fault", ["read", "brought home", "picked by a mask", "picked by a list", "carried", "mixed"])
@pytest.mark.parametrize("place", ["loss", "codec"])
def test_a_planted_fault_is_found(
    fault: str, place: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = DenoiseTask if place == "loss" else ContourCodec
    sound = owner.loss
    monkeypatch.setattr(owner, "loss", lambda self, *values: FAULTS[fault][0](sound(self, *values)))
    case = CASES["denoise" if place == "loss" else "contour"]
    try:
        exchanged, copies = steps(run_file(case, kind), kind, tmp_path / "run")
    except (RuntimeError, NotImplementedError, pytest.fail.Exception):
        return  # the device refused it
    assert exchanged != STEPS or copies.waiting or copies.home


def test_a_slow_disk_does_not_hold_up_steps_and_loses_no_line(parallel: Parallel) -> None:
    cfg = config()
    state, written = TrainState.fresh(cfg, nn.Linear(1, 1)), []

    def write(line: dict[str, Any]) -> None:
        time.sleep(0.05)
        written.append(line["step"])

    with TrainLogger(state, parallel, clock(parallel), write=write, total=8, every=1) as meter:
        for _ in range(4):
            state.step += 1
            meter.step(StepOutcome(1.0, 1.0, 0.0, 0.0), size=4, is_skipped=False, lr=0.1)
        assert len(written) < 4, "the loop is not where lines are written"
        with meter.paused():
            assert written == [1, 2, 3, 4], "a checkpoint is made when all lines before it are on the disk"
        for _ in range(4):
            state.step += 1
            meter.step(StepOutcome(1.0, 1.0, 0.0, 0.0), size=4, is_skipped=False, lr=0.1)
    assert written == list(range(1, 9))


def test_what_writing_a_line_raises_ends_the_run(parallel: Parallel) -> None:
    state = TrainState.fresh(config(), nn.Linear(1, 1))

    def write(line: dict[str, Any]) -> None:
        raise ValueError("no such number in JSON")

    def run() -> None:
        with TrainLogger(state, parallel, clock(parallel), write=write, total=1, every=1) as meter:
            state.step = 1
            meter.step(StepOutcome(1.0, 1.0, 0.0, 0.0), size=4, is_skipped=False, lr=0.1)

    with pytest.raises(ValueError, match="no such number"):
        run()


def test_waiting_for_data_is_that_of_all_ranks(tmp_path: Path, parallel: Parallel) -> None:
    seen: list[dict[str, Any]] = []
    state = TrainState.fresh(config(), nn.Linear(1, 1))
    with TrainLogger(state, parallel, clock(parallel), write=seen.append, total=1, every=1) as meter:
        time.sleep(0.02)
        state.step = 1
        meter.step(StepOutcome(1.0, 1.0, 0.0, 1e-3), size=4, is_skipped=False, lr=0.1)
    assert 0 < seen[0]["data_wait"] <= 0.05
