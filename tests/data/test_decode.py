"""Pixels of every kind of file come out right, and what is no film is refused."""

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.images.decode import decode_image, native_size, read_image
from ddpm_lmk.data.images.image import ReadOptions, RefusedImageError
from ddpm_lmk.data.images.resize import resized, to_square
from tests.data.pictures import picture_cases, smooth, tiff

RAMP = np.add.outer(np.arange(60), 3 * np.arange(40)).astype(np.uint8)  # [60, 40]


CASES = {case.name: case for case in picture_cases(0)}


def save(path, pixels=RAMP, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


# --- decoding


def test_every_depth_colour_type_and_container_keeps_its_greys_or_is_refused():
    assert len(CASES) > 200
    assert list(filter(None, (case.fault() for case in CASES.values()))) == []


def test_a_size_without_decoding_is_that_of_the_decoded_picture(tmp_path):
    for name, case in CASES.items():
        if "orientation" in name:
            (tmp_path / "x").write_bytes(case.data)
            assert native_size(tmp_path / "x") == case.grey.shape[::-1], name


def test_full_range_of_twelve_bits_is_that_of_twelve_bits():
    assert decode_image(CASES["tiff< grey 12 polarity 1"].data).full_range == (0, 4095)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("png LA 8 with holes", "of the pixels are transparent; save it without transparency"),
        ("tiff< CMYK 16", "16-bit colours that no decoder here reads whole; save it as 16-bit grey"),
        ("tiff< float64 polarity 1", "a TIFF that is damaged, or of a kind that is not read; save it as grey"),
    ],
)
def test_what_would_come_out_wrong_is_refused_with_what_to_do(name, words):
    with pytest.raises(RefusedImageError, match=words):
        decode_image(CASES[name].data)


def test_a_tif_that_is_a_jpeg_is_fine(tmp_path):
    save(tmp_path / "x.jpg", quality=100).rename(tmp_path / "x.tif")
    np.testing.assert_allclose(read_image(tmp_path / "x.tif").pixels, RAMP, atol=3)


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
        read_image(save(tmp_path / "x.tif", pixels, compression="tiff_lzw"))


def test_a_picture_that_expands_a_thousandfold_is_refused_before_decoding(tmp_path):
    with pytest.raises(RefusedImageError, match="decompression bomb"):
        read_image(save(tmp_path / "x.png", np.zeros((3000, 3000), np.uint8)))


def test_several_frames_animations_and_foreign_formats_are_refused(tmp_path):
    frame = Image.fromarray(RAMP)
    frame.save(tmp_path / "x.tif", save_all=True, append_images=[frame])
    with pytest.raises(RefusedImageError, match="2 frames"):
        read_image(tmp_path / "x.tif")
    frame.save(tmp_path / "x.gif")
    with pytest.raises(RefusedImageError, match="not a readable PNG"):
        read_image((tmp_path / "x.gif").rename(tmp_path / "x.png"))


def test_what_a_name_is_to_blame_for_is_refused_and_never_taken_for_a_lost_file_system(tmp_path):
    (tmp_path / "folder").mkdir()
    save(tmp_path / "x.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    faults = {
        "folder": "is a folder",
        ".": "is a folder",
        "x.png/y.png": "Not a directory",
        "n" * 300: "File name too long",
        "loop": "Too many levels",
        "gone": "No such file",
        "a\0b": "embedded null",  # "byte" or "character", by the release of Python
    }
    for name, reason in faults.items():
        with pytest.raises(RefusedImageError, match=reason):
            read_image(tmp_path / name)


def test_a_header_that_promises_too_much_is_refused_before_decoding(tmp_path):
    path = save(tmp_path / "x.bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = (20000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(RefusedImageError, match=r"million pixels|not a readable"):
        read_image(path)


def test_the_frame_that_is_asked_for_is_never_another():
    pages = []
    for seed in (0, 1):
        colours = np.stack([smooth(seed, 16)] * 3, 2).astype("<u2")
        pages.append((colours.tobytes(), {258: [16] * 3, 262: 2, 277: 3}))
    with pytest.raises(RefusedImageError, match="16-bit colours"):
        decode_image(tiff(pages), ReadOptions(frame=1))
    pages = [(smooth(seed, 16).astype("<u2").tobytes(), {258: 16, 262: 1, 277: 1}) for seed in (0, 1)]
    np.testing.assert_array_equal(decode_image(tiff(pages), ReadOptions(frame=1)).pixels, smooth(1, 16))


def test_integers_that_floats_do_not_hold_are_refused(tmp_path):
    with pytest.raises(RefusedImageError, match="32-bit values of more than 24 bits"):
        read_image(save(tmp_path / "i.tif", RAMP.astype(np.int32) + (1 << 30) + 1))


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
