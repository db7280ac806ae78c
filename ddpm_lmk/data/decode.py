"""Image files of any kind to grey pixels, and grey pixels to the stored square.

The header is checked before anything is decoded; every Pillow mode has a written conversion, and what has none is
refused with a reason. DICOM is not read here. Nothing of a file but its pixels goes further.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageOps

from ddpm_lmk.data.records import Aspect, Encoding, content_box

Window = Literal["percentile", "minmax", "full"]
Filter = Literal["area", "linear", "gaussian"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # found by content: a `.tif` that is a JPEG is fine
_MAX_PIXELS = 64_000_000
_MAX_EXPANSION = 200  # decoded bytes per file byte; the real sets stay below 20
_MIN_SIDE = 16
_MAX_ASPECT = 10.0
_MIN_LEVELS = 16  # distinct grey levels; the real sets have at least 105
_MAX_AT_EXTREME = 0.9  # black backgrounds of hand films reach 0.75; a clipped 12-bit file 0.94
_WINDOW_PERCENTILES = (0.1, 99.9)


class RefusedImageError(Exception):
    """An image that is left out, with the reason; never seen by users as an error."""


def open_checked(path: Path) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        RefusedImageError: not a PNG, JPEG, BMP or TIFF, several frames, too large, too small, or far from square.
    """
    try:
        size = path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes and odd metadata; the limits below decide
            image = Image.open(path, formats=_FORMATS)
            frames = getattr(image, "n_frames", 1)
    except Exception as error:  # decoders fail with any type of exception on broken files
        raise RefusedImageError(f"not a readable PNG, JPEG, BMP or TIFF ({type(error).__name__})") from error
    reason = _header_fault(image, frames, size)
    if reason is not None:
        image.close()
        raise RefusedImageError(reason)
    return image


def _header_fault(image: Image.Image, frames: int, file_size: int) -> str | None:
    width, height = image.size
    if frames != 1:
        return f"{frames} frames; one image per file is wanted"
    if width * height > _MAX_PIXELS:
        return f"{width} x {height} is more than {_MAX_PIXELS // 1_000_000} million pixels"
    if min(width, height) < _MIN_SIDE or max(width, height) > _MAX_ASPECT * min(width, height):
        return f"{width} x {height} is too small or too narrow for an x-ray"
    expanded = width * height * max(1, len(image.getbands()))
    if expanded > _MAX_EXPANSION * file_size and expanded > 1 << 20:
        return f"{file_size} bytes that expand to {expanded}: a constant picture or a decompression bomb"
    return None


def native_size(path: Path) -> tuple[int, int]:
    """Width and height as seen, that is after the EXIF rotation; reads the header only. Raises RefusedImageError."""
    with open_checked(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)


