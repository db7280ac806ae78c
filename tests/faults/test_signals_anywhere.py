"""Every command ends when it is asked to, whenever that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import signals_anywhere
from tests.faults.harness import ROOT

RECORDED = ROOT / "benchmarks" / "results" / "signals_anywhere.json"


@pytest.mark.slow
@pytest.mark.distributed
def test_commands_asked_to_stop_at_random_moments_are_gone_in_time(tmp_path: Path) -> None:
    only = ("pack", "pretrain", "predict", "sweep", "wait for other nodes to join", "wait for a server")
    result = signals_anywhere.campaign(tmp_path, signals=12, seed=11, only=only)
    assert [row for row in result["rows"] if not row["is_right"]] == []


def test_the_recorded_soak_met_every_command_and_left_nothing_behind() -> None:
    found = json.loads(RECORDED.read_text())
    assert found["all_right"]
    assert found["signals"] >= 60
    assert found["seconds_max"] <= found["limit_s"] == 25
    assert {row["signal"] for row in found["rows"]} == {"SIGINT", "SIGTERM"}
    assert sum(row["left"] for row in found["rows"]) == 0
    assert found["ends"]["stopped"] > found["signals"] / 2
