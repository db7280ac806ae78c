"""A forecast finds the factors that results were made with, and predicts what the same factors give elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.forecast import find_forecast, fit
from ddpm_lmk.measure import Result, read_results
from ddpm_lmk.models.cost import level_costs
from ddpm_lmk.tasks import DenoiseTask
from ddpm_lmk.tasks.task import Task

PEAK, BANDWIDTH, SECOND_THREAD = 1e11, 2e10, 1.2  # with two threads 1.2 times of each
TIMES = (1.25, 20.0, 40.0)
OTHER = 1.1  # of the levels' sum: what a step does beside them
UPDATE_S_PER_BYTE = 1e-9


def run(**model: object) -> RunConfig:
    base = {"width": 16, "multipliers": [1, 2, 4], "patch": 2, "head_dim": 8, **model}
    return RunConfig.model_validate(
        {
            "data": {"path": ".", "image_size": 64},
            "task": {"kind": "denoise"},
            "model": base,
            "train": {"group_size": 8},
        }
    )


def task(cfg: RunConfig) -> Task:
    assert cfg.task.kind == "denoise"
    return DenoiseTask(cfg.task, seed=0)


def true_s(cfg: RunConfig, images: int, *, slower: float = 1.0) -> tuple[dict[str, float], float]:
    """Seconds of every level, and of the whole step, on a machine that keeps to the model exactly."""
    levels = level_costs(cfg.model, cfg.data.image_size, 1)
    seconds = {
        name: slower
        * (
            TIMES[0] * cost.flops_train * images / PEAK
            + TIMES[1] * cost.kept_bytes * images / BANDWIDTH
            + TIMES[2] * cost.weight_bytes / BANDWIDTH
        )
        for name, cost in levels.items()
    }
    update = slower * UPDATE_S_PER_BYTE * sum(cost.weight_bytes for cost in levels.values())
    return seconds, OTHER * sum(seconds.values()) + update


def write_results(folder: Path, cfg: RunConfig, *, precision: str = "fp32", images: int = 8) -> None:
    """What `bench device` and `bench step` would have measured on that machine."""
    device = Result("device", settings={})
    for threads, more in ((1, 1.0), (2, SECOND_THREAD)):
        conditions = {"precision": precision, "side": 1024, "threads": threads}
        device.add("matrix product", {"gflop_per_s": [PEAK * more / 1e9] * 6}, conditions=conditions)
        device.add("triad", {"gbyte_per_s": [BANDWIDTH * more / 1e9] * 6}, conditions={"threads": threads})
    device.write(folder, "made")
    step = Result("step", settings=cfg.model_dump(mode="json"))
    levels, whole = true_s(cfg, images)
    conditions = {"batch_images": images, "precision": precision, "threads": 1}
    for name, seconds in levels.items():
        step.add(f"level {name}", {"cpu_s": [seconds] * 6}, conditions=conditions)
    step.add("update", {"cpu_s": [whole - OTHER * sum(levels.values())] * 6}, conditions=conditions)
    step.add("train step", {"cpu_s": [whole] * 6}, conditions=conditions)
    step.write(folder, "made")


def test_the_factors_behind_a_result_are_found(tmp_path: Path) -> None:
    write_results(tmp_path, run())

    [step], [device] = read_results(tmp_path, "step"), read_results(tmp_path, "device")
    assert fit(step, device).times == pytest.approx(TIMES, rel=1e-2)


@pytest.mark.parametrize("model", [{"width": 32}, {"multipliers": [1, 2]}, {"linear_attention": False}])
def test_another_network_and_batch_are_predicted(model: dict[str, object], tmp_path: Path) -> None:
    write_results(tmp_path, run())
    forecast = find_forecast("cpu", "fp32", [tmp_path])
    assert forecast is not None

    cfg = run(**model)
    assert forecast.step_s(cfg, task(cfg), images=3) == pytest.approx(true_s(cfg, 3)[1], rel=1e-2)


def test_two_processes_share_the_rates_of_two_threads(tmp_path: Path) -> None:
    write_results(tmp_path, run())
    forecast = find_forecast("cpu", "fp32", [tmp_path])
    assert forecast is not None

    cfg = run()
    expected = true_s(cfg, 4, slower=2 / SECOND_THREAD)[1]
    assert forecast.step_s(cfg, task(cfg), images=4, processes=2, threads=1) == pytest.approx(expected, rel=1e-2)


def test_micro_batches_pay_for_the_weights_once_each(tmp_path: Path) -> None:
    write_results(tmp_path, run())
    forecast = find_forecast("cpu", "fp32", [tmp_path])
    assert forecast is not None
    cfg = run()
    split = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": 2})})

    assert forecast.step_s(split, task(cfg), images=8) > forecast.step_s(cfg, task(cfg), images=8)


def test_without_results_of_this_precision_there_is_no_forecast(tmp_path: Path) -> None:
    write_results(tmp_path, run(), precision="bf16")

    assert find_forecast("cpu", "fp32", [tmp_path]) is None
    assert find_forecast("cpu", "bf16", [tmp_path / "nowhere", tmp_path]) is not None
