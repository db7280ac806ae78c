"""Codecs: the paper's quirks as released, and our distribution over pixels."""

import math

import cv2
import numpy as np
import pytest
import torch

from ddpm_lmk.config import Codec, ContourCodecConfig, DiscCodecConfig, SpatialCodecConfig
from ddpm_lmk.config.explain import kind_of, sections_of
from ddpm_lmk.config.task import AnyTask
from ddpm_lmk.data.loading.augment import about_centre, compose, invert, move
from ddpm_lmk.tasks import TASKS
from ddpm_lmk.tasks.codecs import CODECS, ContourCodec, DiscCodec, Frame, SpatialCodec, build_codec
from ddpm_lmk.tasks.codecs import Codec as BaseCodec
from ddpm_lmk.tasks.codecs.base import grid_shift

disc = DiscCodec(DiscCodecConfig())
spatial = SpatialCodec(SpatialCodecConfig())


def plain(size, count=1):
    """Images that are their own files."""
    return Frame(size, torch.full((count, 2), float(size)), torch.eye(2, 3).expand(count, 2, 3))


def slow_disc(point, size, sigma=5.0):
    """The released recipe in plain loops: exp(-d^2 / 2 sigma^2), 1 where at least half the largest value."""
    cx, cy = round(point[0]), round(point[1])
    heat = np.array(
        [[math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2)) for x in range(size)] for y in range(size)]
    )
    return (heat >= 0.5 * heat.max()).astype(np.float32)


def test_an_inner_disc_has_109_pixels():
    """docs/method.md, section 3: radius 5 sqrt(2 ln 2) = 5.887 px, 109 px."""
    assert disc.encode(torch.tensor([[[30.0, 40.0]]]), 64).sum() == 109


@pytest.mark.parametrize("point", [(30.2, 17.9), (0.0, 3.0), (63.0, 63.0), (12.5, 13.5)])
def test_discs_equal_the_released_recipe_also_at_the_border_and_at_halves(point):
    np.testing.assert_array_equal(disc.encode(torch.tensor([[point]]), 64)[0, 0].numpy(), slow_disc(point, 64))


def test_disc_loss_is_cross_entropy_over_landmarks_as_torch_computes_it():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 32, 32, generator=generator)
    points = torch.rand(2, 4, 2, generator=generator) * 31
    reference = torch.nn.functional.cross_entropy(logits, disc.encode(points, 32), reduction="none").mean((1, 2))
    torch.testing.assert_close(disc.loss(logits, points, plain(32, 2)), reference)


def test_disc_loss_has_no_gradient_outside_the_discs():
    logits = torch.randn(1, 3, 64, 64, requires_grad=True)
    points = torch.tensor([[[20.0, 20.0], [40.0, 22.0], [30.0, 50.0]]])
    disc.loss(logits, points, plain(64)).sum().backward()
    covered = disc.encode(points, 64).sum(1, keepdim=True) > 0
    assert (logits.grad * ~covered == 0).all()
    assert (logits.grad * covered).abs().sum() > 0


def test_disc_decode_reads_back_what_encode_drew():
    points = torch.tensor([[[20.0, 31.0], [44.0, 12.0]]])
    decoded = disc.decode(disc.encode(points, 64), plain(64))
    torch.testing.assert_close(decoded.points, points)
    assert not decoded.failed.any()


def peaked(value_elsewhere, size=32):
    return torch.full((1, 1, size, size), value_elsewhere)


def test_disc_decode_fails_to_the_origin_where_the_released_code_does():
    all_negative = peaked(-5.0)
    all_negative[0, 0, 10:14, 10:14] = -1.0
    single_pixel = peaked(0.0)
    single_pixel[0, 0, 9, 9] = 1.0
    line = peaked(0.0)
    line[0, 0, 9, 5:20] = 1.0
    for maps in (all_negative, single_pixel, line):
        decoded = disc.decode(maps, plain(32))
        assert decoded.failed.all()
        assert (decoded.points == 0).all()


def test_disc_decode_of_a_flat_positive_map_is_the_image_center():
    decoded = disc.decode(peaked(1.0, 256), plain(256))
    torch.testing.assert_close(decoded.points[0, 0], torch.tensor([127.5, 127.5]))


def test_disc_decode_takes_the_largest_contour_and_ignores_intensities():
    maps = torch.zeros(1, 1, 32, 32)
    maps[0, 0, 4:9, 4:9] = 10.0
    maps[0, 0, 15:27, 15:27] = 6.0
    decoded = disc.decode(maps, plain(32))
    torch.testing.assert_close(decoded.points[0, 0], torch.tensor([20.5, 20.5]))


def test_disc_grid_puts_a_native_point_on_the_released_ratio():
    """Native x = 1000 of 1935 has ratio 1000 / 1935; its network pixel is (x + 0.5) * 256 / 1935 - 0.5."""
    native = torch.tensor([[1935.0, 2400.0]])
    network = torch.tensor([[[1000.5 * 256 / 1935 - 0.5, 600.5 * 256 / 2400 - 0.5]]])
    expected = torch.tensor([[[1000 * 256 / 1935, 600 * 256 / 2400]]])
    torch.testing.assert_close(
        network + grid_shift(Frame(256, native, torch.eye(2, 3)[None])), expected, atol=1e-4, rtol=0
    )


