"""What the demo says of its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk import demo as demos
from ddpm_lmk.demo import Demo
from ddpm_lmk.launcher import Placement
from ddpm_lmk.sweep.forecast import SweepForecast
from ddpm_lmk.system.shipped import shipped


def test_where_a_stage_cannot_be_timed_the_demo_says_so_and_nothing_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demos, "forecast_run", lambda *run, **how: "too slow")
    monkeypatch.setattr(demos, "forecast_sweep", lambda sweep, device, **how: SweepForecast(sweep, 1, device))
    demo = Demo.load(tmp_path, Placement("cpu", 1), shipped("configs") / "demo")
    demo.measure()

    assert str(demo) == "more than 10 s here: 10 s of the report (from steps timed here; not all of them: too slow)"
    assert demo.whole("pre-training") is None
    demo.print_status("2/4 pre-training", "pre-training")
    assert capsys.readouterr().err == "2/4 pre-training\n"
