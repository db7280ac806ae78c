"""Augmentation: one matrix moves pixels and points, and drawing depends on (seed, position) alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from ddpm_lmk.config import AugmentConfig
from ddpm_lmk.data.loading.augment import compose, draw_changes, invert, move, no_changes, resize_matrix
from ddpm_lmk.data.loading.warp import develop, warp

ALL_MOVES = AugmentConfig(probability=1, shift=0.1, rotate_deg=30, scale=0.2, scale_axes="independent")


def blob(size: int, point: np.ndarray, sigma: float = 2.0) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * sigma**2)).astype(np.float32)


def centroid(image: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(image * x).sum(), (image * y).sum()]) / image.sum()


def texture(count: int, size: int, dtype: type = np.uint8) -> torch.Tensor:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    smooth = [cv2.GaussianBlur(rng.uniform(0, top, (size, size)), (0, 0), 1.5) for _ in range(count)]
    return torch.from_numpy(np.stack(smooth).astype(dtype))


def test_the_matrix_that_moves_the_image_moves_the_point():
    positions, point = np.arange(40), np.array([39.3, 27.8])
    changes = draw_changes(ALL_MOVES, 1, positions, 72)
    moved = warp(torch.from_numpy(blob(72, point)).expand(40, 1, 72, 72).clone(), changes)
    wanted = move(np.tile(point, (40, 1, 1)), changes.matrix)[:, 0]
    found = np.stack([centroid(image) for image in moved[:, 0].numpy()])
    assert np.abs(wanted - point).max() > 5
    assert np.abs(found - wanted).max() < 0.05


def test_pixels_agree_with_opencv_inside_and_at_the_replicated_border():
    images = texture(8, 64).float()[:, None]
    changes = draw_changes(ALL_MOVES, 2, np.arange(8), 64)
    ours = warp(images.clone(), changes)
    for i in range(8):
        theirs = cv2.warpAffine(
            images[i, 0].numpy(), changes.matrix[i], (64, 64), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        assert np.abs(ours[i, 0].numpy() - theirs).max() < 0.01  # of 255


def test_unchanged_images_keep_their_exact_values():
    raw = texture(6, 32)
    changes = draw_changes(AugmentConfig(probability=0.5), 3, np.arange(6), 32)
    assert 0 < changes.is_moved.sum() < 6
    images = develop(raw, changes, seed=3, positions=np.arange(6), intensity="full_range")
    still = ~torch.from_numpy(changes.is_moved)
    assert torch.equal(images[still, 0], raw[still].float() / 255)
    assert not torch.equal(images[~still, 0], raw[~still].float() / 255)


def test_draws_stay_inside_their_bounds_and_fill_them():
    cfg = AugmentConfig(
        probability=0.3, shift=0.02, rotate_deg=2, scale=0.1, brightness=0.2, contrast=0.3, gamma=0.4, noise=0.05
    )
    changes = draw_changes(cfg, 0, np.arange(20_000), 100)
    assert changes.is_moved.mean() == pytest.approx(0.3, abs=0.02)
    factors = np.linalg.norm(changes.matrix[:, :, 0], axis=1)
    angles = np.rad2deg(np.arctan2(changes.matrix[:, 1, 0], changes.matrix[:, 0, 0]))
    centre = np.full((1, 1, 2), 49.5)
    shift = (move(np.tile(centre, (20_000, 1, 1)), changes.matrix) - centre)[:, 0]
    bounds = ((factors - 1, 0.1), (angles, 2), (shift[:, 0], 2), (shift[:, 1], 2), (changes.brightness, 0.2))
    bounds += ((changes.contrast - 1, 0.3), (np.log(changes.gamma), 0.4), (2 * changes.noise_std - 0.05, 0.05))
    for values, bound in bounds:
        assert 0.99 * bound < values.max() <= bound + 1e-3  # matrices are snapped to a grid
        assert 0.99 * bound < -values.min() <= bound + 1e-3


def test_shared_scale_keeps_the_shape_and_independent_scale_does_not():
    for axes, spread in (("shared", 0.0), ("independent", 0.05)):
        changes = draw_changes(AugmentConfig(probability=1, scale=0.2, scale_axes=axes), 0, np.arange(100), 64)
        x, y = (np.linalg.norm(changes.matrix[:, :, axis], axis=1) for axis in (0, 1))
        assert np.abs(x - y).mean() == pytest.approx(0, abs=1e-12) if not spread else np.abs(x - y).mean() > spread


def test_switching_a_change_on_leaves_the_other_draws_alone():
    positions = np.arange(100)
    plain = draw_changes(AugmentConfig(), 5, positions, 64)
    more = draw_changes(AugmentConfig(gamma=0.5, noise=0.1), 5, positions, 64)
    assert np.array_equal(plain.matrix, more.matrix)
    assert (more.gamma != 1).any()


def test_an_image_is_the_same_alone_and_in_a_batch():
    cfg = AugmentConfig(probability=1, scale=0.1, brightness=0.2, contrast=0.3, gamma=0.4, noise=0.1)
    raw, positions = texture(5, 48), np.array([3, 9, 1_000_000, 4, 7])
    kinds = {"seed": 1, "intensity": "per_image"}
    together = develop(raw, draw_changes(cfg, 1, positions, 48), positions=positions, **kinds)
    for i, one in enumerate(positions[:, None]):
        alone = develop(raw[i : i + 1], draw_changes(cfg, 1, one, 48), positions=one, **kinds)
        assert torch.equal(together[i : i + 1], alone)


def test_every_image_is_scaled_by_its_own_range_after_it_moved():
    changes = draw_changes(ALL_MOVES, 0, np.arange(8), 64)
    images = develop(texture(8, 64), changes, seed=0, positions=np.arange(8), intensity="per_image")
    assert torch.equal(images.amin((1, 2, 3)), torch.zeros(8))
    assert torch.equal(images.amax((1, 2, 3)), torch.ones(8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    constant = torch.full((2, 16, 16), 200, dtype=torch.uint8)
    zeros = develop(constant, no_changes(2), seed=0, positions=np.arange(2), intensity="per_image")
    assert torch.equal(zeros, torch.zeros(2, 1, 16, 16))  # never NaN


def test_sixteen_bit_pixels_keep_their_full_range():
    values = np.array([0, 1, 32767, 32768, 40000, 65535], dtype=np.uint16)
    raw = torch.from_numpy(np.tile(values, (6, 1))[None].view(np.int16))
    images = develop(raw, no_changes(1), seed=0, positions=np.arange(1), intensity="full_range")
    assert np.allclose(images[0, 0, 0].numpy(), values / 65535, atol=1e-7)


def test_intensity_changes_do_what_they_say():
    raw, positions = texture(1, 64), np.array([0])
    plain = develop(raw, no_changes(1), seed=0, positions=positions, intensity="full_range")

    def changed(**fields: np.ndarray) -> torch.Tensor:
        changes = no_changes(1)
        for name, value in fields.items():
            getattr(changes, name)[:] = value
        return develop(raw, changes, seed=0, positions=positions, intensity="full_range")

    assert torch.allclose(changed(gamma=2.0), plain**2, atol=1e-6)
    assert torch.allclose(changed(brightness=0.1), plain + 0.1, atol=1e-6)
    assert torch.allclose(changed(contrast=0.5), plain.mean() + 0.5 * (plain - plain.mean()), atol=1e-6)
    noise = changed(noise_std=0.05) - plain
    assert noise.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(changed(noise_std=0.05) - plain, noise)
    assert changed(brightness=0.9).max() == 1


def test_matrices_compose_invert_and_resize_about_pixel_corners():
    first, second = draw_changes(ALL_MOVES, 0, np.arange(2), 64).matrix
    points = np.random.default_rng(0).uniform(0, 63, (7, 2))
    assert np.allclose(move(points, compose(second, first)), move(move(points, first), second))
    assert np.allclose(move(move(points, first), invert(first)), points)
    small = cv2.resize(blob(64, np.array([30.0, 41.5])), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.allclose(centroid(small), move(np.array([[30.0, 41.5]]), resize_matrix(64, 32))[0], atol=0.01)