def test_warped_discs_are_the_still_ones_warped_with_the_image_nearest_neighbour():
    """docs/method.md, section 3: targets are built at 256 before augmentation, masks warped with nearest neighbour."""
    size, native = 64, (480.0, 800.0)
    moves = about_centre(
        size, shift_px=np.array([[1.2, -0.9]]), angle=np.array([0.03]), factors=np.array([[1.02, 0.98]])
    )
    to_network = np.array(
        [[size / native[0], 0, 0.5 * size / native[0] - 0.5], [0, size / 800, 0.5 * size / 800 - 0.5]]
    )
    labels = np.array([[[150.0, 400.0], [460.0, 40.0], [np.nan, np.nan]]])
    to_image = compose(moves, to_network[None])
    frame = Frame(size, torch.tensor([native]), torch.from_numpy(invert(to_image)).float())
    warped = DiscCodec(DiscCodecConfig(masks="warped"))
    found = warped.masks(torch.from_numpy(move(labels, to_image)).float(), frame)[0]
    for mask, (x, y) in zip(found, labels[0]):
        if np.isnan(x):
            assert mask.sum() == 0
            continue
        still = slow_disc((x * size / native[0], y * size / native[1]), size)
        border = cv2.BORDER_REPLICATE
        wanted = cv2.warpAffine(still, moves[0], (size, size), flags=cv2.INTER_NEAREST, borderMode=border)
        assert wanted.sum() > 40
        assert np.abs(mask.numpy() - wanted).sum() <= 1  # OpenCV rounds coordinates to 1/1024
    whole = disc.masks(torch.from_numpy(move(labels, to_image)).float(), frame)[0]
    assert whole[0].sum() == 109


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_spatial_decode_finds_a_gaussian_to_a_tenth_of_a_pixel_at_any_stride(stride):
    size, cells = 64, 64 // stride
    centers = torch.arange(cells) * stride + (stride - 1) / 2
    x, y = 27.3, 40.8
    logits = -((centers - x) ** 2)[None] / (2 * 2.5**2) - ((centers - y) ** 2)[:, None] / (2 * 2.5**2)
    codec = SpatialCodec(SpatialCodecConfig(decode_radius_px=12.0))
    decoded = codec.decode(logits[None, None], plain(size))
    torch.testing.assert_close(decoded.points[0, 0], torch.tensor([x, y]), atol=0.1, rtol=0)
    assert decoded.spread_px.item() == pytest.approx(2.5 * 2**0.5, rel=0.05)


def test_spatial_loss_is_least_at_the_target_and_equals_its_entropy():
    point = torch.tensor([[[20.25, 33.5]]])
    grid = torch.arange(64.0)
    target = (-(grid - 20.25).square()[None] / 8 - (grid - 33.5).square()[:, None] / 8).flatten().softmax(0)
    entropy = -(target * target.log().clamp(min=-100)).sum()
    at_target = spatial.loss(target.log().clamp(min=-100).view(1, 1, 64, 64), point, plain(64))
    torch.testing.assert_close(at_target[0], entropy, atol=1e-4, rtol=1e-4)
    assert spatial.loss(torch.zeros(1, 1, 64, 64), point, plain(64)).item() == pytest.approx(
        math.log(64 * 64), rel=1e-5
    )


def test_spatial_loss_equals_a_dense_reference_and_skips_missing_and_moved_out_points():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 16, 16, generator=generator)
    points = torch.tensor([[[3.2, 9.9], [float("nan"), float("nan")], [40.0, 5.0]]])
    grid = torch.arange(16.0)
    target = (-(grid - 3.2).square()[None] / 8 - (grid - 9.9).square()[:, None] / 8).flatten().softmax(0)
    reference = -(target * logits[0, 0].flatten().log_softmax(0)).sum()
    torch.testing.assert_close(spatial.loss(logits, points, plain(16))[0], reference)


def test_spatial_loss_reaches_every_pixel():
    logits = torch.zeros(1, 1, 32, 32, requires_grad=True)
    spatial.loss(logits, torch.tensor([[[8.0, 8.0]]]), plain(32)).sum().backward()
    assert (logits.grad != 0).all()


def test_spread_tells_a_doubtful_map_from_a_sure_one():
    sure, doubtful = torch.full((1, 1, 32, 32), -20.0), torch.full((1, 1, 32, 32), -20.0)
    sure[0, 0, 10, 10] = doubtful[0, 0, 10, 10] = 5.0
    doubtful[0, 0, 25, 25] = 4.5
    assert spatial.decode(doubtful, plain(32)).spread_px > 5 * spatial.decode(sure, plain(32)).spread_px


def test_build_codec_honours_the_kind():
    for section, kind in (
        (DiscCodecConfig, DiscCodec),
        (SpatialCodecConfig, SpatialCodec),
        (ContourCodecConfig, ContourCodec),
    ):
        assert isinstance(build_codec(section()), kind)


def test_every_kind_of_a_run_file_has_its_codec_and_its_task():
    assert {kind_of(section) for section in sections_of(Codec)} == set(CODECS)
    assert {kind_of(section) for section in sections_of(AnyTask)} == set(TASKS)


def test_a_codec_that_lacks_one_way_is_refused_when_it_is_made():
    class HalfCodec(BaseCodec):
        def loss(self, logits, points, frame):
            return logits.sum((1, 2, 3))

    class WholeCodec(HalfCodec):
        def decode(self, logits, frame):
            return spatial.decode(logits, frame)

        def with_prior(self, logits, log_prior):
            return logits

    with pytest.raises(TypeError, match="decode"):
        HalfCodec()
    assert WholeCodec().full_size
