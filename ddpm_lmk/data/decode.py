"""Files of x-rays to grey pixels: PNG, JPEG, BMP, TIFF here, DICOM through `dicom`.

The header is checked before anything is decoded; every Pillow mode has a written conversion, and what has none is
refused with a reason. Nothing of a file but its pixels and a few technical facts goes further. Whoever reads files of
unknown origin does it through `isolation`, where a decoder that crashes, hangs or eats memory costs one file.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # found by content: a `.tif` that is a JPEG is fine
_MAX_FILE_BYTES = 512 << 20  # 64 million pixels of 16 bit colour are 384 MB
_MAX_EXPANSION = 200  # decoded bytes per file byte; the real sets stay below 20
_MIN_SIDE = 16
_MAX_ASPECT = 10.0
_MIN_LEVELS = 16  # distinct grey levels; the real sets have at least 105
_MAX_AT_EXTREME = 0.9  # black backgrounds of hand films reach 0.75; a clipped 12-bit file 0.94
_ORIENTATION = 0x0112  # EXIF
_WHITE_IS_ZERO = 0  # TIFF PhotometricInterpretation
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO}


class RefusedImageError(Exception):
    """An image that is left out: a code that programs read and the reason; never seen by users as an error."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class ReadOptions:
    """What may be read, and what of it is applied."""

    frame: int | None = None  # of a file with several; None: such files are refused
    voi: bool = False  # apply the grey window a DICOM file carries
    allow_burned_in: bool = False
    only_dicom: bool = False  # an export of films may hold pictures that are none


@dataclass(frozen=True)
class Film:
    """A decoded x-ray. `facts` are technical: format, bits, and what was applied to the stored values."""

    pixels: np.ndarray  # [H, W] uint8, uint16, or float32 for deeper files
    facts: dict[str, Any] = field(default_factory=dict)
    full_range: tuple[float, float] | None = None  # black and white by the file's own terms; None: that of the type
    is_windowed: bool = False  # the file's own grey window has been applied: full_range is what to show
    mm_per_px: float | None = None
    patient: str | None = None  # as the file has it: only its keyed hash may be written anywhere


def read_film(path: Path, options: ReadOptions = ReadOptions()) -> Film:
    """Decode a file. EXIF rotation, palettes, and the grey scale pipeline of DICOM are applied.

    Raises:
        RefusedImageError: the file is broken, of an unknown kind, or carries hardly any information.
        OSError: the file system does not answer, which says nothing about the file.
    """
    return film_from_bytes(read_content(path), options)


def film_from_bytes(data: bytes, options: ReadOptions = ReadOptions()) -> Film:
    """As `read_film`, of a file's content."""
    from ddpm_lmk.data.dicom import is_dicom, read_dicom

    if options.only_dicom and not is_dicom(data):
        raise RefusedImageError("NOT_DICOM", "not a DICOM file")
    film = read_dicom(data, options) if is_dicom(data) else _read_picture(data, options)
    check_information(film.pixels)
    return film


def read_content(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a plain file, or `size` of them from `offset`. Raises as `read_film`."""
    try:
        # not blocking: a pipe that looks like a picture would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise RefusedImageError("UNREADABLE", f"cannot be opened ({os.strerror(error.errno)})") from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise RefusedImageError("UNREADABLE", "not a plain file")
        wanted = info.st_size if size is None else size
        if wanted > _MAX_FILE_BYTES:
            raise RefusedImageError("TOO_LARGE", f"{wanted} bytes; up to {_MAX_FILE_BYTES >> 20} MiB are read")
        file.seek(offset)
        data = file.read(wanted)
    if not data:
        raise RefusedImageError("EMPTY", "the file is empty")
    return data


def native_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as seen, after the EXIF rotation; only the header is decoded. Raises as above."""
    with _open_picture(read_content(path), None) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)


