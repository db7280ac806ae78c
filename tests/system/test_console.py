"""What people are told of time: durations in words, and what is left of a whole of several stages."""

from __future__ import annotations

import pytest

from ddpm_lmk.system import console
from ddpm_lmk.system.console import Whole, duration, remaining


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "less than a second"),
        (1.4, "1 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (6000, "1 h 40 min"),
        (7200, "2 h"),
        (12 * 3600 + 1500, "12 h"),
        (71 * 3600, "71 h"),
        (503 * 3600, "21 days"),
        (36_000 * 24 * 3600, "36,000 days"),
    ],
)
def test_a_duration_has_two_units_at_most_and_never_reads_nought(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_is_not_known_is_not_said() -> None:
    assert remaining(None) == ""
    assert remaining(240) == "about 4 min left"


def test_a_tenth_of_the_whole_is_told_once_and_counts_the_stages_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    whole = Whole("demo", began=0.0, then_s=60.0)  # 100 s are gone

    assert whole.line(40.0) is None  # half of the way was gone before this stage had anything to say
    now = 118.0
    assert whole.line(30.0, "step=5/10") is None
    now = 140.0
    assert whole.line(30.0, "step=7/10") == "demo: 60 %, step=7/10, about 90 s left"
    assert whole.line(30.0, "step=7/10") is None
    assert whole.line(500.0) is None  # it takes longer than was thought: no tenth is told twice
    assert whole.words(30.0) == "about 90 s left of demo"