def read_grey(path: Path) -> np.ndarray:
    """Decode a file to `[H, W]`: uint8, uint16, or float32 for deeper files. EXIF rotation is applied.

    Raises:
        RefusedImageError: the file is broken, of an unknown kind, or carries hardly any information.
    """
    with open_checked(path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                is_white_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
                ImageOps.exif_transpose(image, in_place=True)
                pixels = _grey(image, is_white_zero=is_white_zero)
        except RefusedImageError:
            raise
        except Exception as error:  # as above
            raise RefusedImageError(f"does not decode ({type(error).__name__})") from error
    check_information(pixels)
    return pixels


def _grey(image: Image.Image, *, is_white_zero: bool) -> np.ndarray:
    """The conversion table. `convert("L")` is used on 8-bit modes only: on deeper ones it saturates.

    `is_white_zero`: a TIFF whose zero means white; Pillow turns 8-bit ones round itself, 16-bit ones not.
    """
    mode = image.mode
    if mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if mode in ("LA", "La"):
        return np.ascontiguousarray(np.asarray(image)[..., 0])
    if mode in ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        # P: the palette is applied, so an inverted one comes out right
        return _luma(np.asarray(image if mode == "RGB" else image.convert("RGB")))
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        pixels = np.asarray(image).astype(np.uint16)
        return np.iinfo(np.uint16).max - pixels if is_white_zero else pixels
    if mode == "I":
        pixels = np.asarray(image)
        return pixels.astype(np.uint16) if 0 <= pixels.min() <= pixels.max() <= 65535 else pixels.astype(np.float32)
    if mode == "F":
        return np.asarray(image)
    raise RefusedImageError(f"colour mode {mode} is not supported")


def _luma(rgb: np.ndarray) -> np.ndarray:
    first = rgb[..., 0]
    if np.array_equal(first, rgb[..., 1]) and np.array_equal(first, rgb[..., 2]):
        return np.ascontiguousarray(first)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def check_information(pixels: np.ndarray) -> None:
    """Refuse what no film looks like: not finite, constant, a handful of grey levels, or nearly all at one extreme."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedImageError("pixels that are not finite")
    low, high = pixels.min(), pixels.max()
    if low == high:
        raise RefusedImageError("constant image")
    # Strided rows are enough to prove there are many levels; only a poor image is counted in full.
    if len(np.unique(pixels[:: max(1, len(pixels) // 64)])) < _MIN_LEVELS and len(np.unique(pixels)) < _MIN_LEVELS:
        raise RefusedImageError(f"low information: fewer than {_MIN_LEVELS} grey levels")
    for extreme in (low, high):
        share = np.count_nonzero(pixels == extreme) / pixels.size
        if share > _MAX_AT_EXTREME:
            raise RefusedImageError(f"low information: {share:.0%} of the pixels have one value")


def to_square(
    pixels: np.ndarray, native: tuple[int, int], *, size: int, aspect: Aspect, resize: Filter, window: Window, bits: int
) -> np.ndarray:
    """The stored image `[size, size]`, uint8 or uint16.

    8-bit pixels keep their values (times 257 in 16 bits). Deeper ones are mapped linearly: the 0.1 to 99.9
    percentiles, the extremes, or the full range of the type become black and white. `pad` surrounds the image with its
    darkest value.
    """
    left, top, width, height = content_box(native, size, aspect)
    content = resized(pixels.astype(np.float32), width, height, resize)
    content = _windowed(content, pixels.dtype, window) * (255.0 if bits == 8 else 65535.0)
    content = np.rint(content).astype(np.uint8 if bits == 8 else np.uint16)
    if aspect == "squeeze":
        return content
    square = np.full((size, size), content.min(), content.dtype)
    square[top : top + height, left : left + width] = content
    return square


def resized(pixels: np.ndarray, width: int, height: int, resize: Filter) -> np.ndarray:
    """Resize float32 `[H, W]` with half-pixel centres.

    `area` averages what a pixel covers (and interpolates where it enlarges), `linear` is OpenCV's bilinear without
    anti-aliasing (the paper's pre-training), `gaussian` blurs with sigma (f - 1) / 2 first (the paper's fine-tuning).
    """
    if resize == "area":
        inner = (min(width, pixels.shape[1]), min(height, pixels.shape[0]))
        if inner != pixels.shape[::-1]:
            pixels = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA)
    elif resize == "gaussian":
        sigmas = [max(0.0, (old / new - 1) / 2) for old, new in ((pixels.shape[1], width), (pixels.shape[0], height))]
        kernels = [2 * int(4 * sigma + 0.5) + 1 for sigma in sigmas]
        for axis, (kernel, sigma) in enumerate(zip(kernels, sigmas)):
            if kernel > 1:
                ksize = (kernel, 1) if axis == 0 else (1, kernel)
                pixels = cv2.GaussianBlur(pixels, ksize, sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT_101)
    if pixels.shape != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels


def _windowed(pixels: np.ndarray, source: np.dtype, window: Window) -> np.ndarray:
    """Scale float32 pixels that came from type `source` to [0, 1]."""
    if source == np.uint8:
        return np.clip(pixels, 0, 255) / 255.0
    if window == "full":
        if source != np.uint16:
            raise RefusedImageError(
                "window=full needs 8 or 16 bit pixels; this file is deeper: use percentile or minmax"
            )
        return np.clip(pixels, 0, 65535) / 65535.0
    low, high = np.percentile(pixels, _WINDOW_PERCENTILES) if window == "percentile" else (pixels.min(), pixels.max())
    if not high > low:
        raise RefusedImageError("low information: the window between the percentiles is empty")
    return np.clip((pixels - low) / (high - low), 0.0, 1.0)


def encode(pixels: np.ndarray, encoding: Encoding, quality: int) -> bytes:
    """The bytes of a shard member: a version 1 .npy file, a PNG, or a JPEG of this quality."""
    if encoding == "raw":
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, pixels, version=(1, 0), allow_pickle=False)
        return buffer.getvalue()
    if encoding == "png":
        done, data = cv2.imencode(".png", pixels)
    else:
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "OpenCV encodes every grey image"
    return data.tobytes()
