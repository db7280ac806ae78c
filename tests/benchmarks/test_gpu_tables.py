"""The page about the GPU: empty where nothing was measured, and verdicts from what was."""

from __future__ import annotations

import json
from pathlib import Path

import _gpu_tables as gpu

from ddpm_lmk.bench import Result


def cells(table: str, begin: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def on_cuda(result: Result, folder: Path, label: str) -> None:
    """Written as if it came home from a GPU."""
    path = result.write(folder, label)
    facts = json.loads(path.read_text())
    facts["hardware"] |= {"device": "cuda", "device_name": "NVIDIA H200"}
    path.write_text(json.dumps(facts))


def step(preset: str, folder: Path, steady: float, *, compiled: bool = False) -> None:
    settings = {"name": preset, "data": {"image_size": 256}}
    result = Result("step", settings={**settings, "model": {"checkpointing": False}, "train": {"compile": compiled}})
    samples = {"images_per_s": [steady], "images_per_cpu_s": [1.0]}
    figures = {"cold_images_per_s": 1.1 * steady, "steady_images_per_s": steady, "peak_memory_gib": 98.0}
    result.add("sustained training", samples, figures=figures)
    on_cuda(result, folder, f"{preset}-{'compiled' if compiled else 'eager'}")


def test_cells_of_the_gpu_are_empty_until_it_has_run(tmp_path: Path) -> None:
    assert cells(gpu.wanted_table(tmp_path), "`paper`")[1:] == ["40", "", "not measured"]
    assert cells(gpu.peaks_table(tmp_path), "matrix")[1:] == ["", "790.0", "989.0", ""]
    paper = cells(gpu.rates_table(tmp_path), "`paper` ")
    assert paper[1:] == ["10.48", "75 (68)", *[""] * 5], "the roofline is that of 790 TFLOP/s until a peak is measured"
    assert cells(gpu.rates_table(tmp_path), "MLPerf")[4] == "129.0 (39.5 %)"
    assert gpu.wanted_table(tmp_path).startswith("Nothing of this project has run on a GPU yet.")


def test_verdicts_and_shares_follow_from_what_was_measured(tmp_path: Path) -> None:
    step("paper", tmp_path, 41.0)
    step("base", tmp_path, 700.0)
    step("base", tmp_path, 1000.0, compiled=True)
    peaks = Result("device", settings={})
    peaks.add("matrix product", {"gflop_per_s": [800e3]}, conditions={"precision": "bf16"})
    peaks.add("copy", {"gbyte_per_s": [4300.0]})
    on_cuda(peaks, tmp_path, "base")
    peers = Result("peers", settings={})
    bounds = {"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9, "reason": ""}
    ahead = {"group": "matched", "first": "ours", "second": "monai", "of": "a step", **bounds}
    level = {**ahead, "second": "diffusers", "ratio": None, "ratio_high": 1.1, "reason": "not distinguishable"}
    peers.ratios = [ahead, level]
    on_cuda(peers, tmp_path, "width128")
    train = Result("train", settings={"runtime": {"loader": "dali"}})
    train.add("training", {"images_per_s": [1.0]}, figures={"data_wait_share_pct": 3.0})
    on_cuda(train, tmp_path, "base")

    wanted = gpu.wanted_table(tmp_path)
    assert cells(wanted, "`paper`")[1:] == ["40", "41.0", "yes"]
    assert cells(wanted, "the same")[2] == f"{100 * 41 * 10.482778e12 / 800e12:.1f}"
    assert cells(wanted, "`base`, eager")[3] == "yes", "the faster of eager and compiled counts"
    assert cells(wanted, "a step over")[2].startswith("diffusers: not distinguishable")
    assert cells(wanted, "a step over")[3] == "**no**"
    assert cells(wanted, "`base` in a run, waiting for data (torch)")[3] == "not measured"
    assert cells(wanted, "`base` in a run, waiting for data (dali)")[2:] == ["3.00", "**no**"]
    rates = gpu.rates_table(tmp_path)
    ideal = 800e12 / 0.380888e12
    assert cells(rates, "`base` ")[3:5] == [f"770.0 ({77e3 / ideal:.1f} %)", f"700.0 ({70e3 / ideal:.1f} %)"]
    assert cells(rates, "`base`, compiled")[4].startswith("1,000.0 (")
    assert wanted.startswith("NVIDIA H200, ")


def test_a_newer_result_that_had_no_time_for_it_does_not_hide_an_older_one(tmp_path: Path) -> None:
    step("paper", tmp_path, 41.0)
    train = Result("train", settings={"runtime": {"loader": "torch"}})
    train.add("training", {"images_per_s": [1.0]}, figures={"data_wait_share_pct": 1.0})
    on_cuda(train, tmp_path, "whole")
    settings = {"name": "paper", "data": {"image_size": 256}, "train": {"compile": False}}
    on_cuda(Result("step", settings={**settings, "model": {"checkpointing": False}}), tmp_path, "paper-short")
    on_cuda(Result("train", settings={"runtime": {"loader": "torch"}}), tmp_path, "short")
    for path in tmp_path.glob("*short*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"date": "2999-01-01T00:00:00+00:00"}))
    wanted = gpu.wanted_table(tmp_path)
    assert cells(wanted, "`paper`")[1:] == ["40", "41.0", "yes"]
    assert cells(wanted, "`base` in a run, waiting for data (torch)")[2:] == ["1.00", "yes"]


def test_items_of_both_machines_stand_beside_each_other(tmp_path: Path) -> None:
    for device, seconds in (("cpu", 20.0), ("cuda", 8.0)):
        row = {"item": "doctor", "call": 1, "estimated_s": 5, "outcome": "passed", "seconds": seconds}
        calls = {"1": {"wall_s": 30, "brought": ["logs/doctor.log"]}}
        report = {"calls": calls, "rows": [row], "hardware": {"cpu": "AMD", "cores": 2}, "date": "2026-11-30"}
        (tmp_path / f"gpu_queue-{device}.json").write_text(json.dumps(report))
    table = gpu.calls_table(tmp_path)
    assert cells(table, "1 | doctor") == ["1", "doctor", "5", "8.0", "passed", "20.0", "passed"]
    assert "H200: call 1 30 s, 1 files home" in table
