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
_BITS, _SIGNS, _POLARITY, _COLOUR_MAP = 258, 339, 262, 320  # tags of TIFF: BitsPerSample, SampleFormat, ...
_WHITE_IS_ZERO = 0
_TIFF_BEGINS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNSIGNED, _SIGNED = 1, 2
_PLANES, _SEPARATE = 284, 2  # PlanarConfiguration
# What a name or a file is to blame for, now and at every further try; everything else is the file system's fault.
_OF_THE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO),
    *(errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ENODEV, errno.EOVERFLOW),
}


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
    from ddpm_lmk.data.images.dicom import is_dicom, read_dicom

    if options.only_dicom and not is_dicom(data):
        raise RefusedImageError("NOT_DICOM", "not a DICOM file")
    film = read_dicom(data, options) if is_dicom(data) else _read_picture(data, options)
    check_information(film.pixels)
    return film


def read_content(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a plain file, or `size` of them from `offset`. Raises as `read_film`."""
    with open(_open_plain(path), "rb") as file:
        info = os.fstat(file.fileno())
        wanted = info.st_size if size is None else size
        if wanted > _MAX_FILE_BYTES:
            raise RefusedImageError("TOO_LARGE", f"{wanted} bytes; up to {_MAX_FILE_BYTES >> 20} MiB are read")
        file.seek(offset)
        data = file.read(wanted)
    if not data:
        raise RefusedImageError("EMPTY", "the file is empty")
    return data


def _open_plain(path: Path) -> int:
    """A descriptor of a plain file. Raises as `read_film`."""
    try:
        # not blocking: a pipe that looks like a picture would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name, or one that this system cannot spell
        raise RefusedImageError("UNREADABLE", f"cannot be opened ({error})") from None
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise RefusedImageError("UNREADABLE", f"cannot be opened ({os.strerror(error.errno)})") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise RefusedImageError("UNREADABLE", "is a folder" if stat.S_ISDIR(mode) else "not a plain file")
    return descriptor


def native_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as seen, after the EXIF rotation; only the header is decoded. Raises as above."""
    with _open_picture(read_content(path), None) as image:
        width, height = image.size
        is_turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # TIFFs are already
        return (height, width) if is_turned else (width, height)


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
        if data[:4] in _TIFF_BEGINS:
            raise RefusedImageError(
                "NOT_AN_IMAGE", "a TIFF that is damaged, or of a kind that is not read; save it as grey of 8 or 16 bits"
            ) from error
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
        full_range = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                is_cut = _is_cut_to_8_bits(image)  # asked first: whoever asks a PNG for its EXIF has loaded it
                orientation = image.getexif().get(_ORIENTATION, 1)
                if orientation != 1:
                    facts["applied"].append(f"orientation-{orientation}")
                if is_cut:
                    pixels = _deep_colour(image, data)
                    pixels = pixels if image.format == "TIFF" else _turned(pixels, orientation)
                elif image.format == "TIFF":  # both libraries turn these themselves
                    pixels, full_range = _grey_of_tiff(image)
                else:
                    ImageOps.exif_transpose(image, in_place=True)
                    pixels = _grey(image)
        except RefusedImageError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # as above; StopIteration too, which would end a loop in silence
            raise RefusedImageError("BROKEN", f"does not decode ({type(error).__name__})") from error
    facts["bits"] = 8 * pixels.dtype.itemsize
    return Film(pixels, facts, full_range)


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Has Pillow only modes of 8 bits for a picture of 16, of which it would drop the lower ones without a word?"""
    if image.format == "TIFF":
        is_deep = max(_tags(image).get(_BITS, (1,))) > 8
    else:
        is_deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
    return is_deep and image.mode in ("RGB", "RGBA", "RGBX", "CMYK", "LA", "PA")


def _tags(image: Image.Image) -> dict[int, Any]:
    return dict(getattr(image, "tag_v2", {}))


def _deep_colour(image: Image.Image, data: bytes) -> np.ndarray:
    """Grey of colours, or of grey and alpha, of 16 bits, which OpenCV reads whole: no inks, no planes, one picture."""
    refusal = RefusedImageError("MODE", "16-bit colours that no decoder here reads whole; save it as 16-bit grey")
    if image.mode == "CMYK" or _tags(image).get(_PLANES) == _SEPARATE or getattr(image, "n_frames", 1) > 1:
        raise refusal
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.shape[:2] != (image.height, image.width):
        raise refusal
    if found.ndim != 3 or found.shape[2] not in (3, 4):
        raise refusal
    if found.shape[2] == 4 and (image.mode != "RGB" or "transparency" in image.info):
        _require_even(found[..., 3])
    return luma(np.ascontiguousarray(found[..., 2::-1]))


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As seen: EXIF orientations count mirrored ones in, and the transposed ones from 5 on (CIPA DC-008, 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _require_even(alpha: np.ndarray) -> None:
    """Refuse a picture that is transparent in places: nobody can know what it hides there, or is to be seen on."""
    if alpha.min() != alpha.max():
        share = np.count_nonzero(alpha != alpha.max()) / alpha.size
        raise RefusedImageError(
            "TRANSPARENT", f"{share:.1%} of the pixels are transparent; save it without transparency, on its background"
        )


def _grey(image: Image.Image) -> np.ndarray:
    """The conversion table. `convert("L")` is used on 8-bit modes only: on deeper ones it saturates."""
    mode = image.mode
    if mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if mode in ("LA", "La"):
        _require_even(np.asarray(image)[..., 1])
        return np.ascontiguousarray(np.asarray(image)[..., 0])
    if mode in ("RGBA", "PA") or (mode == "P" and "transparency" in image.info):
        pixels = np.asarray(image.convert("RGBA"))
        _require_even(pixels[..., 3])
        return luma(np.ascontiguousarray(pixels[..., :3]))
    if mode in ("RGB", "RGBX", "P", "CMYK", "YCbCr"):
        # P: the palette is applied, so an inverted one comes out right
        return luma(np.asarray(image if mode == "RGB" else image.convert("RGB")))
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":
        return _narrowed(np.asarray(image))
    if mode == "F":
        return np.asarray(image)
    raise RefusedImageError("MODE", f"colour mode {mode} is not supported")


def _narrowed(pixels: np.ndarray) -> np.ndarray:
    """32-bit integers as uint16 where they fit, else as float32 if that holds each of them."""
    if 0 <= pixels.min() <= pixels.max() <= 65535:
        return pixels.astype(np.uint16)
    floats = pixels.astype(np.float32)
    if not np.array_equal(floats.astype(np.float64), pixels):
        raise RefusedImageError("MODE", "32-bit values of more than 24 bits; save it as 16-bit grey")
    return floats


def _grey_of_tiff(image: Image.Image) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Grey of a TIFF, and black and white where they are not those of the type.

    Pillow takes no notice of signs, of a white zero of 16 bits and floats, and of the lower half of a palette's
    entries; the tags are asked before it drops them in loading.
    """
    tags = _tags(image)
    bits, signs = (tags.get(tag, (1,))[0] for tag in (_BITS, _SIGNS))
    polarity = tags.get(_POLARITY)
    image.load()
    if image.mode == "P" and _COLOUR_MAP in tags and "transparency" not in image.info:
        return _looked_up(np.asarray(image), tags[_COLOUR_MAP]), None
    pixels = _grey(image)
    if bits == 8 and signs == _SIGNED and image.mode == "L":
        return pixels.view(np.int8).astype(np.float32), None
    if bits == 32 and signs == _UNSIGNED and image.mode == "I":
        return _narrowed(np.asarray(image).view(np.uint32)), None
    full_range = (0.0, float((1 << bits) - 1)) if 8 < bits < 16 else None
    if polarity == _WHITE_IS_ZERO and image.mode not in ("1", "L"):
        top = full_range[1] if full_range else 65535 if pixels.dtype == np.uint16 else pixels.max() + pixels.min()
        pixels = (top - pixels).astype(pixels.dtype)
    return pixels, full_range


def _looked_up(numbers: np.ndarray, entries: tuple[int, ...]) -> np.ndarray:
    """A TIFF's palette, of 16 bits: all red entries first. Some writers fill in 8 bits only, in either half."""
    table = np.asarray(entries, np.uint16).reshape(3, -1).T
    if table.max() < 256:
        table = table.astype(np.uint8)
    elif not (table % 257).any() or not (table % 256).any():
        table = (table >> 8).astype(np.uint8)
    if numbers.max() >= len(table):
        raise RefusedImageError("BROKEN", "numbers of colours that its palette does not have")
    return luma(np.ascontiguousarray(table[numbers]))


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
