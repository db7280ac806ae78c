"""The radius of a point: its quantile against an independent one, its coverage in simulated films, what it reads."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.radius import simulated_films
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.errors import CheckpointError, DataError
from ddpm_lmk.inference import radius
from ddpm_lmk.inference.radius import Errors, conformal_quantile, effective_count, learn, measure, read_errors
from tests.known_runs import CEPH, put, write_run

LANDMARKS = CEPH.num_landmarks


def textbook(scores: list[float], coverage: float) -> float | None:
    """Split conformal prediction: the ceil((n + 1) coverage)-th smallest of n scores, where there are so many."""
    rank = math.ceil(round((len(scores) + 1) * coverage, 9))
    return sorted(scores)[rank - 1] if rank <= len(scores) else None


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_points_that_are_independent_count_each(coverage: float) -> None:
    # every image has as many points above any tenth as all others: their shares do not vary
    scores = np.arange(100.0).reshape(10, 10).T
    found, count = conformal_quantile(scores, coverage)
    assert count == 100
    assert found == textbook(scores.ravel().tolist(), coverage)


@pytest.mark.parametrize(("images", "coverage"), [(8, 0.9), (9, 0.9), (10, 0.9), (30, 0.9), (3, 0.5), (20, 0.95)])
def test_points_of_an_image_that_are_all_off_alike_count_once(images: int, coverage: float) -> None:
    scores = np.repeat(np.arange(float(images))[:, None], LANDMARKS, axis=1)
    found, count = conformal_quantile(scores, coverage)
    assert count == images
    assert found == textbook(list(range(images)), coverage)


def test_between_the_two_the_design_effect_of_a_cluster_sample_decides() -> None:
    shares = [1.0, 1.0, 0.9, 0.7, 0.9]
    is_within = np.array([[column < round(10 * share) for column in range(10)] for share in shares])
    share = statistics.fmean(shares)
    effect = statistics.variance(shares) / (share * (1 - share) / 10)
    assert effect > 1
    assert effective_count(is_within) == pytest.approx(50 / effect)


def test_a_single_image_counts_as_one_point() -> None:
    assert conformal_quantile(np.arange(19.0)[None], 0.9) == (None, 1.0)


def test_a_quantile_that_is_infinite_is_none() -> None:
    scores = np.full((10, 10), math.inf)
    scores[:, :8] = 1.0
    assert conformal_quantile(scores, 0.9)[0] is None
    assert conformal_quantile(scores, 0.7)[0] == 1.0


@pytest.mark.parametrize("images", [10, 25])
@pytest.mark.parametrize(("film", "freedom"), [(0.0, None), (0.3, None), (0.5, 4.0), (0.8, None)])
def test_in_simulated_films_a_radius_of_ninety_per_cent_holds_as_much_and_is_not_wider_than_it_must_be(
    images: int, film: float, freedom: float | None
) -> None:
    rng = np.random.default_rng(images)
    truth = simulated_films(rng, 20_000, film=film, freedom=freedom)
    needed = float(np.quantile(truth.ratio, 0.9))  # the factor that holds 90 % of all films there are
    learnt = [
        learn(simulated_films(rng, images, film=film, freedom=freedom), coverage=0.9, unit="px") for _ in range(200)
    ]
    tested = simulated_films(rng, 500, film=film, freedom=freedom)
    within = [measure(facts, tested) for facts in learnt]
    assert 87 < statistics.fmean(each["within_pct"] for each in within) < 93
    assert statistics.median(facts["factor"] for facts in learnt) < 1.15 * needed
    # one radius for all holds as much, and is wider where the spread tells the error
    assert 87 < statistics.fmean(each["constant"]["within_pct"] for each in within) < 93
    width = statistics.median(each["mean"] for each in within)
    assert width < statistics.median(each["constant"]["mean"] for each in within)


def errors_of(error: list[list[float]], spread: list[list[float]], spacing: float = math.nan) -> Errors:
    found = np.array(error)
    return Errors([f"point{index}" for index in range(found.shape[1])], found, found * spacing, np.array(spread))


def test_coverage_and_mean_radius_are_counted_over_points_and_by_landmark() -> None:
    scored = errors_of([[1.0, 9.0], [4.0, 4.0]], [[1.0, 2.0], [2.0, 3.0]], spacing=0.1)
    facts = {"coverage": 0.9, "factor": 2.0, "constant": {"radius": 0.45, "unit": "mm"}}
    found = measure(facts, scored)  # radii 2, 4; 4, 6 px
    assert found == {
        "coverage": 0.9,
        "factor": 2.0,
        "unit": "mm",
        "within_pct": 75.0,
        "mean": pytest.approx(0.4),
        "constant": {"within_pct": 75.0, "mean": 0.45},
        "per_landmark": [
            {"name": "point0", "within_pct": 100.0, "mean": pytest.approx(0.3)},
            {"name": "point1", "within_pct": 50.0, "mean": pytest.approx(0.5)},
        ],
    }
    in_pixels = measure(facts | {"constant": {"radius": None, "unit": "px"}}, errors_of([[1.0]], [[0.4]]))
    assert (in_pixels["within_pct"], in_pixels["mean"], in_pixels["unit"]) == (0.0, 0.8, "px")
    assert "constant" not in in_pixels


def test_a_point_without_a_spread_is_within_no_radius() -> None:
    scored = errors_of([[0.0, 1.0]], [[0.0, 1.0]])
    facts = {"coverage": 0.9, "factor": 2.0, "constant": {"radius": None, "unit": "px"}}
    assert measure(facts, scored)["within_pct"] == 50.0


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a", errors_px=np.array([10.0, 20.0]))
    write_run(tmp_path / "b", errors_px=np.array([30.0]))
    found = read_errors([tmp_path / "a", tmp_path / "b"])
    assert found.error_px[:, 0].tolist() == [10.0, 20.0, 30.0]  # images of one name in two folders stay two
    assert found.error_mm[:, 1] == pytest.approx([1.0, 2.0, 3.0])
    assert (found.spread_px == 3.0).all()
    assert found.scale.ravel() == pytest.approx([0.1, 0.1, 0.1])
    text = (tmp_path / "a" / "predictions.csv").read_text().replace("3.0,0\n", "3.0,1\n", 1)
    put(tmp_path / "a" / "predictions.csv", text)
    assert math.isinf(read_errors([tmp_path / "a"]).ratio[0, 0])  # it failed, so its spread says nothing
    with pytest.raises(DataError, match=r"c/predictions\.csv is missing, .*; let the run score its split"):
        read_errors([tmp_path / "c"])
    put(tmp_path / "b" / "predictions.csv", "\n".join((tmp_path / "b" / "predictions.csv").read_text().split()[:-1]))
    with pytest.raises(DataError, match="do not predict the same landmarks in every image"):
        read_errors([tmp_path / "a", tmp_path / "b"])


def test_a_radius_belongs_to_its_dataset_its_landmarks_and_its_weights(tmp_path: Path) -> None:
    kept = {"factor": 2.0, "spec": CEPH.name, "landmarks": list(CEPH.landmark_names), "steps": 30, "step": 20}
    put(tmp_path / "radius.json", kept)
    assert radius.read(tmp_path / "elsewhere", CEPH) is None
    assert radius.read(tmp_path, CEPH, step=20) == kept
    assert radius.read(tmp_path, CEPH, steps=60) is None  # the run was made longer since
    assert radius.read(tmp_path, SPECS["chest"]) is None
    put(tmp_path / "radius.json", kept | {"factor": None})  # too few points
    assert radius.read(tmp_path, CEPH) is None
    put(tmp_path / "radius.json", kept | {"landmarks": ["nose"]})
    with pytest.raises(CheckpointError, match=r"is of 1 other landmarks than the 19 of cephalometric; `ddpm-lmk cali"):
        radius.read(tmp_path, CEPH)
    for damaged in ("{", json.dumps(kept | {"factor": -1.0}), json.dumps(kept | {"factor": "2"})):
        put(tmp_path / "radius.json", damaged)
        with pytest.raises(CheckpointError, match="holds no radius; `ddpm-lmk calibrate` writes it again, or remove"):
            radius.read(tmp_path, CEPH)
