"""Radial errors, MRE and SDR: closed forms, two protocols, the mean shape, and what must never vanish from a mean."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference import scoring
from ddpm_lmk.tasks.validation_metrics import MeanRadialError, SuccessDetectionRate

CEPH, HAND, CHEST = SPECS["cephalometric"], SPECS["hand"], SPECS["chest"]
CEPH_SIZE = np.array([[1935.0, 2400.0]])
DATA = Path(os.environ.get("LMK_DATA", Path(__file__).parents[3] / "shared/data"))


def inner_points(spec: DatasetSpec, images: int, size: tuple[float, float], seed: int = 0) -> np.ndarray:
    """Points well inside the picture, `[M, N, 2]` native px."""
    generator = np.random.default_rng(seed)
    return (0.1 + 0.8 * generator.random((images, spec.num_landmarks, 2))) * size


def test_a_shift_of_3_4_pixels_is_5_pixels_and_half_a_millimetre() -> None:
    true = inner_points(CEPH, 4, (1935, 2400))
    scores = scoring.score_original(true + np.array([3.0, 4.0]), true, np.full(4, 0.1), CEPH)
    assert scores["unit"] == "mm"
    assert scores["mre"] == pytest.approx(0.5)
    assert scores["mre_px"] == pytest.approx(5.0)
    assert scores["median"] == pytest.approx(0.5)
    assert scores["sdr"] == {"2": 100.0, "2.5": 100.0, "3": 100.0, "4": 100.0}
    assert [row["name"] for row in scores["per_landmark"]] == list(CEPH.landmark_names)


def test_success_rate_counts_an_error_at_the_threshold() -> None:
    true = np.zeros((1, 6, 2)) + 500
    predicted = true.copy()
    predicted[0, :, 0] += [0, 3, 3.0001, 6, 9, 100]
    scores = scoring.score_original(predicted, true, np.nan, CHEST)
    assert scores["sdr"] == pytest.approx({"3": 100 * 2 / 6, "6": 100 * 4 / 6, "9": 100 * 5 / 6})
    assert scores["per_landmark"][1]["sdr"]["3"] == 100.0


def test_millimetres_without_a_spacing_are_refused_by_name() -> None:
    true = inner_points(CEPH, 3, (1935, 2400))
    with pytest.raises(DataError, match=r"1 of 3 images have no pixel spacing \(first: b\)"):
        scoring.score_original(true, true, np.array([0.1, np.nan, 0.1]), CEPH, ids=["a", "b", "c"])


def test_a_prediction_that_is_not_finite_is_refused_rather_than_dropped() -> None:
    true = inner_points(CEPH, 3, (1935, 2400))
    predicted = true.copy()
    predicted[2, 5, 1] = np.nan
    for score in (
        lambda: scoring.score_original(predicted, true, 0.1, CEPH, ids=["a", "b", "c"]),
        lambda: scoring.score_paper(predicted, np.repeat(CEPH_SIZE, 3, 0), true, CEPH, ids=["a", "b", "c"]),
    ):
        with pytest.raises(DataError, match=r"1 of 3 images have a prediction that is not finite \(first: c\)"):
            score()
    with pytest.raises(DataError, match="no label for every landmark"):
        scoring.score_original(true, predicted, 0.1, CEPH)


def test_predictions_and_labels_must_name_the_same_images() -> None:
    scoring.check_ids(["b", "a"], ["a", "b"])
    with pytest.raises(DataError, match=r"2 of them, first b"):
        scoring.check_ids(["a", "b"], ["a", "c"])
    with pytest.raises(DataError, match="1 images were predicted twice"):
        scoring.check_ids(["a", "a"], ["a"])


def test_paper_protocol_swaps_the_factors_of_the_cephalograms() -> None:
    true = np.full((1, 19, 2), 100.0) / 256 * CEPH_SIZE  # grid point (100, 100) exactly
    right = true + np.array([4.0, 0.0]) / 256 * CEPH_SIZE  # four grid pixels to the right
    down = true + np.array([0.0, 4.0]) / 256 * CEPH_SIZE
    assert scoring.score_paper(right, CEPH_SIZE, true, CEPH)["mre"] == pytest.approx(4 * 2400 / 256 * 0.1)
    assert scoring.score_paper(down, CEPH_SIZE, true, CEPH)["mre"] == pytest.approx(4 * 1935 / 256 * 0.1)
    assert scoring.score_original(right, true, 0.1, CEPH)["mre"] == pytest.approx(4 * 1935 / 256 * 0.1)


def test_paper_protocol_measures_chests_in_whole_grid_pixels() -> None:
    size = np.array([[3000.0, 2900.0]])
    true = np.array([[[50.4, 50.6]] * 6]) / 256 * size  # rounds to (50, 51)
    predicted = np.array([[[52.6, 47.4]] * 6]) / 256 * size  # rounds to (53, 47)
    scores = scoring.score_paper(predicted, size, true, CHEST)
    assert (scores["unit"], scores["grid"]) == ("px", 256)
    assert scores["mre"] == 5.0
    assert scores["sdr"] == {"3": 0.0, "6": 100.0, "9": 100.0}


def test_paper_protocol_takes_the_hand_factor_in_the_squeezed_frame() -> None:
    size = np.array([[600.0, 900.0]])
    grid = np.tile([120.0, 130.0], (1, 37, 1))
    grid[0, 0], grid[0, 4] = (60, 100), (60, 200)  # 100 grid pixels apart: half a millimetre each
    true = grid / 256 * size
    predicted = (grid + np.array([0, 6])) / 256 * size
    assert scoring.score_paper(predicted, size, true, HAND)["mre"] == pytest.approx(6 * 50 / 100)


def test_labels_read_back_from_whole_discs_are_themselves() -> None:
    for x, y in ((6, 6), (249, 249), (128, 6), (100, 37)):
        assert scoring._centroid_of_disc(x, y, 256) == (x, y)


def test_labels_at_the_border_move_to_the_centroid_of_what_is_left_of_their_disc() -> None:
    """The independent reference draws the mask from its definition and takes the plain mean of its outline."""
    axis = np.arange(256)
    distance = (axis[None, :] - 1) ** 2 + (axis[:, None] - 100) ** 2
    mask = (np.exp(-distance / 50) >= 0.5).astype(np.uint8)
    (contour,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygon = contour[:, 0].astype(float)
    x, y = polygon.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    centroid = ((x + np.roll(x, -1)) * cross).sum() / (3 * cross.sum())
    size = np.array([[256.0, 256.0]])
    found = scoring.label_on_grid(np.array([[[1.0, 100.0]]]), size)
    assert found[0, 0].tolist() == [round(centroid), 100]
    assert found[0, 0, 0] > 1


def test_mean_shape_is_the_mean_of_the_shots_stretched_to_each_picture() -> None:
    points = np.array([[[9.5, 19.5]], [[29.5, 19.5]]])  # a tenth and three tenths of the width
    shape = scoring.mean_shape(points, np.array([[100, 100], [100, 50]]))
    np.testing.assert_allclose(shape, [[0.2, 0.3]])
    np.testing.assert_allclose(scoring.place_shape(shape, np.array([[1000, 10]])), [[[199.5, 2.5]]])
    with pytest.raises(DataError, match="at least one training image"):
        scoring.mean_shape(np.full((2, 1, 2), np.nan), np.ones((2, 2)))


def test_spread_over_seeds_is_the_sample_standard_deviation() -> None:
    assert scoring.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert scoring.mean_and_std([4.0]) == (4.0, None, 1)


def test_torchmetrics_agree_with_the_scoring_functions_over_batches_and_padding() -> None:
    true = inner_points(CEPH, 7, (1935, 2400))
    predicted = true + np.random.default_rng(1).normal(0, 20, true.shape)
    spacing = np.linspace(0.08, 0.12, 7)
    mre = MeanRadialError(19)
    sdr = SuccessDetectionRate(19, thresholds=CEPH.sdr_thresholds)
    for rows, weight in (([0, 1, 2, 3], [1, 1, 1, 1]), ([4, 5, 6, 6], [1, 1, 1, 0])):
        batch = (torch.tensor(predicted[rows]), torch.tensor(true[rows]), torch.tensor(spacing[rows]))
        for metric in (mre, sdr):
            metric.update(*batch, weight=torch.tensor(weight))
    wanted = scoring.score_original(predicted, true, spacing, CEPH)
    assert mre.compute().item() == pytest.approx(wanted["mre"])
    assert sdr.compute().tolist() == pytest.approx(list(wanted["sdr"].values()))
    assert mre.per_landmark().tolist() == pytest.approx([row["mre"] for row in wanted["per_landmark"]])
    assert sdr.per_landmark()[:, 3].tolist() == pytest.approx(list(wanted["per_landmark"][3]["sdr"].values()))


def test_torchmetrics_leave_out_missing_labels_and_keep_broken_predictions() -> None:
    true = torch.tensor([[[0.0, 0.0], [float("nan"), 0.0]]])
    metric = MeanRadialError(2)
    metric.update(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), true)
    assert metric.compute().item() == 5.0
    metric.update(torch.tensor([[[float("nan"), 0.0], [0.0, 0.0]]]), true)
    assert metric.compute().isnan()


def test_mean_shape_of_the_real_cephalograms_scores_what_its_labels_say() -> None:
    folder = DATA / "isbi2015_ceph"
    if not folder.is_dir():
        pytest.skip(f"no real cephalograms at {folder}; set LMK_DATA")
    points: dict[str, np.ndarray] = {}
    with (folder / "landmarks.csv").open() as file:
        for row in csv.DictReader(file):
            points.setdefault(row["image_id"], np.empty((19, 2)))[int(row["landmark_index"])] = row["x"], row["y"]
    ids = sorted(points)
    train, test = (np.stack([points[key] for key in part]) for part in (ids[:150], ids[150:300]))
    size = np.repeat(CEPH_SIZE, 150, 0)
    predicted = scoring.place_shape(scoring.mean_shape(train, size), size)
    wanted = np.linalg.norm(train.mean(0) - test, axis=-1).mean() * 0.1
    assert scoring.score_original(predicted, test, 0.1, CEPH)["mre"] == pytest.approx(wanted)
    assert 9 < wanted < 10.5
    assert scoring.score_paper(predicted, size, test, CEPH)["mre"] == pytest.approx(wanted, rel=0.1)
