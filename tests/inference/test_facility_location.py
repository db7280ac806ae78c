"""Facility location: the greedy choice against a search of all sets, and lazy evaluation against none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ddpm_lmk.inference import facility_location
from ddpm_lmk.inference.facility_location import choose


def drawn(seed: int, count: int = 40) -> np.ndarray:
    """Points in clusters of different sizes, float32."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 5, (6, 4))
    return (centres[rng.integers(6, size=count) ** 2 // 6] + rng.normal(0, 1, (count, 4))).astype(np.float32)


def distances_of(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=-1)


def coverage_of(points: np.ndarray, chosen: list[int]) -> float:
    """As `Choice` defines it, from the matrix of all distances."""
    distances = distances_of(points)
    return 1 - distances[:, chosen].min(1).mean() / np.sqrt((distances**2).mean())


def plain(points: np.ndarray, count: int, chosen: list[int]) -> list[int]:
    """The greedy choice by computing every gain in every round."""
    distances, chosen, picked = distances_of(points), list(chosen), []
    for _ in range(count):
        reach = distances[:, chosen].min(1) if chosen else np.full(len(points), distances.max() * 3)
        gains = np.maximum(reach[:, None] - distances, 0).sum(0)
        gains[chosen] = -1
        picked.append(int(np.argmax(gains >= gains.max() * (1 - 1e-5))))  # pairs far away are equal but for rounding
        chosen.append(picked[-1])
    return picked


@pytest.mark.parametrize("at_once", [1, 7, None])
@pytest.mark.parametrize("chosen", [[], [3, 17]], ids=["nothing chosen", "two chosen"])
def test_lazy_evaluation_chooses_what_plain_evaluation_does(chosen: list[int], at_once: int | None) -> None:
    for seed in range(6):
        points = drawn(seed)
        choices = choose(points, 8, chosen=chosen, at_once=at_once)
        assert [choice.index for choice in choices] == plain(points, 8, chosen)


def test_most_gains_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    gains = facility_location._Places.gains
    monkeypatch.setattr(
        facility_location._Places,
        "gains",
        lambda places, indices: (looked_at.append(len(indices)), gains(places, indices))[1],
    )
    choose(drawn(0, 600), 20, at_once=4)
    assert sum(looked_at) < 0.25 * 20 * 600


def test_the_first_point_is_the_medoid_and_every_value_is_that_of_the_definition() -> None:
    points = drawn(1)
    choices = choose(points, 5)
    assert choices[0].index == int(np.argmin(distances_of(points).sum(0)))
    assert choices[0].nearest is None
    picked: list[int] = []
    for choice in choices:
        before = coverage_of(points, picked) if picked else 0.0
        if picked:
            assert choice.nearest == picked[int(np.argmin(distances_of(points)[choice.index, picked]))]
        picked.append(choice.index)
        assert choice.coverage == pytest.approx(coverage_of(points, picked), abs=1e-5)
        assert choice.gain == pytest.approx(choice.coverage - before, abs=1e-5)


def test_the_gain_is_near_that_of_the_best_of_all_sets() -> None:
    for seed in range(5):
        points = drawn(seed, 14)
        distances = distances_of(points)
        reach = 2 * np.linalg.norm(points - points.mean(0), axis=1).max()

        def gain(chosen: tuple[int, ...], distances: np.ndarray = distances, reach: float = reach) -> float:
            return float((reach - distances[:, chosen].min(1)).sum())

        best = max(gain(chosen) for chosen in itertools.combinations(range(14), 3))
        assert (1 - 1 / np.e) * best <= gain(tuple(choice.index for choice in choose(points, 3))) <= best + 1e-4


def test_chosen_points_are_not_suggested_and_cover_what_is_near_them() -> None:
    points = np.array([[0, 0], [0.1, 0], [0, 0.1], [9, 9]], np.float32)
    [choice] = choose(points, 1, chosen=[0])
    assert (choice.index, choice.nearest) == (3, 0)
    assert choice.gain == pytest.approx(coverage_of(points, [0, 3]) - coverage_of(points, [0]), abs=1e-5)


def test_among_equal_points_the_first_is_taken_each_once() -> None:
    points = np.zeros((5, 3), np.float32)
    assert [(choice.index, choice.coverage) for choice in choose(points, 5)] == [(n, 1.0) for n in range(5)]
    twins = np.repeat(drawn(2, 10), 2, axis=0)
    picked = [choice.index for choice in choose(twins, 10)]
    assert all(index % 2 == 0 for index in picked)
    assert picked == [choice.index for choice in choose(twins, 10, at_once=3)]


def test_all_that_are_left_may_be_wanted() -> None:
    points = drawn(3, 9)
    choices = choose(points, 7, chosen=[2, 5])
    assert sorted(choice.index for choice in choices) == [0, 1, 3, 4, 6, 7, 8]
    assert choices[-1].coverage == pytest.approx(1)
