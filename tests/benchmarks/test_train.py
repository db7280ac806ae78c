"""`bench train` and `bench scaling`: the engine takes turns with a loop by hand, and processes are explained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.benchmarks.scripts import SMOKE, run_benchmark

CPU = ("--device", "cpu", "--run", SMOKE / "pretrain.yaml")


def test_train_has_waiting_for_data_and_the_overhead_of_the_engine(packed_phantoms: Path, tmp_path: Path) -> None:
    found = run_benchmark("train", tmp_path, *CPU, "--steps", 9, f"data.path={packed_phantoms}")

    rows = {row.what: row for row in found.rows}
    assert len(rows["training"].samples["images_per_s"]) == 9
    assert 0 <= rows["training"].figures["data_wait_share_pct"] <= 100
    assert len(rows["engine step"].samples["cpu_s"]) >= 8
    assert len(rows["bare step"].samples["cpu_s"]) == 9
    [ratio] = found.facts["ratios"]
    assert ratio["what"] == "engine step over bare step"
    assert 0 < ratio["ratio_low"] <= ratio["ratio_high"]


@pytest.mark.distributed
@pytest.mark.slow
def test_scaling_explains_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SMOKE.parents[1]), os.environ.get("PYTHONPATH", "")]))
    found = run_benchmark("scaling", tmp_path, *CPU, "--processes", 2, "--rounds", 6)

    ways = {row.what for row in found.rows}
    assert {"alone", "side by side", "weak", "strong", "reduction", "triad alone", "product side by side"} <= ways
    ratios = {(ratio["what"], ratio["clock"]) for ratio in found.facts["ratios"]}
    assert ("weak scaling efficiency", "wall_s") in ratios
    assert ("strong scaling efficiency", "cpu_s") in ratios
