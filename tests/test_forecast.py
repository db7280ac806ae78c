"""A forecast finds the factors that results were made with, and predicts what the same factors give elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.forecast import Estimate, estimate_step
from ddpm_lmk.forecast.levels import fit
from ddpm_lmk.measure import Result, read_results
from ddpm_lmk.models.cost import level_costs
from ddpm_lmk.tasks import Task, build_task

PEAK, BANDWIDTH, SECOND_THREAD = 1e11, 2e10, 1.2  # with two threads 1.2 times of each
TIMES = (1.25, 20.0, 40.0)
OTHER = 1.1  # of the levels' sum: what a step does beside them
UPDATE_S_PER_BYTE = 1e-9


def run(precision: str = "fp32", *, size: int = 64, **model: object) -> RunConfig:
    base = {"width": 16, "multipliers": [1, 2, 4], "patch": 2, "head_dim": 8, **model}
    return RunConfig.model_validate(
        {
            "name": "known",
            "data": {"path": ".", "image_size": size},
            "task": {"kind": "denoise"},
            "model": base,
            "train": {"group_size": 8, "precision": precision},
        }
    )


def other(size: int = 64) -> RunConfig:
    """A network whose levels are not counted."""
    model = {"kind": "encoder_unet", "scale": 0.1, "blocks": [1, 1, 1, 1], "decoder": [8, 8, 8, 8, 8], "in_channels": 1}
    data, learnt = {"path": ".", "image_size": size}, {"kind": "landmarks", "timestep": None}
    train = {"group_size": 8, "precision": "fp32"}
    return RunConfig.model_validate({"name": "other", "data": data, "task": learnt, "model": model, "train": train})


def task(cfg: RunConfig) -> Task:
    return build_task(cfg, SPECS["cephalometric"])


def true_s(cfg: RunConfig, images: int, *, slower: float = 1.0, faster: float = 1.0) -> tuple[dict[str, float], float]:
    """Seconds of every level, and of the whole step, on a machine that keeps to the model exactly."""
    levels = level_costs(cfg.model, cfg.data.image_size, 1)
    seconds = {
        name: slower
        * (
            TIMES[0] * cost.flops_train * images / PEAK / faster
            + TIMES[1] * cost.kept_bytes * images / BANDWIDTH
            + TIMES[2] * cost.weight_bytes / BANDWIDTH
        )
        for name, cost in levels.items()
    }
    update = slower * UPDATE_S_PER_BYTE * sum(cost.weight_bytes for cost in levels.values())
    return seconds, OTHER * sum(seconds.values()) + update


def write_device(folder: Path, **faster: float) -> None:
    """What `bench device` would have measured on that machine; `faster`: arithmetic, by precision."""
    device = Result("device", settings={})
    for threads, more in ((1, 1.0), (2, SECOND_THREAD)):
        for precision, factor in faster.items():
            conditions = {"precision": precision, "side": 1024, "threads": threads}
            device.add("matrix product", {"gflop_per_s": [factor * PEAK * more / 1e9] * 6}, conditions=conditions)
        device.add("triad", {"gbyte_per_s": [BANDWIDTH * more / 1e9] * 6}, conditions={"threads": threads})
    device.write(folder, "made")


def write_step(folder: Path, cfg: RunConfig, *, images: int = 8, whole_s: float | None = None) -> None:
    """What `bench step` would have measured; a ddpm_unet with its levels, anything else took `whole_s`."""
    step, precision = Result("step", settings=cfg.model_dump(mode="json")), cfg.train.precision
    conditions = {"batch_images": images, "precision": precision, "threads": 1}
    levels, whole = ({}, whole_s) if whole_s is not None else true_s(cfg, images)
    for name, seconds in levels.items():
        step.add(f"level {name}", {"cpu_s": [seconds] * 6}, conditions=conditions)
    update_s = 0.1 * whole if whole_s is not None else whole - OTHER * sum(levels.values())
    cost = task(cfg).cost(cfg.model, cfg.data.image_size)
    step.add("update", {"cpu_s": [update_s] * 6}, conditions=conditions, figures={"parameters": cost.params})
    figures = {"executed_gflop": cost.flops_train * images / 1e9}
    step.add("train step", {"cpu_s": [whole] * 6}, conditions=conditions, figures=figures)
    step.write(folder, "made")


def write_results(folder: Path, cfg: RunConfig) -> None:
    """What both would have measured."""
    write_device(folder, **{cfg.train.precision: 1.0})
    write_step(folder, cfg)


def estimated(folder: Path, cfg: RunConfig, *, images: int = 8, processes: int = 1) -> Estimate:
    found = estimate_step(cfg, task(cfg), "cpu", images=images, processes=processes, threads=1, folders=[folder])
    assert found is not None
    return found


def test_the_factors_behind_a_result_are_found(tmp_path: Path) -> None:
    write_results(tmp_path, run())

    [step], [device] = read_results(tmp_path, "step"), read_results(tmp_path, "device")
    assert fit(step, device).times == pytest.approx(TIMES, rel=1e-2)


@pytest.mark.parametrize("model", [{"width": 32}, {"multipliers": [1, 2]}, {"linear_attention": False}])
def test_another_network_and_batch_are_predicted_by_levels(model: dict[str, object], tmp_path: Path) -> None:
    write_results(tmp_path, run())
    cfg = run(**model)

    found = estimated(tmp_path, cfg, images=3)
    assert found.how == "levels of known"
    assert found.step_s == pytest.approx(true_s(cfg, 3)[1], rel=1e-2)
    assert found.source.startswith("step-made-cpu-")


def test_a_network_that_was_measured_needs_no_model(tmp_path: Path) -> None:
    write_results(tmp_path, run())
    cfg = run(checkpointing=True)

    found = estimated(tmp_path, run(), images=8)
    assert found.how == "this network, measured"
    assert found.step_s == pytest.approx(true_s(run(), 8)[1], rel=1e-3)
    again = estimated(tmp_path, cfg, images=8)
    assert again.how == found.how
    assert 1.2 < again.step_s / found.step_s < 1.4  # what is recomputed is a forward pass of four


@pytest.mark.parametrize("model", [{}, {"width": 32}], ids=["measured", "by levels"])
def test_two_processes_share_the_rates_of_two_threads(model: dict[str, object], tmp_path: Path) -> None:
    write_results(tmp_path, run())
    cfg = run(**model)

    alone, shared = (estimated(tmp_path, cfg, images=4, processes=count).step_s for count in (1, 2))
    assert shared / alone == pytest.approx(2 / SECOND_THREAD, rel=0.02)


def test_micro_batches_pay_for_the_weights_once_each(tmp_path: Path) -> None:
    write_results(tmp_path, run())
    cfg = run(width=32)
    split = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": 2})})

    assert estimated(tmp_path, split).step_s > estimated(tmp_path, cfg).step_s


def test_another_precision_is_scaled_and_says_so(tmp_path: Path) -> None:
    write_device(tmp_path, fp32=1.0, bf16=2.5)
    write_step(tmp_path, run("fp32"))

    found = estimated(tmp_path, run("bf16"))
    assert found.how == "levels of known, scaled from fp32"
    assert found.trust == "such estimates were not checked"
    fp32 = true_s(run(), 8)[1]
    assert fp32 / 2.5 < found.step_s < fp32 / 1.5  # activations are half as large, weights are not
    write_step(tmp_path, run("bf16", width=8))
    assert estimated(tmp_path, run("bf16")).how == "levels of known"


def test_other_kinds_are_scaled_by_operations(tmp_path: Path) -> None:
    write_device(tmp_path, fp32=1.0)
    write_step(tmp_path, run())
    wanted = other()
    found = estimate_step(wanted, task(wanted), "cpu", images=8, threads=1, folders=[tmp_path])
    assert found is None, "levels of a ddpm_unet say nothing about other networks"

    write_step(tmp_path, other(), whole_s=2.0)
    measured, larger = estimated(tmp_path, other()), estimated(tmp_path, other(size=128))
    assert (measured.how, larger.how) == ("this network, measured", "operations of other")
    assert measured.step_s == pytest.approx(2.0)
    assert larger.step_s == pytest.approx(0.2 + 4 * 1.8, rel=1e-2)  # the update does not grow with the images


def test_without_rates_of_this_precision_there_is_no_estimate(tmp_path: Path) -> None:
    write_results(tmp_path, run("bf16"))
    cfg = run("fp16")

    assert estimate_step(cfg, task(cfg), "cpu", images=8, threads=1, folders=[tmp_path]) is None
    nowhere = [tmp_path / "nowhere", tmp_path]
    assert estimate_step(run("bf16"), task(cfg), "cpu", images=8, threads=1, folders=nowhere) is not None
