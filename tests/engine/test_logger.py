"""One remaining time, of all of a run: its steps, its validations, and what follows the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.engine import logger as meters
from ddpm_lmk.engine.forecast import Forecast
from ddpm_lmk.engine.gradients import StepOutcome
from ddpm_lmk.engine.logger import CompileClock, TrainLogger
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.console import Whole
from tests.engine.toy import config, fresh_state

FORECAST = Forecast(100, 2.0, 2, 30.0, 50.0, "from 3 steps timed here")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A meter over steps that take as long as they are told to."""

    def __init__(self, clock: Clock, place: Path, **more: Any) -> None:
        cfg, parallel = config(), Parallel("cpu")
        self.clock, self.state = clock, fresh_state(cfg)
        run = RunDir(place, writes=False)
        self.lines: list[dict[str, Any]] = []
        more = {"total": 100, "every": 1, **more}
        self.meter = TrainLogger(
            self.state, parallel, CompileClock(cfg, parallel, run), write=self.lines.append, **more
        )

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.state.step += 1
            self.meter.step(StepOutcome(1.0, 1.0, 0.0, 0.0), size=1, is_skipped=False, lr=1e-3)

    def pause(self, seconds: float, **kind: bool) -> None:
        with self.meter.paused(**kind):
            self.clock.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters.time, "perf_counter", clock)
    monkeypatch.setattr(meters.time, "monotonic", clock)
    return clock


@contextmanager
def said_by(run: Run, capfd: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """The plain lines of a block, once it is over."""
    said: list[str] = []
    capfd.readouterr()
    with run.meter:
        yield said
    said += capfd.readouterr().err.splitlines()


def test_before_the_first_step_the_forecast_counts_and_then_the_steps_that_were_taken(
    clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(clock, tmp_path, evaluate=50, forecast=FORECAST)
    with said_by(run, capfd) as said:
        assert run.meter._left_s() == 100 * 2 + 2 * 30 + 50
        run.steps(10, 4.0)
        assert run.meter._left_s() == 90 * 4 + 2 * 30 + 50
        run.steps(40, 1.0)  # the last ten lines count
        assert run.meter._left_s() == 50 * 1 + 1 * 30 + 50
        run.pause(10.0, validates=True)  # and the last validation
        assert run.meter._left_s() == 50 * 1 + 1 * 10 + 50
    assert "about 2 min left" in said[-1]
    assert "eta_s" not in said[-1]
    assert run.lines[-1]["eta_s"] == 50


def test_what_saving_takes_is_part_of_a_step(clock: Clock, tmp_path: Path) -> None:
    run = Run(clock, tmp_path)
    with run.meter:
        assert run.meter._left_s() is None
        run.pause(3.0)
        run.steps(1, 1.0)
        assert run.meter._left_s() == 99 * 4
        assert run.lines == [] or run.lines[0]["eta_s"] == 99  # the machine's line is of training only


def test_plain_lines_are_one_per_tenth_and_one_every_few_minutes(
    clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(clock, tmp_path)
    with said_by(run, capfd) as said:
        run.steps(29, 0.1)
        run.steps(5, 100.0)  # every second of these is more than three minutes after the line before
        run.steps(66, 0.1)
    steps = [int(line.split("/")[0].removeprefix("step=")) for line in said]
    assert steps == [1, 10, 20, 30, 32, 34, 40, 50, 60, 70, 80, 90, 100]
    assert len(run.lines) == 100


def test_the_last_validation_is_told_with_the_next_line(
    clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(clock, tmp_path, total=20)
    with said_by(run, capfd) as said:
        run.steps(1, 0.1)
        run.meter.validated({"loss": 0.5, "score": 0.25})
        run.steps(19, 0.1)
        run.meter.validated({"loss": 0.125})
    assert "validation" not in said[0]
    assert "validation_loss=0.5 validation_score=0.25" in said[1]
    assert "validation_loss=0.125" in said[-1]


def test_a_stage_tells_the_tenths_of_the_whole(clock: Clock, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(
        clock, tmp_path, forecast=replace(FORECAST, evaluations=0), whole=Whole("demo", began=clock.now, then_s=450.0)
    )
    with said_by(run, capfd) as said:
        run.steps(100, 5.0)  # and 50 + 450 s that follow
    assert said == [
        f"demo: {tenth} %, step={step}/100, {left}"
        for tenth, step, left in (
            (10, 20, "about 15 min left"),
            (20, 40, "about 13 min left"),
            (30, 60, "about 12 min left"),
            (40, 80, "about 10 min left"),
            (50, 100, "about 8 min left"),
        )
    ]
