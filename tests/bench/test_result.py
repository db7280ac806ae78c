"""Timings take turns, and a result file holds what is needed to compare it with later ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ddpm_lmk.bench import Result, alternate, read_result, read_results
from ddpm_lmk.errors import ConfigError


def test_calls_take_turns_and_the_order_turns_round() -> None:
    seen: list[str] = []
    found = alternate({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=3, warm_up=1)

    assert "".join(seen) == "abbaabba"
    assert [len(found[name].wall_s) for name in "ab"] == [3, 3]
    assert found["a"].warm_up == 1


def test_waiting_costs_wall_time_and_no_processor_time() -> None:
    found = alternate({"sleep": lambda: time.sleep(0.05)}, rounds=3, warm_up=0)["sleep"]

    assert min(found.wall_s) >= 0.05
    assert all(busy < wall for busy, wall in zip(found.busy_s, found.wall_s))


def test_a_budget_ends_it_after_one_round_before_and_one_measured() -> None:
    found = alternate({"call": lambda: None}, rounds=100, warm_up=2, budget_s=0)

    assert len(found["call"].wall_s) == 1
    assert found["call"].warm_up == 1


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result("step", settings={"preset": "tiny"})
    result.add("forward", {"cpu_s": [0.25, 0.5, 1.0]}, conditions={"batch_images": 8}, figures={"flops_forward": 12})
    path = result.write(tmp_path, "tiny 128")

    found = read_result(path)
    assert path.name.startswith("step-tiny_128-cpu-20")
    assert found.rows == result.rows
    raw = json.loads(path.read_text())
    assert raw["rows"][0]["median"] == {"cpu_s": 0.5}
    assert raw["rows"][0]["quartiles"] == {"cpu_s": [0.375, 0.75]}
    assert len(raw["anchor_s"]) == 14
    assert raw["hardware"]["threads"] >= 1
    assert read_results(tmp_path, "step")[0].facts == found.facts
    assert read_results(tmp_path, "train") == []


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "step"}'])
def test_another_kind_of_file_is_refused_and_passed_over(content: str, tmp_path: Path) -> None:
    path = tmp_path / "step-other.json"
    path.write_text(content)

    with pytest.raises(ConfigError, match=r"step-other\.json"):
        read_result(path)
    assert read_results(tmp_path) == []
