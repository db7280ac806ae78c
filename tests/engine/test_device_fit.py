"""What `auto` becomes on devices of other sizes, and the memory it is decided by."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine import device_fit
from ddpm_lmk.engine.device_fit import (
    GIB,
    Fitted,
    Memory,
    copies_of_weights,
    fit_to_device,
    is_out_of_memory,
    memory_gib,
)
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.models import build_model
from ddpm_lmk.tasks import Task, build_task
from tests.engine.toy import config

GB = 10**9
SGD: dict[str, Any] = {"kind": "sgd"}
SMALL: dict[str, Any] = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 4, "groups": 4}


def run(*, model: dict[str, Any] | None = None, image_size: int = 256, **train: Any) -> RunConfig:
    """The paper's network in bf16, with everything left to the device."""
    train = {"global_batch_size": 32, "micro_batch": "auto", "precision": "bf16", "group_norm": "fused", **train}
    network = {"width": 256, "checkpointing": "auto", **(model or {})}
    data, task = {"path": "x", "image_size": image_size}, {"kind": "denoise"}
    return RunConfig.model_validate({"data": data, "task": task, "train": train, "model": network})


def task_of(cfg: RunConfig) -> Task:
    return build_task(cfg, SPECS["phantom-chest"])


def fitted(cfg: RunConfig, parallel: Parallel, **more: Any) -> Fitted:
    return fit_to_device(cfg, task_of(cfg), parallel, steps=10**6, **more)


def test_the_paper_s_network_fits_24_gb_at_batch_4_and_140_gb_at_batch_32(parallel: Parallel) -> None:
    found = fitted(run(), parallel, room=24 * GB)
    assert found.micro_batch == 4
    assert found.predicted_gib is not None
    assert found.predicted_gib * GIB < 24 * GB
    found = fitted(run(), parallel, room=140 * GB)
    assert (found.micro_batch, found.checkpointing) == (32, False)


def test_three_separate_norms_need_what_the_roofline_says_for_batch_32() -> None:
    """About 98 GB (the page of peers), of which 11 are weights, gradients, moments and average.

    That is with everything in 16 bits; softmaxes of linear attention are kept in fp32 too.
    """
    cfg = run(group_norm="native", model={"checkpointing": False}, micro_batch=32)
    needed = Memory(cfg, task_of(cfg), "cuda", "bf16").process_bytes(cfg, 32)
    softmaxes = 32 * 4 * 2 * 128 * 2 * sum(side**2 for side in (256, 128, 64))
    assert needed == pytest.approx(98 * GB + softmaxes, rel=0.08)


def test_levels_are_recomputed_where_one_image_does_not_fit_otherwise(parallel: Parallel) -> None:
    cfg = run(global_batch_size=2)
    plain = memory_gib(
        run(global_batch_size=2, model={"checkpointing": False}), task_of(cfg), device="cuda", micro_batch=1
    )
    found = fitted(cfg, parallel, room=int(0.98 * plain * GIB / device_fit.USABLE))
    assert found.checkpointing is not False
    with pytest.raises(ResourceError, match=r"no micro-batch fits the 9\.3 GiB of this device; use a smaller model"):
        fitted(cfg, parallel, room=10 * GB)


def test_what_does_not_really_fit_is_followed_by_the_next_best(parallel: Parallel) -> None:
    tried: list[tuple[int | None, Any]] = []

    def probe(cfg: RunConfig) -> bool:
        tried.append((cfg.train.given_micro_batch, cfg.model.checkpointing))
        return cfg.train.given_micro_batch is not None and cfg.train.given_micro_batch <= 8

    cfg = run(model=SMALL, image_size=32)
    found = fitted(cfg, parallel, room=140 * GB, probe=probe)
    assert found.micro_batch == 8
    assert tried[0] == (32, False)
    assert tried[-1] == (8, found.checkpointing)
    with pytest.raises(ResourceError, match="were tried"):
        fitted(cfg, parallel, room=140 * GB, probe=lambda cfg: False)


