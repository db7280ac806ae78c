"""A benchmark keeps to its time: shares, parts left out by name, and a hard end; on one core as on 64 with 8 GPUs."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm_lmk.bench import Budget, Result
from ddpm_lmk.bench import ratio as ratios
from ddpm_lmk.bench.budget import OutOfTime, cut_off
from ddpm_lmk.cli import bench
from ddpm_lmk.system import accelerator


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        """A call that takes so long."""

        def call() -> None:
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of budgets and of calls that take turns."""
    made = Clock()
    for module in (ratios, accelerator):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made, process_time=made))
    return made


def test_what_a_part_does_not_need_goes_to_those_after_it(clock: Clock) -> None:
    budget, shares = Budget(100, clock=clock), []
    for parts, takes_s in ((3, 6), (2, 80), (1, 1)):
        budget.run("part", lambda s=takes_s: (shares.append(budget.share_s), clock.spend(s)()), parts=parts)
    # 10 of 100 s are for writing
    assert shares == [30, 42, 4]
    assert budget.left_out == []


def test_a_part_that_would_not_end_in_time_is_left_out_and_named(clock: Clock) -> None:
    budget = Budget(100, clock=clock)
    assert budget.run("first", clock.spend(60))
    assert not budget.run("long", clock.spend(1000), needs_s=31)
    assert budget.run("short", clock.spend(30), needs_s=29)
    assert not budget.run("last", clock.spend(1))
    assert budget.left_out == ["long", "last"]
    assert clock.now == 1090


def test_rounds_are_as_many_as_fit_and_the_rest_is_named(clock: Clock) -> None:
    budget = Budget(100, clock=clock)
    calls = {"a": clock.spend(3), "b": clock.spend(2)}
    found: dict[str, ratios.Timings] = {}
    budget.run("step", lambda: found.update(budget.alternate(calls, rounds=11)), parts=2)
    # 45 s are nine rounds of 5 s: two before, seven measured
    assert found["a"].wall_s == [3] * 7
    assert found["b"].wall_s == [2] * 7
    assert found["a"].warm_up == 2
    assert budget.left_out == ["step: 4 of 11 rounds"]


def test_where_time_is_short_one_round_before_is_enough(clock: Clock) -> None:
    found = ratios.alternate({"a": clock.spend(5)}, rounds=11, budget_s=35)
    assert (len(found["a"].wall_s), found["a"].warm_up) == (6, 1)


def test_calls_whose_turn_comes_too_late_are_left_out(clock: Clock) -> None:
    budget = Budget(100, clock=clock)
    calls = {name: clock.spend(5) for name in "abcdef"}
    found: dict[str, ratios.Timings] = {}
    budget.run("shapes", lambda: found.update(budget.alternate(calls, rounds=6, needs_all=False)))
    assert list(found) == ["a", "b"]
    assert budget.left_out == ["shapes: c", "shapes: d", "shapes: e", "shapes: f"]
    assert len(found["b"].wall_s) == 6
    assert clock.now <= 1090


def test_whole_rounds_stay_of_calls_that_are_cut_off(clock: Clock) -> None:
    budget, calls = Budget(100, clock=clock), itertools.count()

    def second() -> None:
        if next(calls) == 5:
            raise OutOfTime  # as the timer does

    found: dict[str, ratios.Timings] = {}
    both = {"first": clock.spend(1), "second": second}
    assert budget.run("step", lambda: found.update(budget.alternate(both, rounds=6, warm_up=1)))
    assert [len(found[name].cpu_s) for name in both] == [4, 4]
    assert budget.left_out == ["step: 2 of 6 rounds"]
    # without a whole round there is nothing to keep
    assert not budget.run("none", lambda: budget.alternate({"cut": lambda: cut_off(0, None)}, rounds=6))


def test_a_part_at_work_is_cut_off_and_what_it_has_measured_stays(tmp_path: Path) -> None:
    budget = Budget(60.0)
    result = Result("step", settings={}, budget=budget)

    def measure() -> None:
        result.add("quick", {"wall_s": [1.0]})
        time.sleep(600)

    began = time.monotonic()
    assert not budget.run("slow", measure, parts=200, ends_with_share=True)
    assert time.monotonic() - began < 54
    assert budget.run("next", lambda: None)
    stored = json.loads(result.write(tmp_path, "x").read_text())
    [left_out] = stored["budget"]["left_out"]
    assert left_out.startswith("slow, cut off after ")
    assert [row["what"] for row in stored["rows"]] == ["quick"]


def test_without_a_budget_nothing_is_cut(clock: Clock) -> None:
    budget = Budget(math.inf, clock=clock)
    assert budget.run("part", clock.spend(1e6), parts=3)
    assert budget.facts() == {"budget_s": None, "measured_for_s": 1e6, "left_out": []}


@pytest.fixture
def started(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Names and shares of the benchmarks that `bench all` starts; each takes what `takes` says, or is killed."""
    seen: list[tuple[str, float]] = []
    takes = {"device": 50.0, "loader": 1e9, "step": 20.0}

    def start(script: Path, words: list[str], *, limit_s: float) -> int | None:
        share_s = float(words[words.index("--until") + 1]) - clock.now
        seen.append((script.stem, share_s))
        wanted_s = takes.get(script.stem, share_s)
        clock.now += min(wanted_s, limit_s)
        return 0 if wanted_s <= limit_s else None

    monkeypatch.setattr(bench, "_start", start)
    return seen


def test_all_ends_in_its_budget_though_one_hangs(
    clock: Clock, started: list[tuple[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = bench._in_time(bench.ALL, dict.fromkeys(bench.ALL, Path()) | _scripts(), [], tmp_path, 900, clock=clock)
    assert codes == dict.fromkeys(bench.ALL, 0) | {"loader": None}
    assert clock.now <= 1900
    shares = dict(started)
    assert shares["device"] == pytest.approx((900 - 27) / 6, abs=0.01)
    # what device and step did not need went on; what loader took too much was taken from the others
    assert shares["loader"] == pytest.approx((900 - 27 - 50) / 5, abs=0.01)
    assert shares["train"] > shares["step"]
    [file] = tmp_path.glob("bench_all-*.json")
    facts = json.loads(file.read_text())
    assert [part["benchmark"] for part in facts["benchmarks"]] == list(bench.ALL)
    assert sum(part["took_s"] for part in facts["benchmarks"]) <= facts["budget_s"]
    assert "killed" in capsys.readouterr().out


def test_a_budget_too_small_for_another_start_says_so(
    clock: Clock, started: list[tuple[str, float]], tmp_path: Path
) -> None:
    bench._in_time(("train", "step"), _scripts(), [], tmp_path, 22, clock=clock)
    assert [name for name, _ in started] == ["step"]
    [file] = tmp_path.glob("bench_all-*.json")
    left_out = {part["benchmark"]: part["left_out"] for part in json.loads(file.read_text())["benchmarks"]}
    assert left_out["train"] == ["all of it: no time left"]


def _scripts() -> dict[str, Path]:
    return {name: Path(f"{name}.py") for name in bench.ALL}
