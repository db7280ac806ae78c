"""Tensors lie where they belong: beside the step (`test_host_waits`), in all that a run does on its device.

Devices are those of `far`: what mixes them up, or reads from one, raises, or is noted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.engine.forecast import random_batch
from ddpm_lmk.engine.optim import moments
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import Norm
from ddpm_lmk.rundir.checkpoint import Checkpoint
from ddpm_lmk.system import accelerator
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask, build_task, noise_schedule
from tests.engine.far import DEVICES, SPEC, Copies, FullTrain, far_device, far_model, real
from tests.engine.test_host_waits import CASES, ENCODER, run_file

ON_THE_HOST = ("disc", "warped")  # decoded with OpenCV's contours, as the released code: the maps come home
PREDICTED = {
    **{name: case for name, case in CASES.items() if case.get("task", {}).get("kind") == "landmarks"},
    "views": {"task": {"kind": "landmarks", "views": 3}},
    "encoder": {"task": {"kind": "landmarks"}, "model": ENCODER},
}


def batch_of(cfg: RunConfig) -> Batch:
    """Images with points, on the host."""
    return next(FullTrain(cfg).global_batches(0)).micro_batches[0]


def devices(values: Any) -> set[str]:
    """Kinds of device of all tensors in it."""
    return {value.device.type for value in tree_leaves(values) if isinstance(value, Tensor)}


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    "case", [case for name, case in PREDICTED.items() if name not in ON_THE_HOST],
    ids=[name for name in PREDICTED if name not in ON_THE_HOST],
)  # fmt: skip
def test_validation_and_prediction_do_not_leave_the_device(case: dict[str, Any], kind: str) -> None:
    cfg, copies = run_file(case, kind), Copies()
    task, batch = build_task(cfg, SPEC), batch_of(cfg)
    assert isinstance(task, LandmarkTask)
    with far_device(kind, copies) as parallel, torch.no_grad():
        model = far_model(cfg, task, parallel.device).eval()
        there = batch.to(parallel.device)
        with copies.watched():
            sums, found = task.evaluate(model, there), task.predict(model, there)
        assert devices([sums, vars(found)]) == {kind}
    assert (copies.waiting, copies.home) == ([], [])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("case", [CASES["denoise"], CASES["dino"]], ids=["denoise", "dino"])
def test_validation_of_what_has_no_points_does_not_leave_the_device(case: dict[str, Any], kind: str) -> None:
    cfg, copies = run_file(case, kind), Copies()
    task, batch = build_task(cfg, SPEC), batch_of(cfg)
    with far_device(kind, copies) as parallel, torch.no_grad():
        model = far_model(cfg, task, parallel.device).eval()
        there = batch.to(parallel.device)
        with copies.watched():
            assert devices(task.evaluate(model, there)) == {kind}
    assert copies.home == []


@pytest.mark.parametrize("kind", DEVICES)
def test_samples_are_drawn_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, copies = run_file({}, kind), Copies()
    task = build_task(cfg, SPEC)
    assert isinstance(task, DenoiseTask)
    with far_device(kind, copies) as parallel:
        model = far_model(cfg, task, parallel.device).eval()
        noise = torch.zeros(2, 1, 16, 16, device=parallel.device)
        with real():
            timesteps = noise_schedule.ddim_timesteps(3, task.schedule.num_timesteps)
        monkeypatch.setattr(noise_schedule, "ddim_timesteps", lambda *_: timesteps)  # numbers of the host, as they are
        with copies.watched():
            states = list(noise_schedule.ddim_sample(model, task.schedule, noise, num_steps=3))
        assert devices(states) == {kind}
    assert copies.home == []


@pytest.mark.parametrize("kind", DEVICES)
def test_a_checkpoint_goes_back_to_where_the_state_lies(kind: str) -> None:
    optim = {"kind": "sgd" if kind == "meta" else "adamw"}
    cfg = run_file({"train": {"ema": {}}, "optim": optim}, kind)
    task = build_task(cfg, SPEC)
    with far_device(kind, Copies()) as parallel:
        state = TrainState.fresh(cfg, far_model(cfg, task, parallel.device))

        def update() -> None:
            for parameter in state.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            state.optimizer.step()
            state.ema.update(1)

        update()
        files = state.tensors(moments(state.optimizer, state.model))
        with real():  # what a file would give: on the host, contiguous
            read = {
                file: {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in group.items()}
                for file, group in files.items()
            }
        state.load(Checkpoint(Path("step"), read, state.facts()), load_all=put_in_place)
        held = [*state.model.parameters(), *state.ema._average.values(), list(state.optimizer.state.values())]
        assert devices(held) == {kind}
        update()


def put_in_place(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, place in model.state_dict().items():
            place.copy_(weights[name])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("cached", ["stream", "ram", "device"])
def test_batches_of_the_loader_are_made_on_the_device(
    cached: str, kind: str, pretraining: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = {"shift": 0.1, "gamma": 0.5, "noise": 0.0}  # noise wants a generator of the device
    cfg = pretraining(data={"augment": augment}, runtime={"cache_pixels": cached})
    copies = Copies()
    monkeypatch.setattr(accelerator, "free_bytes", lambda device, *, processes: 2**40)
    with far_device(kind, copies) as parallel:
        loader = open_loader(cfg, stage="train", device=parallel.device)
        with copies.watched():
            batch = next(loader.global_batches(0)).micro_batches[0]
        loader.close()
        on_host = ("positions", "domain")
        assert devices([value for name, value in vars(batch).items() if name not in on_host]) == {kind}
    assert (copies.waiting, copies.home) == ([], [])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", ["weight", "images"])
def test_a_tensor_left_on_the_host_is_refused_by_every_layer(name: str, kind: str) -> None:
    cfg, copies = run_file({}, kind), Copies()
    task = build_task(cfg, SPEC)
    with far_device(kind, copies) as parallel:
        model = far_model(cfg, task, parallel.device)
        use_norm(model, Norm("folded", ""))
        images = torch.zeros(2, 1, 16, 16, device=parallel.device if name == "weight" else "cpu")
        if name == "weight":
            with real():
                model.final_conv.bias = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
        with copies.watched(), pytest.raises(RuntimeError, match="same device"):
            model(images, torch.ones(2, dtype=torch.long, device=parallel.device))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", ["denoise", "zoom", "second look"])
def test_a_batch_that_steps_are_timed_on_can_be_pinned(name: str, kind: str) -> None:
    cfg, copies = run_file(CASES[name], kind), Copies()
    task = build_task(cfg, SPEC)
    batch = random_batch(cfg, task, 3)
    with far_device(kind, copies) as parallel, copies.watched():
        assert devices(vars(batch.to(parallel.device))["images"]) == {kind}
    assert copies.waiting == []


def test_memory_in_which_an_element_is_there_twice_is_not_pinned() -> None:
    with pytest.raises(RuntimeError, match="twice"):
        Copies().pin(torch.eye(2, 3).expand(4, 2, 3))
