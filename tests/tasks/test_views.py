"""Views are functions of (seed, position), and each operation is the one it is named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpm_lmk.config import SimclrV2Config
from ddpm_lmk.config.task import ViewConfig
from ddpm_lmk.tasks.ssl import views
from ddpm_lmk.tasks.ssl.views import COLUMNS, blurred, crop_matrix, draw_views, make_view

STILL = {"crop": (1.0, 1.0), "flip": 0, "jitter": 0, "blur": 0}


def uniform(count: int, **columns: float) -> np.ndarray:
    u = np.full((count, COLUMNS), 0.5)
    for name, value in columns.items():
        u[:, getattr(views, name)] = value
    return u


def test_views_depend_on_seed_and_position_only() -> None:
    cfg, images, positions = SimclrV2Config(), torch.rand(4, 1, 32, 32), torch.tensor([3, 9, 4, 7])
    whole = draw_views(cfg, images, positions, seed=1)
    halves = [draw_views(cfg, images[cut], positions[cut], seed=1) for cut in (slice(0, 2), slice(2, 4))]
    for number, view in enumerate(whole):
        torch.testing.assert_close(torch.cat([half[number] for half in halves]), view)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(draw_views(cfg, images, positions, seed=2)[0], whole[0])


def test_the_released_code_draws_once_for_a_micro_batch() -> None:
    same = torch.rand(1, 1, 32, 32).expand(3, 1, 32, 32)
    drawn = draw_views(SimclrV2Config(drawn="micro_batch"), same, torch.tensor([5, 6, 7]), seed=0)[0]
    assert torch.equal(drawn[0], drawn[1])
    each = draw_views(SimclrV2Config(), same, torch.tensor([5, 6, 7]), seed=0)[0]
    assert not torch.equal(each[0], each[1])


def test_a_whole_crop_is_the_image_and_a_flip_its_mirror() -> None:
    images = torch.rand(2, 1, 16, 16)
    view = ViewConfig.model_validate(STILL | {"flip": 0.5})
    centre = {"AREA": 0.0, "SHAPE": 0.5}  # ratio 1 between 3/4 and 4/3 on the log scale
    torch.testing.assert_close(make_view(view, images, uniform(2, **centre, FLIP=0.7)), images)
    torch.testing.assert_close(make_view(view, images, uniform(2, **centre, FLIP=0.2)), images.flip(-1))


def test_a_crop_is_cut_out_and_enlarged() -> None:
    images = torch.rand(1, 1, 16, 16)
    view = ViewConfig.model_validate(STILL | {"crop": (0.25, 0.25), "size": 16})
    found = make_view(view, images, uniform(1, LEFT=1.0, TOP=0.0))
    wanted = F.interpolate(images[..., :8, 8:], size=(16, 16), mode="bilinear")
    torch.testing.assert_close(found[..., :15, 1:], wanted[..., :15, 1:])  # inner borders see their neighbours


def test_crops_stay_inside_and_have_the_wanted_area() -> None:
    u = np.random.default_rng(0).random((500, COLUMNS))
    matrix = crop_matrix(ViewConfig(crop=(0.1, 0.6)), u)
    width, height = abs(matrix[:, 0, 0]), matrix[:, 1, 1]
    assert (abs(matrix[:, :, 2]) + np.stack((width, height), 1) <= 1 + 1e-9).all()
    assert 0.1 <= (width * height).min() < 0.15
    assert 0.5 < (width * height).max() <= 0.6
    assert (width / height).min() >= 0.75 - 1e-9


def test_tones_come_in_either_order() -> None:
    images = torch.rand(1, 1, 8, 8)
    view = ViewConfig.model_validate(STILL | {"jitter": 1, "brightness": 1, "contrast": 1})
    draws = {"AREA": 0.0, "BRIGHTNESS": 0.75, "CONTRAST": 0.25}  # factors 1.5 and 0.5
    brighter = (images * 1.5).clamp(0, 1)
    mean = brighter.mean()
    wanted = mean + (brighter - mean) * 0.5
    torch.testing.assert_close(make_view(view, images, uniform(1, **draws, ORDER=0.4)), wanted)
    weaker = images.mean() + (images - images.mean()) * 0.5
    torch.testing.assert_close(make_view(view, images, uniform(1, **draws, ORDER=0.6)), (weaker * 1.5).clamp(0, 1))


def test_solarize_inverts_the_bright_half() -> None:
    images = torch.tensor([[[[0.2, 0.5], [0.9, 0.49]]]])
    view = ViewConfig.model_validate(STILL | {"solarize": 0.5})
    found = make_view(view, images, uniform(1, AREA=0.0, SOLARIZE=0.1))
    torch.testing.assert_close(found, torch.tensor([[[[0.2, 0.5], [0.1, 0.49]]]]), atol=1e-5, rtol=0)


def test_each_image_has_its_own_blur() -> None:
    images = torch.rand(3, 1, 24, 24)
    found = blurred(images, np.array([0.0, 0.8, 1.5]), radius=6)
    torch.testing.assert_close(found[0], images[0])
    for index, sigma in ((1, 0.8), (2, 1.5)):
        offsets = torch.arange(-6, 7.0)
        kernel = (-offsets.square() / (2 * sigma**2)).exp()
        kernel = kernel / kernel.sum()
        padded = F.pad(images[index][None], (6, 6, 6, 6), mode="reflect")
        wanted = F.conv2d(padded, (kernel[:, None] * kernel)[None, None])[0]
        torch.testing.assert_close(found[index], wanted, atol=1e-5, rtol=1e-4)


def test_impossible_views_are_refused() -> None:
    with pytest.raises(ValueError, match="smallest <= largest"):
        ViewConfig(crop=(0.5, 0.2))
    with pytest.raises(ValueError, match="two views of one size; found 3"):
        SimclrV2Config(views=(ViewConfig(count=3),))
