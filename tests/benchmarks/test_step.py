"""`bench device` and `bench step`, on a network so small that they take seconds."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import _subject
import _tables
import pytest
import step
import torch

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
