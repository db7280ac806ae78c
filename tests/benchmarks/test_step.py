"""`bench device` and `bench step`, on a network so small that they take seconds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import _subject
import _tables
import pytest
import step
import torch

from ddpm_lmk.bench import Budget, Result, read_results
from ddpm_lmk.errors import ConfigError, LaunchError, ResourceError
from tests.benchmarks.scripts import SMOKE, run_benchmark


def test_device_has_rates_of_products_memory_and_the_shapes_of_the_network(tmp_path: Path) -> None:
    found = run_benchmark("device", tmp_path, "--run", SMOKE / "pretrain.yaml", "--rounds", 6, "--device", "cpu")

    rates = {(row.what, row.conditions.get("precision"), row.conditions.get("threads")): row for row in found.rows}
    fp32 = rates["matrix product", "fp32", 1]
    assert fp32.samples["gflop_per_s"] == pytest.approx(
        [2 * 1024**3 / s / 1e9 for s in fp32.samples["cpu_s"]], rel=1e-4
    )
    assert median(rates["triad", None, 1].samples["gbyte_per_s"]) > 0
    shapes = [row for row in found.rows if row.what == "convolution forward"]
    assert shapes
    assert sum(row.figures["times_in_network"] for row in shapes) > len(shapes)
    assert found.path.with_suffix(".png").is_file()


def test_step_has_its_parts_its_operations_and_memory_beside_the_estimate(tmp_path: Path) -> None:
    found = run_benchmark("step", tmp_path, "--run", SMOKE / "pretrain.yaml", "--rounds", 6, "--device", "cpu")

    rows = {row.what: row for row in found.rows}
    for part in ("forward", "forward and backward", "update", "train step"):
        assert len(rows[part].samples["cpu_s"]) == 6
    operations = {
        (row.conditions["level_px"], row.conditions["group"]): row for row in found.rows if row.what == "operations"
    }
    largest = max(level for level, _ in operations)
    ways = [operations[largest, f"convolution, {way}"].figures["gflop"] for way in ("forward", "of data", "of weights")]
    assert ways[0] == ways[1] == ways[2] > 0
    assert {"norm, FiLM, SiLU", "time embedding", "sums and joins", "optimizer"} <= {group for _, group in operations}
    assert all(len(values) == 6 for row in operations.values() for values in row.samples.values())
    figures = rows["train step"].figures
    # counted by PyTorch and by `models.cost`
    counted = sum(row.figures["gflop"] for row in operations.values())
    assert counted == pytest.approx(figures["executed_gflop"], rel=0.05)
    assert "train step over the least" in {ratio["what"] for ratio in found.facts["ratios"]}
    assert "| linear attention |" in _tables.roofline_table(found.path)
    assert figures["share_of_measured_peak_pct"] > 0
    assert figures["estimate_over_measured"] == pytest.approx(
        figures["estimated_memory_gib"] / figures["peak_memory_gib"], rel=1e-3
    )


def test_a_part_that_fails_takes_nothing_with_it_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(step, "measure_memory", lambda options: (_subject.Subject(options), {}))
    monkeypatch.setattr(step, "measure_parts", fail)
    words = ["--run", str(SMOKE / "pretrain.yaml"), "--device", "cpu", "--sustained-s", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *words])
    with pytest.raises(RuntimeError, match="out of memory"):
        step.main()
    [found] = read_results(tmp_path, "step")
    assert [row.what for row in found.rows] == ["sustained training"]


def test_training_without_a_pause_takes_the_time_it_is_given_and_keeps_what_it_measured() -> None:
    """Steps of 10 s are played here, on the clock of a budget of 115 s, of which 104 s are for measuring."""
    now = [0.0]
    subject = SimpleNamespace(
        device="cpu",
        batch_images=2,
        conditions=dict,
        cost=SimpleNamespace(flops_train=3, flops_forward=1),
        cfg=SimpleNamespace(model=SimpleNamespace(kind="ddpm_unet")),
        step=lambda: now.__setitem__(0, now[0] + 10),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2))
        for wanted_s, count, left_out in ((45, 4, []), (1, 1, []), (200, 8, ["sustained training: 12 of 20 slices"])):
            now[0] = 0.0
            result = Result("step", settings={}, budget=Budget(115, clock=lambda: now[0]))
            step.measure_sustained(result, subject, argparse.Namespace(sustained_s=wanted_s), {})  # type: ignore[arg-type]
            [row] = result.rows
            assert row.samples == {"images_per_s": [0.2] * count, "images_per_cpu_s": [0.4] * count}
            assert row.figures["steady_images_per_s"] == 0.2
            assert result.budget.left_out == left_out


def test_what_a_user_can_mend_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        options = _subject.option_parser(None).parse_args(["--run", "nowhere.yaml"])
        _subject.run_config(options)

    with pytest.raises(SystemExit) as stopped:
        _subject.carried_out(missing)
    assert stopped.value.code == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("error[ConfigError]: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here_is_an_error() -> None:
    with pytest.raises(LaunchError, match="no CUDA device is visible"):
        _subject.device_of(argparse.Namespace(device="cuda"))


def test_the_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is played here: memory for 8 images."""
    tried: list[int] = []

    def measure(options: argparse.Namespace) -> dict[str, float]:
        tried.append(options.batch)
        if options.batch > 8:
            raise ResourceError("does not fit")
        return {"peak_memory_gib": 1.0}

    monkeypatch.setattr(step, "measure_memory", measure)
    options = argparse.Namespace(batch=32)
    assert step.halve_until_it_fits(options) == {"peak_memory_gib": 1.0}
    assert (tried, options.batch) == ([32, 16, 8], 8)
    monkeypatch.setattr(step, "measure_memory", lambda options: measure(argparse.Namespace(batch=9)))
    with pytest.raises(ResourceError):
        step.halve_until_it_fits(argparse.Namespace(batch=4))
