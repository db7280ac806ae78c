"""Samples of the long proofs: a run and a sweep that are killed at random end as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import signals, soak, sweep_soak
from tests.faults.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_killed_at_random_on_other_numbers_of_processes_has_the_same_digests(tmp_path: Path) -> None:
    result = soak.soak(tmp_path, kills=4, worlds=[1, 2], seed=3, steps=80)
    assert result["kills"] >= 4
    assert result["equal"], (result["sha256"], result["sha256_undisturbed"])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_killed_at_random_has_the_same_tables_and_runs_no_finished_cell_again(tmp_path: Path) -> None:
    result = sweep_soak.soak(tmp_path, kills=3, seed=1, shots=(1, 2), seeds=(0, 1), steps=30)
    assert result["equal"]
    assert result["times_finished_max"] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_every_request_and_every_loss_is_answered(tmp_path: Path) -> None:
    result = signals.campaign(tmp_path, targets=("launcher", "rank"), phases=("start", "evaluate"))
    assert all(stop["is_right"] for stop in result["stops"]), json.dumps(result, indent=1)


def test_the_recorded_soaks_are_of_equal_digests() -> None:
    run, sweep = (json.loads((RESULTS / name).read_text()) for name in ("soak.json", "soak_sweep.json"))
    assert run["equal"]
    assert run["kills"] >= 30
    assert set(run["starts_by_processes"]) == {"1", "2", "4"}
    assert run["sha256"] == run["sha256_undisturbed"]
    assert sweep["equal"]
    assert (sweep["cells"], sweep["kills"], sweep["times_finished_max"]) == (9, 10, 1)


def test_the_recorded_campaign_of_signals_kept_its_limits() -> None:
    result = json.loads((RESULTS / "faults_signals.json").read_text())
    assert result["all_within_limits"]
    assert {stop["during"] for stop in result["stops"]} == {"start", "step", "save", "evaluate"}
    assert all(stop["is_right"] and stop["seconds"] <= result["limits_s"]["stop"] for stop in result["stops"])
