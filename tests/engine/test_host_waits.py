"""The host never waits for its device inside a step, but once: the exchange that decides about the update.

There is a device here that nothing can be read from: torch's `meta`. It runs every operation of the step, and raises
where a value is to come back to the host. What is brought to a device is watched as well, because a plain copy waits
for all work before it. (Fused AdamW refuses `meta`; torch promises the same of it.)
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.gradients import StepOutcome
from ddpm_lmk.engine.logger import CompileClock, TrainLogger
from ddpm_lmk.engine.loop import Loaders, fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.models import build_model
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import read_lines
from ddpm_lmk.tasks import DenoiseTask, Task, build_task
from tests.engine.toy import ToyTrain, config

STEPS = 3
NETWORK = {"width": 8, "multipliers": [1], "heads": 2, "head_dim": 4, "groups": 4}
CASES: dict[str, dict[str, Any]] = {
    "denoise": {},
    "exact": {"train": {"exactness": "exact", "gradient": "sum", "micro_batch": 2}, "optim": {"clip": {}}},
    **{kind: {"task": {"kind": "landmarks", "codec": {"kind": kind}}} for kind in ("spatial", "disc", "gaussian")},
    "contour": {"task": {"kind": "landmarks", "codec": {"kind": "contour", "pixel": "floor"}}},
    "views": {"task": {"kind": "simclrv2"}, "model": {"kind": "encoder_unet", "encoder": "vgg19"}},
}


class EnoughError(Exception):
    """Ends a run in the middle."""


class FarDevice(Parallel):
    """A process whose device gives nothing back but what is exchanged; that is counted."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.device, self.exchanged = torch.device("meta"), 0

    def exchange(self, values: Tensor) -> list[list[float]]:
        assert values.device.type == "meta"
        self.exchanged += 1
        return [[1.0], [1.0], [0.0], [0.25]]


class Uploads(TorchFunctionMode):
    """Notes copies to the device that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if isinstance(out, Tensor) and out.device.type == "meta":
            is_new = name in ("tensor", "as_tensor", "new_tensor")
            sources = [value for value in args if isinstance(value, Tensor) and value.device.type == "cpu"]
            is_copy = name in ("to", "cuda", "copy_") and bool(sources)
            if (is_new or is_copy) and not kwargs.get("non_blocking"):
                self.waiting.append(f"{name} {tuple(out.shape)}")
        return out


class LabelledTrain(ToyTrain):
    """The toy's positions, with images of full size and points."""

    def global_batches(self, start_step: int) -> Any:
        side = self.cfg.data.image_size
        for group in super().global_batches(start_step):
            batches = [
                replace(
                    batch,
                    images=torch.zeros(len(batch), 1, side, side),
                    points=torch.full((len(batch), self.spec.num_landmarks, 2), 3.0),
                )
                for batch in group.micro_batches
            ]
            yield replace(group, micro_batches=batches)


def far_task(cfg: RunConfig, uploads: Uploads) -> Task:
    """The real task, whose noise the far device cannot draw by key, and which has enough after some steps.

    What is brought to the device once, in the first step, is forgotten.
    """
    task = build_task(cfg, SPECS["phantom-chest"])
    if isinstance(task, DenoiseTask):
        task.noise = lambda images, positions, stream="eps": torch.randn_like(images)  # type: ignore[method-assign]

    def after_step(model: nn.Module, step: int) -> None:
        if step == 1:
            uploads.waiting.clear()
        if step == STEPS:
            raise EnoughError

    task.after_step = after_step  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_waits_for_the_device_once(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    monkeypatch.setattr(clip_grad, "_device_has_foreach_support", lambda device: True)  # nor does this
    settings = {"optim": {"kind": "sgd", **case.get("optim", {})}, "task": case.get("task", {"kind": "denoise"})}
    size = {"image_size": 32} if "model" in case else {}
    how = {"precision": "fp32", "group_norm": "native", **case.get("train", {})}
    cfg = config(**{**settings, "model": case.get("model", NETWORK), "train": how, "data": size})
    parallel, uploads = FarDevice(), Uploads()
    task = far_task(cfg, uploads)
    with parallel.device:
        network = build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)
        state = TrainState.fresh(cfg, task.wrap(network))
    with RunDir.lock(tmp_path / "run", cfg) as run:
        run.begin(cfg, {"fingerprint": "toy"})
        with pytest.raises(EnoughError), uploads:
            fit(cfg, task, state, Loaders(LabelledTrain(cfg)), parallel, run)
    assert parallel.exchanged == STEPS
    assert uploads.waiting == []
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS)), "lines before the crash are all there"


def clock(parallel: Parallel) -> CompileClock:
    """Of a run that compiles nothing."""
    return CompileClock(config(), parallel, RunDir(Path(), writes=False))


def test_the_far_device_notices_a_read_and_a_plain_copy(tmp_path: Path) -> None:
    uploads, far = Uploads(), torch.zeros(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        far.sum().item()
    with uploads:
        far.new_tensor([1.0])
        torch.zeros(2).to("meta")
        torch.zeros(2).to("meta", non_blocking=True)
    assert uploads.waiting == ["new_tensor (1,)", "to (2,)"]


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