def test_the_step_that_is_tried_is_a_real_one(parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run(model=SMALL, global_batch_size=2, image_size=16)
    cfg = fitted(asked, parallel, room=GB).applied(asked)
    step = device_fit._Step(task_of(cfg), parallel, "bf16")
    assert step(cfg)
    build = device_fit.build_model

    def without_memory(*arguments: Any, **more: Any) -> torch.nn.Module:
        model = build(*arguments, **more)
        model.register_forward_hook(lambda *unused: torch.empty(2**50))  # what no device has
        return model

    monkeypatch.setattr(device_fit, "build_model", without_memory)
    assert not step(cfg)


def test_what_the_run_file_says_is_kept(parallel: Parallel) -> None:
    cfg = run(model={"checkpointing": (True, False, False, True)}, micro_batch=2, compile=False)
    found = fitted(cfg, parallel, room=GB, probe=lambda cfg: False)
    assert found.applied(cfg) == cfg
    assert found.predicted_gib is None, "nothing was to be chosen"


def test_a_resumed_run_takes_what_was_chosen(parallel: Parallel) -> None:
    asked = run(model=SMALL, image_size=32)
    found = fitted(asked, parallel, room=16 * GB)
    assert Fitted.of(json.loads(json.dumps(found.facts()))) == found
    here = found.applied(asked)
    assert here.train.micro_batch == found.micro_batch
    assert here.train.precision == "bf16"


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"exactness": "exact"}, "train.exactness=exact"),
        ({"gradient": "sum"}, "train.gradient=sum"),
        ({"epoch_boundary": "epoch"}, "train.epoch_boundary=epoch"),
    ],
)
def test_a_micro_batch_that_changes_what_is_computed_is_not_left_to_the_device(train: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"micro_batch=auto would change what {named}"):
        run(compile=False, **train)


def test_auto_means_what_was_chosen_while_a_run_trains_and_not_after(parallel: Parallel) -> None:
    with parallel.training_in("bf16"):
        assert parallel.dtype("auto") == torch.bfloat16
        assert parallel.dtype("fp32") is None
    assert parallel.dtype("auto") is None


@pytest.mark.parametrize(
    ("train", "optim", "world", "zero", "copies"),
    [
        ({}, {}, 1, 0, 5),  # weights, gradient, two moments, average
        ({"ema": None}, SGD, 1, 0, 2),
        ({}, {}, 8, 1, 1 + 1 + 1 + 3 / 8),
        ({}, {}, 8, 2, 1 + 1 + 1 / 8 + 3 / 8),
        # 8 leaves: sums of 8, 4, 2, 1, 1
        ({"exactness": "exact", "micro_batch": 1, "global_batch_size": 16}, {}, 2, 0, 5 + 5),
    ],
)
def test_copies_of_the_weights(
    train: dict[str, Any], optim: dict[str, Any], world: int, zero: int, copies: float
) -> None:
    assert copies_of_weights(config(train=train, optim=optim), world=world, zero=zero) == pytest.approx(copies)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"task": {"kind": "landmarks"}},
        {"task": {"kind": "landmarks", "timestep": 3}},
        {"task": {"kind": "landmarks"}, "optim": {"freeze": "trunk"}},
    ],
)
def test_only_what_learns_has_a_gradient_moments_and_an_average(sections: dict[str, Any]) -> None:
    cfg = config(**sections, model=SMALL)
    task = task_of(cfg)
    state = TrainState.fresh(cfg, task.wrap(build_model(cfg.model, out_channels=task.out_channels)))
    learning = sum(p.nbytes for group in state.optimizer.param_groups for p in group["params"])
    plain = config(**sections | {"train": {"ema": None}}, model=SMALL)
    kept, less = (Memory(each, task, "cpu", "fp32").process_bytes(each, 2) for each in (cfg, plain))
    assert kept - less == learning, "an average more"


@pytest.mark.parametrize("kind", ["gu2net", "encoder_unet"])
def test_every_kind_of_network_has_a_forecast(kind: str) -> None:
    cfg = config(data={"image_size": 64}, task={"kind": "landmarks"}, model={"kind": kind})
    one, two = (memory_gib(cfg, task_of(cfg), device="cpu", micro_batch=size) for size in (1, 2))
    assert 0 < one < two


def test_an_encoder_under_its_head_has_a_forecast_by_its_views() -> None:
    fields = {
        "data": {"path": "x", "image_size": 64},
        "model": {"kind": "encoder_unet"},
        "train": {"global_batch_size": 4},
    }
    two, ten = (RunConfig.model_validate(fields | {"task": {"kind": kind}}) for kind in ("mocov3", "dino"))
    assert memory_gib(two, task_of(two), device="cpu", micro_batch=2) > 0
    assert memory_gib(two, task_of(two), device="cpu", micro_batch=2) < memory_gib(
        ten, task_of(ten), device="cpu", micro_batch=2
    )


def test_recomputing_levels_takes_less_memory() -> None:
    network = {"width": 32, "multipliers": [1, 2]}
    needed = []
    for levels in (False, [True, False], True):
        cfg = run(model=network | {"checkpointing": levels}, image_size=128, micro_batch=8)
        needed.append(memory_gib(cfg, task_of(cfg), device="cuda", micro_batch=8))
    assert needed == sorted(needed, reverse=True)
    assert needed[2] < 0.95 * needed[0]


def test_every_way_to_say_that_memory_is_out() -> None:
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError(), cpu)))
    assert not any(map(is_out_of_memory, (RuntimeError("shape mismatch"), None)))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
