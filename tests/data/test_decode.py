"""Pixels of every kind of file come out right, and what is no film is refused."""

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.decode import RefusedImageError, read_film
from ddpm_lmk.data.stored import resized, to_square

RAMP = np.add.outer(np.arange(60), 3 * np.arange(40)).astype(np.uint8)  # [60, 40]


def save(path, pixels=RAMP, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def read_grey(path):
    return read_film(path).pixels


# --- decoding


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_eight_bit_modes_of_a_grey_picture_keep_its_values(tmp_path, mode):
    np.testing.assert_array_equal(read_grey(save(tmp_path / "x.png", mode=mode)), RAMP)


def test_cmyk_comes_out_the_right_way_round(tmp_path):
    np.testing.assert_allclose(read_grey(save(tmp_path / "x.tif", mode="CMYK")), RAMP, atol=1)


def test_an_inverted_palette_is_applied(tmp_path):
    image = Image.fromarray(255 - RAMP, mode=None)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_grey(tmp_path / "x.png"), RAMP)


def test_sixteen_bits_are_not_clipped(tmp_path):
    deep = RAMP.astype(np.uint16) * 16
    np.testing.assert_array_equal(read_grey(save(tmp_path / "x.png", deep)), deep)
    np.testing.assert_array_equal(read_grey(save(tmp_path / "x.tif", deep)), deep)


def test_integers_and_floats_are_read_as_they_are(tmp_path):
    np.testing.assert_array_equal(read_grey(save(tmp_path / "i.tif", RAMP.astype(np.int32) - 9)), RAMP - 9.0)
    np.testing.assert_array_equal(read_grey(save(tmp_path / "f.tif", RAMP / np.float32(7))), RAMP / np.float32(7))


def test_a_tiff_whose_zero_is_white_is_turned_round(tmp_path):
    # Pillow turns 8-bit pixels round when it writes such a file, 16-bit ones not.
    np.testing.assert_array_equal(read_grey(save(tmp_path / "8.tif", tiffinfo={262: 0})), RAMP)
    deep = RAMP.astype(np.uint16)
    np.testing.assert_array_equal(read_grey(save(tmp_path / "16.tif", 65535 - deep, tiffinfo={262: 0})), deep)


def test_a_tif_that_is_a_jpeg_is_fine(tmp_path):
    save(tmp_path / "x.jpg", quality=100).rename(tmp_path / "x.tif")
    np.testing.assert_allclose(read_grey(tmp_path / "x.tif"), RAMP, atol=3)


def test_exif_rotation_is_applied_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_grey(tmp_path / "x.png"), np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((60, 40), 7, np.uint8), "constant"),
        (RAMP // 32, "fewer than 16 grey levels"),
        (np.where(np.arange(2400).reshape(60, 40) < 2200, 0, RAMP).astype(np.uint8), "of the pixels have one value"),
        (RAMP[:1], "too small or too narrow"),
        (np.tile(RAMP, (10, 1)), "too small or too narrow"),
        (np.full((60, 40), np.nan, np.float32), "not finite"),
    ],
)
def test_what_is_no_film_is_refused(tmp_path, pixels, reason):
    with pytest.raises(RefusedImageError, match=reason):
        read_grey(save(tmp_path / "x.tif", pixels, compression="tiff_lzw"))


def test_a_picture_that_expands_a_thousandfold_is_refused_before_decoding(tmp_path):
    with pytest.raises(RefusedImageError, match="decompression bomb"):
        read_grey(save(tmp_path / "x.png", np.zeros((3000, 3000), np.uint8)))


def test_several_frames_animations_and_foreign_formats_are_refused(tmp_path):
    frame = Image.fromarray(RAMP)
    frame.save(tmp_path / "x.tif", save_all=True, append_images=[frame])
    with pytest.raises(RefusedImageError, match="2 frames"):
        read_grey(tmp_path / "x.tif")
    frame.save(tmp_path / "x.gif")
    with pytest.raises(RefusedImageError, match="not a readable PNG"):
        read_grey((tmp_path / "x.gif").rename(tmp_path / "x.png"))


def test_a_header_that_promises_too_much_is_refused_before_decoding(tmp_path):
    path = save(tmp_path / "x.bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = (20000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(RefusedImageError, match=r"million pixels|not a readable"):
        read_grey(path)


# --- resizing


def test_area_is_the_mean_of_what_a_pixel_covers():
    pixels = np.random.default_rng(0).random((32, 32), np.float32)
    blocks = pixels.reshape(8, 4, 8, 4).mean((1, 3))
    np.testing.assert_allclose(resized(pixels, 8, 8, "area"), blocks, atol=1e-6)


@pytest.mark.parametrize("resize", ["area", "linear", "gaussian"])
@pytest.mark.parametrize("size", [(16, 24), (90, 50), (16, 90)])
def test_every_filter_keeps_half_pixel_centres(resize, size):
    width, height = size
    x, y = np.meshgrid(np.arange(64.0), np.arange(48.0))
    small = resized((2 * x + 3 * y).astype(np.float32), width, height, resize)
    x, y = np.meshgrid((np.arange(width) + 0.5) * 64 / width - 0.5, (np.arange(height) + 0.5) * 48 / height - 0.5)
    inner = np.s_[height // 3 : -height // 3, width // 3 : -width // 3]
    np.testing.assert_allclose(small[inner], (2 * x + 3 * y)[inner], atol=0.15)


def test_only_linear_aliases():
    stripes = np.tile(np.float32([0, 255]), (64, 32))
    assert np.ptp(resized(stripes, 20, 20, "linear")) > 150
    assert np.ptp(resized(stripes, 20, 20, "area")) < 100


def test_pad_keeps_the_shape_and_squeeze_fills():
    stored = {"size": 64, "resize": "area", "window": "percentile", "bits": 8}
    tall = np.full((100, 50), 200, np.uint8)
    tall[0] = 50
    assert (to_square(tall, (50, 100), aspect="squeeze", **stored)[2:] == 200).all()
    padded = to_square(tall, (50, 100), aspect="pad", **stored)
    assert (padded[2:, 16:48] == 200).all()
    assert (padded[:, :16] == padded.min()).all()


@pytest.mark.parametrize(("window", "top"), [("full", 4000 / 65535), ("minmax", 1.0), ("percentile", 1.0)])
def test_deep_pixels_are_mapped_by_the_window(window, top):
    deep = np.linspace(1000, 4000, 64 * 64).astype(np.uint16).reshape(64, 64)
    stored = to_square(deep, (64, 64), size=64, aspect="squeeze", resize="area", window=window, bits=16)
    assert stored.max() / 65535 == pytest.approx(top, abs=1e-3)
    assert stored.min() == (1000 if window == "full" else 0)
