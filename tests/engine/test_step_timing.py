"""Steps are timed as the run does them, within a budget, and leave nothing behind in the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk import run as runs
from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.forecast import (
    Timing,
    random_batch,
    repeated,
    time_steps,
)
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.launcher import Placement
from ddpm_lmk.launcher.time_runs import NO_DEVICE, TOO_SLOW, _together, spec_of, time_apart, time_run
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.system import heartbeat
from ddpm_lmk.tasks import build_task
from tests.engine.test_forecast import run


def test_as_many_images_as_there_is_time_for_are_timed_three_times() -> None:
    calls: list[int] = []

    def call(images: int) -> float:
        calls.append(images)
        return 0.1 * images

    assert repeated(call, [1, 4, 8, 1000], budget_s=4.0) == (8, pytest.approx([0.8] * 3))
    assert calls == [1, 1, 4, 4, 8, 8, 8, 8]


def test_a_first_call_does_not_count_unless_it_takes_all_the_time_there_is() -> None:
    slow_first = iter([5.0, 1.0, 1.0, 1.0])
    assert repeated(lambda images: next(slow_first), [1], budget_s=4.0) == (1, [1.0, 1.0, 1.0])
    endless = iter([60.0])
    assert repeated(lambda images: next(endless), [1, 8], budget_s=4.0) == (1, [60.0])


def test_the_seconds_of_a_compilation_never_count() -> None:
    slow_first = iter([60.0, 1.0, 1.0, 1.0])
    assert repeated(lambda images: next(slow_first), [1], budget_s=4.0, is_compiled=True) == (1, [1.0, 1.0, 1.0])


def test_a_network_that_is_compiled_is_timed_at_the_sizes_of_the_run_alone(
    packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def watched(call: Callable[[int], float], sizes: Sequence[int], budget_s: float, **how: bool) -> Any:
        asked.append(tuple(sizes))
        assert how == {"is_compiled": True}
        return repeated(call, sizes, budget_s, **how)

    monkeypatch.setattr("ddpm_lmk.engine.forecast.repeated", watched)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    cfg = run(packed_phantoms, train={"compile": True}, evaluate={"batch": 2})
    time_steps(cfg, build_task(cfg, spec_of(cfg)), Parallel("cpu"), precision="fp32", session=Session())

    assert asked == [(4,), (2,)]  # steps, scores


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_seconds_are_shared_out_over_images_and_an_update(packed_phantoms: Path, micro_batch: int | None) -> None:
    cfg = run(packed_phantoms, train={"micro_batch": micro_batch})
    task, ticks = build_task(cfg, spec_of(cfg)), itertools.count()

    found = time_steps(
        cfg,
        task,
        Parallel("cpu"),
        precision="fp32",
        session=Session(),
        budget_s=1000.0,
        clock=lambda: float(next(ticks)),
    )
    # Every look at the clock is a second: passes of four images take one, the update one, a score of 16 one.
    assert (found.image_s, found.update_s) == (1 / 4, 1.0)
    assert found.score_s == 1 / 16
    assert (found.images, found.of, found.steps) == (4, 4, 3)
    assert found.draw_s == found.validate_s == 0.0


def test_a_step_that_does_not_fit_is_told_as_in_training(
    packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*unused: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cfg = run(packed_phantoms)
    task = build_task(cfg, spec_of(cfg))
    monkeypatch.setattr(task, "loss", fails)
    with pytest.raises(ResourceError, match=r"out of memory in step 1: train\.micro_batch=4"):
        time_steps(cfg, task, Parallel("cpu"), precision="fp32", session=Session())


def test_a_sample_takes_as_many_passes_as_it_is_drawn_in(packed_phantoms: Path) -> None:
    cfg = run(packed_phantoms, "denoise", evaluate={"samples": 3, "batch": 2})
    task, ticks = build_task(cfg, spec_of(cfg)), itertools.count()
    clock = {"budget_s": 1000.0, "clock": lambda: float(next(ticks))}

    pulse = heartbeat.start_own_heartbeats()
    found = time_steps(cfg, task, Parallel("cpu"), precision="fp32", session=Session(), **clock)  # type: ignore[arg-type]
    heartbeat.stop_heartbeats()
    assert found.draw_s == 50 / 2
    assert set(pulse._intervals) == {"setup"}  # the run's own samples, of more images, may take longer


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("landmarks", {}),
        ("simclrv2", {"kind": "encoder_unet", "scale": 0.1, "blocks": [1, 1, 1, 1], "decoder": [8, 8, 8, 8, 8]}),
    ],
)
def test_a_run_that_was_timed_ends_with_the_weights_of_one_that_was_not(
    kind: str, model: dict[str, object], packed_phantoms: Path, tmp_path: Path
) -> None:
    fields = run(packed_phantoms).model_dump(mode="json")
    fields |= {"task": {"kind": kind}, "train": {"length": "3 steps", "group_size": 4}}
    fields |= {"model": {**model, "in_channels": 1}} if model else {}
    cfg = RunConfig.model_validate(fields)
    runs.execute(cfg, tmp_path / "plain", device="cpu")
    runs.execute(cfg, tmp_path / "timed", device="cpu", is_foretold=True)

    plain, timed = (load_weights(tmp_path / name, "model")[0] for name in ("plain", "timed"))
    assert plain.keys() == timed.keys()
    assert all(torch.equal(plain[name], timed[name]) for name in plain)


def test_processes_side_by_side_each_time_their_share(packed_phantoms: Path) -> None:
    cfg = run(packed_phantoms, evaluate={"split": None})

    found = time_run(cfg, spec_of(cfg), Placement("cpu", 2), budget_s=0.1)
    assert not isinstance(found, str)
    assert (found.of, found.processes) == (2, 2)
    assert found.image_s > 0
    assert found.start_s > 0


def test_nothing_is_known_of_a_run_that_one_of_its_processes_could_not_time() -> None:
    facts = asdict(Timing(0.5, 0.1, images=4, of=4, steps=3))

    assert _together([facts, facts], 0.0) == Timing(**facts)
    assert _together([facts, TOO_SLOW], 0.0) == TOO_SLOW


def test_where_the_device_is_not_here_nothing_is_known(packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_lmk.launcher.time_runs.visible_gpus", lambda: 0)
    cfg = run(packed_phantoms)

    assert time_apart([cfg, cfg], processes=1, device="cuda", specs=[spec_of(cfg)] * 2) == [NO_DEVICE, NO_DEVICE]
    assert time_run(cfg, spec_of(cfg), Placement("cuda", 1)) == NO_DEVICE


def test_random_points_lie_in_the_picture(packed_phantoms: Path) -> None:
    cfg = run(packed_phantoms)
    batch = random_batch(cfg, build_task(cfg, spec_of(cfg)), 3)

    assert batch.points is not None
    assert len(batch) == 3
    assert ((batch.points >= 0) & (batch.points < 32)).all()