def _open_picture(data: bytes, frame: int | None) -> Image.Image:
    """Open without decoding, at the frame that is wanted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes and odd metadata; the limits below decide
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and frame is not None and frame < frames:
                image.seek(frame)
    except Image.DecompressionBombError:
        raise RefusedImageError("TOO_LARGE", f"more than {MAX_PIXELS // 1_000_000} million pixels") from None
    except Exception as error:  # decoders fail with any type of exception on broken files
        raise RefusedImageError(
            "NOT_AN_IMAGE", f"not a readable PNG, JPEG, BMP or TIFF ({type(error).__name__})"
        ) from error
    check_frame(frames, frame)
    width, height = image.size
    check_shape(width, height)
    expanded = width * height * max(1, len(image.getbands()))
    if expanded > _MAX_EXPANSION * len(data) and expanded > 1 << 20:
        raise RefusedImageError(
            "BOMB", f"{len(data)} bytes that expand to {expanded}: a constant picture or a decompression bomb"
        )
    return image


def check_frame(frames: int, frame: int | None) -> None:
    """Refuse files with several frames, unless one that exists is asked for."""
    if frames > 1 and frame is None:
        raise RefusedImageError("FRAMES", f"{frames} frames; one image per file is wanted, or name one with --frame")
    if frame is not None and frames > 1 and frame >= frames:
        raise RefusedImageError("FRAMES", f"{frames} frames, and --frame {frame} counts from 0")


def check_shape(width: int, height: int) -> None:
    """Refuse what is too large to decode, or no film by its shape."""
    if width * height > MAX_PIXELS:
        raise RefusedImageError(
            "TOO_LARGE", f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} million pixels"
        )
    if min(width, height) < _MIN_SIDE or max(width, height) > _MAX_ASPECT * min(width, height):
        raise RefusedImageError("SHAPE", f"{width} x {height} is too small or too narrow for an x-ray")


def _read_picture(data: bytes, options: ReadOptions) -> Film:
    with _open_picture(data, options.frame) as image:
        facts: dict[str, Any] = {"format": image.format, "mode": image.mode, "applied": []}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                is_white_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == _WHITE_IS_ZERO
                orientation = image.getexif().get(_ORIENTATION, 1)
                if orientation != 1:
                    ImageOps.exif_transpose(image, in_place=True)
                    facts["applied"].append(f"orientation-{orientation}")
                pixels = _grey(image, is_white_zero=is_white_zero)
        except RefusedImageError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # as above; StopIteration too, which would end a loop in silence
            raise RefusedImageError("BROKEN", f"does not decode ({type(error).__name__})") from error
    facts["bits"] = 8 * pixels.dtype.itemsize
    return Film(pixels, facts)


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
        return luma(np.asarray(image if mode == "RGB" else image.convert("RGB")))
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        pixels = np.asarray(image).astype(np.uint16)
        return np.iinfo(np.uint16).max - pixels if is_white_zero else pixels
    if mode == "I":
        pixels = np.asarray(image)
        return pixels.astype(np.uint16) if 0 <= pixels.min() <= pixels.max() <= 65535 else pixels.astype(np.float32)
    if mode == "F":
        return np.asarray(image)
    raise RefusedImageError("MODE", f"colour mode {mode} is not supported")


def luma(rgb: np.ndarray) -> np.ndarray:
    """Grey of `[H, W, 3]`; exactly the channels' value where the three are equal."""
    first = rgb[..., 0]
    if np.array_equal(first, rgb[..., 1]) and np.array_equal(first, rgb[..., 2]):
        return np.ascontiguousarray(first)
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def check_information(pixels: np.ndarray) -> None:
    """Refuse what no film looks like: not finite, constant, a handful of grey levels, or nearly all at one extreme."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedImageError("LOW_INFORMATION", "pixels that are not finite")
    low, high = pixels.min(), pixels.max()
    if low == high:
        raise RefusedImageError("LOW_INFORMATION", "constant image")
    # Strided rows are enough to prove there are many levels; only a poor image is counted in full.
    if len(np.unique(pixels[:: max(1, len(pixels) // 64)])) < _MIN_LEVELS and len(np.unique(pixels)) < _MIN_LEVELS:
        raise RefusedImageError("LOW_INFORMATION", f"low information: fewer than {_MIN_LEVELS} grey levels")
    for extreme in (low, high):
        share = np.count_nonzero(pixels == extreme) / pixels.size
        if share > _MAX_AT_EXTREME:
            raise RefusedImageError("LOW_INFORMATION", f"low information: {share:.0%} of the pixels have one value")
