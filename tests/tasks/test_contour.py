"""Contour-hugging: likelihood of one pixel, peak, expected radial error, temperatures; each against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_lmk.config import ContourCodecConfig
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.tasks.codecs import ContourCodec, Frame

SIZE = 16
codec = ContourCodec(ContourCodecConfig())


def frame(count: int = 1, native: tuple[float, float] = (SIZE, SIZE)) -> Frame:
    return Frame(SIZE, torch.tensor([native]).expand(count, 2), torch.eye(2, 3).expand(count, 2, 3))


def random_maps(images: int, landmarks: int) -> torch.Tensor:
    return 3 * torch.randn(images, landmarks, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def slow_surprise(logits: np.ndarray, column: int, row: int) -> float:
    """-log of exp(logit) over the sum of all exp(logit), in double precision and one pixel after the other."""
    total = 0.0
    for line in logits:
        for value in line:
            total += math.exp(value)
    return -math.log(math.exp(logits[row, column]) / total)


def slow_error(logits: np.ndarray, cut: float) -> tuple[int, int, float]:
    """Peak (column, row) and expected radial error as [20] does it: weights over the peak, cut, renormalised."""
    heat = np.exp(logits - logits.max())
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    weight = heat / heat.max()
    weight[weight <= cut] = 0
    weight /= weight.sum()
    error = 0.0
    for y in range(heat.shape[0]):
        for x in range(heat.shape[1]):
            error += weight[y, x] * math.hypot(x - column, y - row)
    return column, row, error


def test_loss_is_the_likelihood_of_the_nearest_pixel() -> None:
    maps, points = random_maps(2, 3), torch.rand(2, 3, 2) * (SIZE - 1)
    wanted = [
        np.mean([slow_surprise(m.double().numpy(), round(x), round(y)) for m, (x, y) in zip(image, row.tolist())])
        for image, row in zip(maps, points)
    ]
    np.testing.assert_allclose(codec.loss(maps, points, frame(2)).numpy(), wanted, rtol=1e-5)


def test_the_papers_pixel_is_rounded_down_on_the_released_grid_and_read_back_from_there() -> None:
    """docs/method.md, section 3: one-hot target at int(x), floor not round; the released grid has x S / w."""
    released = ContourCodec(ContourCodecConfig(pixel="floor"))
    native, x, y = (480.0, 800.0), 299.0, 437.0  # 9.967 and 8.74 on the grid: pixel (9, 8)
    wide = frame(native=native)
    points = torch.tensor([[[(x + 0.5) * SIZE / 480 - 0.5, (y + 0.5) * SIZE / 800 - 0.5]]])
    maps = random_maps(1, 1)
    wanted = slow_surprise(maps[0, 0].double().numpy(), 9, 8)
    assert released.loss(maps, points, wide).item() == pytest.approx(wanted, rel=1e-5)
    maps[0, 0, 8, 9] = 50.0
    found = released.decode(maps, wide).points[0, 0]
    on_native = (found + 0.5) * torch.tensor(native) / SIZE - 0.5
    torch.testing.assert_close(on_native, torch.tensor([9.0, 8.0]) * torch.tensor(native) / SIZE)


def test_decode_finds_the_peak_and_the_expected_radial_error() -> None:
    maps = random_maps(2, 3)
    decoded = codec.decode(maps, frame(2))
    for i in range(2):
        for n in range(3):
            column, row, error = slow_error(maps[i, n].double().numpy(), 0.05)
            assert decoded.points[i, n].tolist() == [column, row]
            assert decoded.spread_px[i, n].item() == pytest.approx(error, rel=1e-4)
    assert not decoded.failed.any()


def test_error_is_zero_for_a_sure_map_and_the_mean_distance_for_a_flat_one() -> None:
    sure = torch.full((1, 1, SIZE, SIZE), -50.0)
    sure[0, 0, 3, 5] = 50.0
    assert codec.decode(sure, frame()).spread_px.item() == 0.0
    grid = np.arange(SIZE)
    flat = np.hypot(grid[None], grid[:, None]).mean()  # the first of equal peaks is (0, 0)
    assert codec.decode(torch.zeros(1, 1, SIZE, SIZE), frame()).spread_px.item() == pytest.approx(flat, rel=1e-5)


def test_temperatures_flatten_what_is_read_and_leave_peak_and_loss_alone() -> None:
    warm = ContourCodec(ContourCodecConfig())
    warm.temperatures = torch.tensor([0.5, 1.0, 4.0])
    maps, points = random_maps(1, 3), torch.full((1, 3, 2), 7.0)
    plain, tempered = codec.decode(maps, frame()), warm.decode(maps, frame())
    assert torch.equal(plain.points, tempered.points)
    sharper, same, flatter = (tempered.spread_px - plain.spread_px)[0].tolist()
    assert sharper < 0 < flatter
    assert same == 0
    assert tempered.spread_px[0, 2].item() == pytest.approx(
        slow_error(maps[0, 2].double().numpy() / 4, 0.05)[2], rel=1e-4
    )
    assert torch.equal(codec.loss(maps, points, frame()), warm.loss(maps, points, frame()))


def test_temperatures_of_another_run_are_refused() -> None:
    other = ContourCodec(ContourCodecConfig())
    other.temperatures = torch.ones(4)
    with pytest.raises(CheckpointError, match="4 temperatures for 3 landmarks"):
        other.decode(random_maps(1, 3), frame())


def test_a_radius_reads_between_pixels() -> None:
    fine = ContourCodec(ContourCodecConfig(decode_radius_px=6.0))
    axis = torch.arange(float(SIZE))
    maps = (-(axis - 7.3).square()[None] / 4 - (axis - 5.8).square()[:, None] / 4)[None, None]
    assert codec.decode(maps, frame()).points[0, 0].tolist() == [7.0, 6.0]
    torch.testing.assert_close(fine.decode(maps, frame()).points[0, 0], torch.tensor([7.3, 5.8]), atol=0.05, rtol=0)


def test_points_without_a_label_or_outside_do_not_count() -> None:
    maps = random_maps(2, 3)
    nan = float("nan")
    points = torch.tensor([[[3.2, 9.9], [nan, nan], [40.0, 5.0]], [[nan, 1.0], [-3.0, 2.0], [nan, nan]]])
    loss = codec.loss(maps, points, frame(2))
    assert loss[0].item() == pytest.approx(slow_surprise(maps[0, 0].double().numpy(), 3, 10), rel=1e-5)
    assert loss[1].item() == 0.0


def test_an_image_without_a_single_label_has_no_gradient_and_the_others_reach_every_pixel() -> None:
    maps = random_maps(2, 1).requires_grad_()
    codec.loss(maps, torch.tensor([[[float("nan")] * 2], [[4.0, 4.0]]]), frame(2)).sum().backward()
    assert maps.grad is not None
    assert (maps.grad[0] == 0).all()
    assert (maps.grad[1] != 0).all()


def test_a_map_that_is_not_finite_is_a_failure() -> None:
    maps = random_maps(1, 2)
    maps[0, 1, 2, 2] = float("nan")
    assert codec.decode(maps, frame()).failed.tolist() == [[False, True]]
