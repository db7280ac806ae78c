"""What `auto` becomes on devices of other sizes, and when the memory model is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine import device_fit, precision
from ddpm_lmk.engine.device_fit import Fitted, fit_to_device, process_bytes
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.models import model_cost

GB = 10**9


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def run(*, model: dict[str, Any] | None = None, image_size: int = 256, **train: Any) -> RunConfig:
    """The paper's network in bf16, with everything left to the device."""
    train = {"global_batch_size": 32, "micro_batch": "auto", "precision": "bf16", "group_norm": "fused", **train}
    network = {"width": 256, "checkpointing": "auto", **(model or {})}
    data, task = {"path": "x", "image_size": image_size}, {"kind": "denoise"}
    return RunConfig.model_validate({"data": data, "task": task, "train": train, "model": network})


def fitted(cfg: RunConfig, parallel: Parallel, **more: Any) -> Fitted:
    return fit_to_device(cfg, 1, parallel, steps=10**6, **more)


def test_the_paper_s_network_fits_24_gb_at_batch_4(parallel: Parallel) -> None:
    found = fitted(run(), parallel, room=24 * GB)
    assert found.micro_batch == 4
    assert found.predicted_gib is not None
    assert found.predicted_gib * 2**30 < 24 * GB


def test_the_paper_s_network_uses_140_gb_for_batch_32_in_one_go_and_recomputes_nothing(parallel: Parallel) -> None:
    found = fitted(run(), parallel, room=140 * GB)
    assert (found.micro_batch, found.checkpointing) == (32, False)


def test_three_separate_norms_need_what_the_roofline_says_for_batch_32(parallel: Parallel) -> None:
    """About 98 GB (the page of peers), of which 11 are weights, gradients, moments and average.

    That is with everything in 16 bits; softmaxes of linear attention are kept in fp32 too.
    """
    cfg = run(group_norm="native", model={"checkpointing": False})
    needed = process_bytes(cfg, model_cost(cfg.model, 256, 1), 32, device="cuda", is_half=True)
    softmaxes = 32 * 4 * 2 * 128 * 2 * sum(side**2 for side in (256, 128, 64))
    assert needed == pytest.approx(98 * GB + softmaxes, rel=0.06)


def test_levels_are_recomputed_from_the_first_where_one_image_does_not_fit(parallel: Parallel) -> None:
    found = [fitted(run(), parallel, room=room * GB) for room in (16.5, 16.0)]
    assert [each.micro_batch for each in found] == [1, 1]
    assert found[0].checkpointing in (False, (True, False, False, False))
    with pytest.raises(ResourceError, match=r"no micro-batch fits the 9\.3 GiB of this device; use a smaller model"):
        fitted(run(), parallel, room=10 * GB)


def test_what_does_not_fit_in_truth_is_followed_by_the_next_best(parallel: Parallel) -> None:
    tried: list[tuple[int | None, Any]] = []

    def probe(cfg: RunConfig) -> bool:
        tried.append((cfg.train.given_micro_batch, cfg.model.checkpointing))
        return cfg.train.given_micro_batch is not None and cfg.train.given_micro_batch <= 8

    found = fitted(run(), parallel, room=140 * GB, probe=probe)
    assert found.micro_batch == 8
    assert tried[0] == (32, False)
    assert tried[-1] == (8, found.checkpointing)
    with pytest.raises(ResourceError, match="were tried"):
        fitted(run(), parallel, room=140 * GB, probe=lambda cfg: False)


def test_the_step_that_is_tried_is_a_real_one(parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 4}
    asked = run(model=small, global_batch_size=2, image_size=16)
    cfg = fitted(asked, parallel, room=GB).applied(asked)
    step = device_fit._Step(1, parallel, "bf16")
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


def test_a_continued_run_takes_what_was_chosen(parallel: Parallel) -> None:
    found = fitted(run(), parallel, room=16 * GB)
    assert Fitted.of(json.loads(json.dumps(found.facts()))) == found
    here = found.applied(run())
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


def test_precision_on_a_cpu_follows_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, exactness, width, wanted in (
        (True, "ordered", 32, "bf16"),
        (False, "ordered", 32, "fp32"),
        (True, "exact", 32, "fp32"),
        (True, "ordered", 8, "fp32"),
    ):
        monkeypatch.setattr(precision, "missing_bf16", lambda has=has: "" if has else "none here")
        cfg = run(
            model={"width": width, "multipliers": (1, 2), "pixel_unshuffle": 8, "checkpointing": False},
            precision="auto",
            micro_batch=4,
            compile=False,
            exactness=exactness,
        )
        assert precision.choose_precision(cfg, "cpu").name == wanted, (has, exactness, width)
        assert precision.choose_precision(cfg, "cuda").name == "bf16"


def test_auto_means_what_was_chosen_while_a_run_trains_and_not_after(parallel: Parallel) -> None:
    with parallel.training_in("bf16"):
        assert parallel.dtype("auto") == torch.bfloat16
        assert parallel.dtype("fp32") is None
    assert parallel.dtype("auto") is None
