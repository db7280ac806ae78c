"""A ratio is given where the noise supports it and refused where it does not; bounds hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_lmk.bench import compare_paired, compare_samples


def times(center: float, *, noise: float, count: int, seed: int) -> list[float]:
    """Seconds around `center` with the long tail that timings have."""
    tail = np.random.default_rng(seed).standard_gamma(2.0, count)
    return (center * np.exp(noise * tail)).tolist()


def test_a_difference_above_the_noise_is_a_ratio() -> None:
    found = compare_samples(times(1.0, noise=0.02, count=15, seed=1), times(0.8, noise=0.02, count=15, seed=2))

    assert found.ratio == pytest.approx(1.25, rel=0.03)
    assert found.low is not None
    assert found.high is not None
    assert 1 < found.low < found.ratio < found.high
    assert str(found) == f"{found.ratio:.3f} x ({found.low:.3f} to {found.high:.3f})"


def test_a_difference_inside_the_noise_is_refused() -> None:
    found = compare_samples(times(1.0, noise=0.2, count=15, seed=1), times(0.97, noise=0.2, count=15, seed=2))

    assert found.ratio is None
    assert str(found).startswith("not distinguishable (0.")


def test_taking_turns_sees_a_difference_that_waves_of_load_hide() -> None:
    load = 1 + np.abs(np.sin(np.arange(24)))
    ours = list(1.0 * load * times(1, noise=0.005, count=24, seed=1))
    theirs = list(0.95 * load * times(1, noise=0.005, count=24, seed=2))

    assert compare_paired(ours, theirs).ratio == pytest.approx(1 / 0.95, rel=0.02)
    assert compare_samples(ours, theirs).ratio is None


def test_a_run_that_got_slower_half_way_is_not_believed() -> None:
    quiet = times(1.0, noise=0.01, count=10, seed=1)
    steps = [*times(1.0, noise=0.01, count=10, seed=2), *times(1.2, noise=0.01, count=10, seed=3)]

    assert compare_samples([value * 0.95 for value in quiet * 2], steps).ratio is None
    assert compare_samples([value * 0.6 for value in quiet * 2], steps).ratio is not None


def test_what_two_machines_of_a_kind_disagree_about_anyway_is_no_difference() -> None:
    before, after = times(1.0, noise=0.01, count=12, seed=1), times(0.9, noise=0.01, count=12, seed=2)

    assert compare_samples(before, after).ratio is not None
    assert compare_samples(before, after, anchor=1.15).ratio is None


@pytest.mark.parametrize(("count", "is_enough"), [(5, False), (6, True)])
def test_pairs_below_six_have_no_bounds(count: int, is_enough: bool) -> None:
    found = compare_paired([2.0] * count, [1.0] * count)

    assert (found.ratio == 2.0) == is_enough
    assert is_enough or str(found) == "too few measurements: 5, wanted 6"


def test_equal_things_are_told_apart_in_about_one_case_of_twenty_at_most() -> None:
    wrong = [0, 0]
    for seed in range(400):
        a = times(1.0, noise=0.1, count=12, seed=2 * seed)
        b = times(1.0, noise=0.1, count=12, seed=2 * seed + 1)
        wrong[0] += compare_samples(a, b).is_distinguishable
        wrong[1] += compare_paired(a, b).is_distinguishable

    assert max(wrong) <= 24  # 6 % of 400
