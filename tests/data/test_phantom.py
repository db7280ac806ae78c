"""Phantoms: pure, exact, in the picture, and useless without looking at it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.phantom import LANDMARK_NAMES, Phantom, render
from ddpm_lmk.data.phantom.canvas import MU, Canvas, Frame, band, loop, smooth
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.errors import ConfigError

KINDS = ("chest", "skull", "hand")
COUNTS = {"chest": 6, "skull": 19, "hand": 37}


def normalised(phantom: Phantom) -> np.ndarray:
    return (phantom.points + 0.5) / np.array(phantom.image.shape[::-1])


def sample(phantom: Phantom, points: np.ndarray) -> np.ndarray:
    """Grey values in [0, 1] of the slightly blurred picture at `points [N, 2]`."""
    blurred = cv2.GaussianBlur(phantom.image.astype(np.float32) / 65535, (0, 0), max(phantom.image.shape) / 256)
    columns, rows = points.astype(np.float32).T
    return cv2.remap(blurred, columns[None], rows[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]


@pytest.fixture(scope="module")
def shapes() -> dict[str, np.ndarray]:
    """Normalised points `[75, N, 2]` of a series of each kind."""
    return {kind: np.array([normalised(render(kind, 3, index, 32)) for index in range(75)]) for kind in KINDS}


def flat_frame(size: int = 64, height_mm: float = 32.0) -> Frame:
    """A frame that only scales: no warp, no ripple, no turn."""
    return Frame(lambda points: points, np.eye(2), np.zeros(2), np.array([height_mm, height_mm]), (size, size))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_phantom_and_others_another(kind: str) -> None:
    first, again = render(kind, 5, 3, 96), render(kind, 5, 3, 96)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.points, again.points)
    assert first.mm_per_px == again.mm_per_px
    for other in (render(kind, 6, 3, 96), render(kind, 5, 4, 96)):
        assert np.abs(normalised(other) - normalised(first)).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_nothing(kind: str) -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        one = render(kind, 5, 4, 128).image
        cv2.setNumThreads(4)
        np.testing.assert_array_equal(one, render(kind, 5, 4, 128).image)
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_size_changes_the_resolution_and_nothing_else(kind: str) -> None:
    small, large = render(kind, 1, 2, 128), render(kind, 1, 2, 512)
    assert max(small.image.shape) == 128
    assert max(large.image.shape) == 512
    # the short side is rounded, so squares of a pixel do not map to exact squares, but normalised points are equal
    np.testing.assert_allclose(normalised(small), normalised(large), atol=1e-9)
    assert large.mm_per_px == pytest.approx(small.mm_per_px / 4)
    shrunk = cv2.resize(large.image, small.image.shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.985


@pytest.mark.parametrize("kind", KINDS)
def test_landmarks_lie_inside_with_a_margin(kind: str, shapes: dict[str, np.ndarray]) -> None:
    assert shapes[kind].shape == (75, COUNTS[kind], 2)
    assert shapes[kind].min() > 0.035
    assert shapes[kind].max() < 0.965


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_unique_and_those_of_the_spec(kind: str) -> None:
    assert len(set(LANDMARK_NAMES[kind])) == COUNTS[kind]
    assert SPECS[f"phantom-{kind}"].landmark_names == LANDMARK_NAMES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_shape_is_a_bad_guess(kind: str, shapes: dict[str, np.ndarray]) -> None:
    errors = np.linalg.norm(shapes[kind][50:] - shapes[kind][:50].mean(axis=0), axis=2)
    assert errors.mean() > 0.08
    assert errors.mean(axis=0).min() > 0.06  # no landmark stays in place


def test_unknown_kinds_and_tiny_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="chest, skull, hand"):
        render("foot", 0, 0)
    with pytest.raises(ConfigError, match="at least 32"):
        render("hand", 0, 0, 16)


def test_bone_ends_at_finger_tips() -> None:
    """Along the last bone the film falls from bright to darker within a millimetre or so of the tip."""
    offsets = np.linspace(-5, 5, 81)  # mm along the bone
    misses = []
    for index in range(8):
        phantom = render("hand", 7, index, 512)
        for tip in (24, 28, 32):
            along = phantom.points[tip] - phantom.points[tip - 1]
            along = along / np.linalg.norm(along) / phantom.mm_per_px
            profile = sample(phantom, phantom.points[tip] + offsets[:, None] * along)
            misses.append(abs(offsets[np.argmin(np.gradient(profile))]))
    assert np.median(misses) < 0.8
    assert np.mean(np.array(misses) < 1.6) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_more_structure_at_its_own_landmarks_than_at_those_of_others(kind: str) -> None:
    own, others = [], []
    phantoms = [render(kind, 9, index, 192) for index in range(8)]
    for phantom in phantoms:
        shown = cv2.GaussianBlur(phantom.image.astype(np.float32), (0, 0), 1)
        slope = np.hypot(cv2.Sobel(shown, -1, 1, 0), cv2.Sobel(shown, -1, 0, 1))
        own.append(structure(slope, normalised(phantom)))
        others += [structure(slope, normalised(other)) for other in phantoms if other is not phantom]
    assert np.mean(own) > np.mean(others) + 1.1  # of log slope; labels moved by 5 % of the side miss this
    assert np.mean(np.array(own) > np.mean(others)) >= 0.75


def structure(slope: np.ndarray, points: np.ndarray) -> float:
    """Mean log slope at normalised points."""
    columns, rows = (points * slope.shape[::-1]).astype(int).T
    return float(np.log(slope[rows, columns] + 1).mean())


def test_filled_edges_lie_where_the_outline_says() -> None:
    """A square from 10.3 to 20.9 mm at 2 px/mm: its columns add up to its width, its centre is its centre."""
    canvas = Canvas(flat_frame(), np.random.default_rng(0))
    square = np.array([(10.3, 10.3), (20.9, 10.3), (20.9, 20.9), (10.3, 20.9)])
    canvas.fill([square], "soft", 5.0)
    cover = canvas.path / (5.0 * MU["soft"])
    x = np.arange(64)
    assert np.sqrt(cover.sum()) == pytest.approx(2 * 10.6, abs=0.4)
    assert (cover.sum(axis=0) * x).sum() / cover.sum() == pytest.approx(2 * 15.6 - 0.5, abs=0.1)


def test_curves_pass_through_their_control_points() -> None:
    controls = np.random.default_rng(0).uniform(0, 10, (3, 5, 2))
    np.testing.assert_allclose(smooth(controls, steps=4)[:, ::4], controls, atol=1e-12)
    np.testing.assert_allclose(loop(controls, steps=4)[:, ::4], controls, atol=1e-12)
    np.testing.assert_allclose(smooth(controls[1], steps=4), smooth(controls, steps=4)[1], atol=1e-12)


def test_bands_have_the_width_asked_for() -> None:
    outline = band([(0, 0), (5, 0), (10, 0)], np.array([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(outline, [(0, 1), (5, 2), (10, 1), (10, -1), (5, -2), (0, -1)])
