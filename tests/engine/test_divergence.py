"""Which steps are left out, on what evidence, and when it is too many."""

from __future__ import annotations

import json
import math

import pytest

from ddpm_lmk.config import SpikeConfig
from ddpm_lmk.engine.training_state import NOT_FINITE, OVERFLOW, SPIKE, Divergence

RULE = SpikeConfig(window=16, after=20)


def healthy(steps: int, rule: SpikeConfig | None = RULE) -> Divergence:
    """After `steps` steps with losses 1 and 2 in turn (mean 1.5, deviation 0.5) and norms a tenth of them."""
    health = Divergence(rule)
    for step in range(1, steps + 1):
        loss = 1.0 + step % 2
        assert health.judge(step, loss=loss, norm=loss / 10) is None
    return health


@pytest.mark.parametrize(("loss", "norm"), [(4.6, 0.1), (1.0, 0.46)])
def test_a_loss_or_a_norm_above_six_deviations_is_a_spike(loss: float, norm: float) -> None:
    assert healthy(20).judge(21, loss=loss, norm=norm) == SPIKE
    assert healthy(20).judge(21, loss=4.4, norm=0.44) is None


def test_no_rule_and_the_first_steps_know_no_spikes() -> None:
    assert healthy(19).judge(20, loss=1e9, norm=1e9) is None
    assert healthy(20, None).judge(21, loss=1e9, norm=1e9) is None


def test_runs_of_a_thousand_steps_never_meet_the_default_rule() -> None:
    assert healthy(999, SpikeConfig()).judge(1000, loss=1e9, norm=1e9) is None
    assert healthy(1000, SpikeConfig()).judge(1001, loss=1e9, norm=1e9) == SPIKE


def test_only_accepted_steps_enter_the_statistics() -> None:
    health = healthy(20)
    before = (health.losses, health.norms)
    assert health.judge(21, loss=100.0, norm=1.0) == SPIKE
    assert health.judge(22, loss=math.nan, norm=1.0) == NOT_FINITE
    assert (health.losses, health.norms) == before
    assert (health.skipped, health.in_a_row, health.bad_steps) == (2, 2, [22])


def test_more_than_five_in_a_row_are_trouble() -> None:
    health = healthy(20)
    for step in range(21, 26):
        health.judge(step, loss=math.nan, norm=1.0)
    assert health.trouble is None
    health.judge(26, loss=1e9, norm=1.0)
    assert "6 steps in a row" in (health.trouble or "")


def test_more_than_one_percent_of_the_last_thousand_are_trouble() -> None:
    health = Divergence(None)
    for step in range(1, 2200):
        is_bad = step % 100 == 0
        health.judge(step, loss=math.inf if is_bad else 1.0, norm=1.0)
        assert health.trouble is None
    health.judge(2200, loss=math.inf, norm=1.0)
    health.judge(2201, loss=1.0, norm=1.0)
    health.judge(2202, loss=1.0, norm=math.inf)
    assert "11 of the last 1000" in (health.trouble or "")


def test_an_overflow_of_fp16_is_no_fault_of_the_run() -> None:
    health = healthy(20)
    assert health.judge(21, loss=1.0, norm=math.inf, is_scaled=True) == OVERFLOW
    assert (health.skipped, health.in_a_row, health.bad_steps) == (1, 0, [])


def test_a_checkpoint_keeps_all_of_it() -> None:
    health = healthy(20)
    health.judge(21, loss=math.nan, norm=1.0)
    health.roll_back(source=3, step=21)
    again = Divergence(RULE)
    again.load(json.loads(json.dumps(health.facts())))
    assert again == health
    assert again.judge(22, loss=4.6, norm=0.1) == SPIKE
