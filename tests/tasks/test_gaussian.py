"""Gaussian heatmaps of independent pixels, against plain loops and the original's box."""

from __future__ import annotations

import math

import numpy as np
import torch

from ddpm_lmk.config import GaussianCodecConfig
from ddpm_lmk.tasks.codecs import Frame, GaussianCodec

SIZE = 32
codec = GaussianCodec(GaussianCodecConfig())
FRAME = Frame(SIZE, torch.tensor([[SIZE, SIZE]]), torch.eye(2, 3)[None])


def slow_target(column: int, row: int, sigma: float = 3.0, radius: int = 9) -> np.ndarray:
    """The original's mask of 2 radius x 2 radius pixels, its minimum 0 and its maximum 1, put around the landmark."""
    mask = np.zeros((2 * radius, 2 * radius))
    for i in range(2 * radius):
        for j in range(2 * radius):
            mask[i, j] = math.exp(-((i - radius) ** 2 + (j - radius) ** 2) / (2 * sigma**2))
    mask = (mask - mask.min()) / (mask.max() - mask.min())
    target = np.zeros((SIZE, SIZE))
    for i in range(2 * radius):
        for j in range(2 * radius):
            y, x = row + i - radius, column + j - radius
            if 0 <= y < SIZE and 0 <= x < SIZE:
                target[y, x] = mask[i, j]
    return target


def test_the_target_is_the_originals_also_at_the_border() -> None:
    for column, row in ((16, 15), (0, 0), (31, 3)):
        points = torch.tensor([[[column + 0.3, row - 0.2]]])
        target = codec.encode(points, torch.zeros(1, 1, SIZE, SIZE), FRAME)
        np.testing.assert_allclose(target[0, 0].numpy(), slow_target(column, row), atol=1e-6)


def test_the_loss_is_the_cross_entropy_of_every_pixel_summed() -> None:
    maps = torch.randn(1, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[10.0, 12.0], [math.nan, math.nan]]])  # the second has no label
    p = 1 / (1 + np.exp(-maps[0, 0].double().numpy()))
    target = slow_target(10, 12)
    wanted = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum()
    np.testing.assert_allclose(codec.loss(maps, points, FRAME).numpy(), [wanted], rtol=1e-5)


def test_a_landmark_that_was_moved_out_has_an_empty_map() -> None:
    maps, outside = torch.zeros(1, 1, SIZE, SIZE), torch.tensor([[[-3.0, 5.0]]])
    torch.testing.assert_close(codec.loss(maps, outside, FRAME), torch.tensor([SIZE**2 * math.log(2)]))


def test_the_answer_is_the_peak_or_the_mean_around_it() -> None:
    points = torch.tensor([[[10.4, 12.0]]])
    x = torch.arange(SIZE).float()
    logits = 4 - (x - 10.4).square()[None, :] / 4 - (x - 12.0).square()[:, None] / 4
    assert codec.decode(logits[None, None], FRAME).points.tolist() == [[[10.0, 12.0]]]
    around = GaussianCodec(GaussianCodecConfig(decode_radius_px=6)).decode(logits[None, None], FRAME)
    torch.testing.assert_close(around.points, points, atol=0.15, rtol=0)
    assert not around.failed.any()
