"""The host never waits for its device inside a step, but once: the exchange that decides about the update.

That is so for every task, with or without a line of the log: the numbers of a line come with that exchange. The step is
the real one, on devices that nothing can be read from (`far`); so is a validation, whose sums are read once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from tests.engine.far import DEVICES, SPEC, Copies, FullTrain, far_device, far_model
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


def read_it(loss: Tensor) -> Tensor:
    return loss * loss.sum().item()


def pick_it(loss: Tensor) -> Tensor:
    return loss[loss > 0]


def bring_it_home(loss: Tensor) -> Tensor:
    return loss.cpu()


def mix_it(loss: Tensor) -> Tensor:
    return loss * torch.ones(len(loss))


def carry_it(loss: Tensor) -> Tensor:
    return loss * torch.ones(len(loss)).to(loss.device)


def decide_by_it(loss: Tensor) -> Tensor:
    return loss if loss.sum() > 0 else -loss


FAULTS = (read_it, pick_it, bring_it_home, mix_it, carry_it, decide_by_it)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", ["loss", "codec"])
def test_a_planted_fault_is_found(
    fault: Any, place: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = DenoiseTask if place == "loss" else ContourCodec
    sound = owner.loss
    monkeypatch.setattr(owner, "loss", lambda self, *values: fault(sound(self, *values)))
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
