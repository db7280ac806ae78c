"""Crops: pixels and points land in the same places, against pictures whose values say where they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lmk.config import AugmentConfig, DenoiseConfig, RunConfig, ZoomConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.augment import resize_matrix
from ddpm_lmk.data.loading.corpus import evaluation_corpora, training_corpora
from ddpm_lmk.data.loading.warp import cut
from ddpm_lmk.tasks.crops import Cutter, inverted, moved, oversampling
from ddpm_lmk.tasks.denoise import DenoiseTask
from tests.data.batches import unlabelled_batch

FINE, SIZE = 256, 64
STILL = AugmentConfig(probability=0)
TURNED = AugmentConfig(probability=1, rotate_deg=25, scale=0.2, scale_axes="independent")


def ramps(count: int = 1) -> Tensor:
    """`[B, 1, F, F]` 16-bit pictures of 200 x + 50 y: bilinear interpolation of it is exact."""
    y, x = np.mgrid[:FINE, :FINE]
    one = torch.from_numpy((200 * x + 50 * y).astype(np.uint16).view(np.int16))
    return one.expand(count, 1, FINE, FINE)


def back_of(centre: tuple[float, float], side_px: float, degrees: float = 0.0) -> Tensor:
    """Pixels of a crop to those of its picture, worked out by hand."""
    step, angle = side_px / SIZE, np.deg2rad(degrees)
    linear = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = np.array(centre) - linear @ np.full(2, (SIZE - 1) / 2)
    return torch.from_numpy(np.concatenate([linear, offset[:, None]], 1)[None])


@pytest.mark.parametrize("finer", [1, 2, 4])
@pytest.mark.parametrize("degrees", [0, 30])
def test_a_pixel_of_a_crop_shows_what_lies_in_its_place(finer: int, degrees: float) -> None:
    back = back_of((120.3, 101.9), 96, degrees)
    crop = cut(ramps(), back, SIZE, finer=finer, intensity="full_range")[0, 0].double()
    row, column = np.mgrid[:SIZE, :SIZE]
    matrix = back[0].numpy()
    x, y = (matrix[k, 0] * column + matrix[k, 1] * row + matrix[k, 2] for k in (0, 1))
    np.testing.assert_allclose(crop.numpy() * 65535, 200 * x + 50 * y, atol=0.5)


def test_a_crop_of_everything_is_the_mean_of_the_pixels_under_each_of_its_own() -> None:
    raw = torch.randint(256, (2, 1, FINE, FINE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    back = back_of(((FINE - 1) / 2, (FINE - 1) / 2), FINE).expand(2, 2, 3)
    crops = cut(raw, back, SIZE, finer=FINE // SIZE, intensity="full_range")
    factor = FINE // SIZE
    wanted = raw.numpy().reshape(2, 1, SIZE, factor, SIZE, factor).mean((3, 5)) / 255
    np.testing.assert_allclose(crops.numpy(), wanted, atol=2e-6)
    stretched = cut(raw, back, SIZE, finer=factor, intensity="per_image")
    low, high = wanted.min((1, 2, 3), keepdims=True), wanted.max((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(stretched.numpy(), (wanted - low) / (high - low), atol=1e-5)


def test_the_border_is_repeated_around_the_picture() -> None:
    crop = cut(ramps(), back_of((0.0, 0.0), SIZE), SIZE, intensity="full_range")[0, 0] * 65535
    assert crop[: SIZE // 2, : SIZE // 2].abs().max() < 0.5  # the corner, (0, 0), is 0
    assert crop[-1, -1].item() == pytest.approx(250 * (SIZE - 1) / 2, abs=0.5)


def test_a_crop_does_not_depend_on_the_batch_it_is_in() -> None:
    raw = torch.randint(256, (5, 1, FINE, FINE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    centre = torch.rand(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * FINE
    noisy = TURNED.model_copy(update={"noise": 0.1, "gamma": 0.3})
    cutter, positions, side = Cutter(noisy, seed=4, intensity="per_image"), np.arange(7, 12), np.full(5, 100.0)
    together, back = cutter.cut(raw, centre, side, SIZE, positions, "stream")
    for i in range(5):
        part = slice(i, i + 1)
        alone, own = cutter.cut(raw[part], centre[part], side[part], SIZE, positions[part], "stream")
        assert torch.equal(alone, together[part])
        assert torch.equal(own, back[part])
    other, _ = cutter.cut(raw, centre, side, SIZE, positions, "another stream")
    assert not torch.equal(other, together)


def test_points_land_where_pixels_land_also_in_changed_crops() -> None:
    count = 12
    cutter, positions = Cutter(TURNED, seed=3, intensity="full_range"), np.arange(count)
    centre = FINE * (0.4 + 0.2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    crops, back = cutter.cut(ramps(count), centre, np.full(count, 80.0), SIZE, positions, "crop")
    points = torch.tensor([[20.0, 20.0], [40.0, 25.0], [31.0, 44.0]], dtype=torch.float64).expand(count, 3, 2)
    there = moved(points, back)
    torch.testing.assert_close(moved(there, inverted(back)), points)
    found = torch.stack([crop[0, [20, 25, 44], [20, 40, 31]] for crop in crops]).double() * 65535
    torch.testing.assert_close(found, 200 * there[..., 0] + 50 * there[..., 1], atol=1.0, rtol=0)
    spans = (there[:, 1] - there[:, 0]).norm(dim=-1) / (points[:, 1] - points[:, 0]).norm(dim=-1) * (SIZE / 80)
    assert spans.min() < 0.95 < 1.05 < spans.max()  # they are turned and scaled at all
    middle = moved(torch.full((count, 1, 2), (SIZE - 1) / 2, dtype=torch.float64), back)[:, 0]
    torch.testing.assert_close(middle, centre, atol=0.02, rtol=0)


@pytest.mark.parametrize(("side", "wanted"), [(20.0, 1), (64.0, 1), (65.0, 2), (128.0, 2), (200.0, 4), (256.0, 4)])
def test_oversampling_misses_no_pixel(side: float, wanted: int) -> None:
    assert oversampling(np.array([side]), SIZE).tolist() == [wanted]


def zooming(count: int, fine: Tensor) -> Batch:
    batch = unlabelled_batch(count)
    to_fine = torch.from_numpy(resize_matrix(SIZE, FINE)).float().expand(count, 2, 3)
    return replace(batch, fine=fine, to_fine=to_fine)


def test_zooming_replaces_a_share_of_the_images_by_crops_of_themselves() -> None:
    count = 400
    batch = zooming(count, ramps(count))
    images = Cutter(STILL, seed=5, intensity="full_range").zoomed(ZoomConfig(share=0.25), batch)
    is_zoomed = (images != batch.images).flatten(1).any(1)
    assert is_zoomed.sum().item() == pytest.approx(100, abs=30)
    assert torch.equal(images[~is_zoomed], batch.images[~is_zoomed])
    crops = images[is_zoomed, 0].double() * 65535
    side = (crops[:, 0, -1] - crops[:, 0, 0]) / 200 / (SIZE - 1) * SIZE / FINE  # the ramp says how wide a crop is
    assert side.min() >= 0.125 - 1e-3
    assert side.max() <= 1 + 1e-3
    assert side.log().mean().item() == pytest.approx(np.log(0.125) / 2, abs=0.2)  # log-uniform
    left = (crops[:, -1, 0] - crops[:, 0, 0]) / 50 / (SIZE - 1) * SIZE / FINE
    torch.testing.assert_close(left, side, atol=2e-3, rtol=0)  # as high as wide
    first = crops[:, 0, 0] / 250 - side * FINE / SIZE / 2 + 0.5  # mean of the left and the upper border, weighted
    assert first.min() >= -0.1


def test_a_zooming_task_noises_the_crops_and_validates_on_whole_images() -> None:
    class Seen(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    raw = torch.randint(256, (8, 1, FINE, FINE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batch, cutter = zooming(8, raw), Cutter(STILL, seed=2, intensity="per_image")
    zoom = DenoiseConfig(target="x0", zoom=ZoomConfig(share=1))
    task, plain = DenoiseTask(zoom, seed=2, cutter=cutter), DenoiseTask(DenoiseConfig(target="x0"), seed=2)
    zoomed = cutter.zoomed(ZoomConfig(share=1), batch)
    torch.testing.assert_close(task.loss(Seen(), batch), zoomed.square().mean((1, 2, 3)))
    assert torch.equal(task.evaluate(Seen(), batch)["loss"], plain.evaluate(Seen(), batch)["loss"])


def test_finer_pixels_are_read_where_crops_are_cut_and_nowhere_else(packed_phantoms: Path) -> None:
    def config(**task: Any) -> RunConfig:
        data = {"path": str(packed_phantoms), "image_size": 16, "fine_size": 32, "shots": task.pop("shots", None)}
        return RunConfig.model_validate({"data": data, "task": task})

    pretrain, finetune = config(kind="denoise", zoom={}), config(kind="landmarks", refine={}, shots=4)
    assert [corpus.sizes for corpus in training_corpora(pretrain)] == [(16, 32)]
    assert [corpus.sizes for corpus in evaluation_corpora(pretrain, "val")] == [(16,)]  # losses of whole images
    assert [corpus.sizes for corpus in training_corpora(finetune)] == [(16, 32)]
    assert [corpus.sizes for corpus in evaluation_corpora(finetune, "val")] == [(16, 32)]
