"""Image files to grey pixels: PNG, JPEG, BMP and TIFF here, DICOM through `dicom`.

The header is checked before anything is decoded; every Pillow mode has a written conversion, and what has none is
refused with a reason. Nothing of a file but its pixels and a few technical facts goes further. Files of unknown origin
are decoded in `sandbox`, where a decoder that crashes, hangs or eats memory costs one file.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from ddpm_lmk.data.images.image import (
    MAX_PIXELS,
    DecodedImage,
    ReadOptions,
    RefusedImageError,
    check_frame,
    check_information,
    check_shape,
    luma,
)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # found by content: a `.tif` that is a JPEG is fine
_MAX_FILE_BYTES = 512 << 20  # 64 million pixels of 16 bit colour are 384 MB
_MAX_EXPANSION = 200  # decoded bytes per file byte; the real sets stay below 20
_ORIENTATION = 0x0112  # EXIF
# Tags of TIFF 6.0 and their values.
_BITS, _POLARITY, _PLANES, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 284, 320, 339
_WHITE_IS_ZERO, _SEPARATE_PLANES, _UNSIGNED, _SIGNED = 0, 2, 1, 2
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What a name or a file is to blame for, now and at every further try; everything else is the file system's fault.
_OF_THE_FILE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO),
    *(errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ENODEV, errno.EOVERFLOW),
}

_AS_STORED = ReadOptions()


def read_image(path: Path, options: ReadOptions = _AS_STORED) -> DecodedImage:
    """Decode a file. EXIF rotation, palettes, and the grey scale pipeline of DICOM are applied.

    Raises:
        RefusedImageError: the file is broken, of an unknown kind, or carries hardly any information.
        OSError: the file system does not answer, which says nothing about the file.
    """
    return decode_image(read_content(path), options)


def decode_image(data: bytes, options: ReadOptions = _AS_STORED) -> DecodedImage:
    """As `read_image`, of a file's content."""
    from ddpm_lmk.data.images.dicom import is_dicom, read_dicom

    if options.only_dicom and not is_dicom(data):
        raise RefusedImageError("NOT_DICOM", "not a DICOM file")
    image = read_dicom(data, options) if is_dicom(data) else _read_picture(data, options)
    check_information(image.pixels)
    return image


def read_opened(image: Image.Image) -> DecodedImage:
    """As `read_image`, of a picture that Pillow has opened. Raises RefusedImageError."""
    if _is_cut_to_8_bits(image):
        raise RefusedImageError("MODE", "Pillow drops the lower half of its 16-bit colours; give the path of the file")
    check_shape(*image.size)
    if image.format == "TIFF":
        pixels, full_range = _grey_of_tiff(image)
    else:
        pixels, full_range = _grey(ImageOps.exif_transpose(image)), None
    check_information(pixels)
    return DecodedImage(pixels, {"format": image.format, "mode": image.mode}, full_range)


def read_content(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a plain file, or `size` of them from `offset`. Raises as `read_image`."""
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
    """A descriptor of a plain file. Raises as `read_image`."""
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
    """Width and height of a picture after the EXIF rotation; only the header is decoded. Raises as `read_image`."""
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
        if data[:4] in _TIFF_MAGIC:
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


def _read_picture(data: bytes, options: ReadOptions) -> DecodedImage:
    with _open_picture(data, options.frame) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts: dict[str, Any] = {"format": image.format, "mode": image.mode, "applied": []}
        try:
            pixels, full_range, orientation = _decode_picture(image, data)
        except (RefusedImageError, MemoryError):
            raise
        except Exception as error:  # as above; StopIteration too, which would end a loop in silence
            raise RefusedImageError("BROKEN", f"does not decode ({type(error).__name__})") from error
    if orientation != 1:
        facts["applied"].append(f"orientation-{orientation}")
    facts["bits"] = 8 * pixels.dtype.itemsize
    return DecodedImage(pixels, facts, full_range)


def _decode_picture(image: Image.Image, data: bytes) -> tuple[np.ndarray, tuple[float, float] | None, int]:
    """Grey as seen, black and white where they are not those of the type, and the EXIF orientation."""
    has_deep_colour = _is_cut_to_8_bits(image)  # asked first: whoever asks a PNG for its EXIF has loaded it
    orientation = image.getexif().get(_ORIENTATION, 1)
    # Of TIFFs both libraries apply the orientation themselves; of the others OpenCV does not, and Pillow when asked.
    if has_deep_colour:
        pixels = _grey_of_deep_colour(image, data)
        return pixels if image.format == "TIFF" else _oriented(pixels, orientation), None, orientation
    if image.format == "TIFF":
        return *_grey_of_tiff(image), orientation
    ImageOps.exif_transpose(image, in_place=True)
    return _grey(image), None, orientation


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Has Pillow only modes of 8 bits for a picture of 16, of which it would drop the lower ones without a word?"""
    if image.format == "TIFF":
        is_deep = max(_tags(image).get(_BITS, (1,))) > 8
    else:
        is_deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
    return is_deep and image.mode in ("RGB", "RGBA", "RGBX", "CMYK", "LA", "PA")


def _tags(image: Image.Image) -> dict[int, Any]:
    return dict(getattr(image, "tag_v2", {}))


def _grey_of_deep_colour(image: Image.Image, data: bytes) -> np.ndarray:
    """Grey of colours, or of grey and alpha, of 16 bits, which OpenCV reads whole."""
    refusal = RefusedImageError("MODE", "16-bit colours that no decoder here reads whole; save it as 16-bit grey")
    # OpenCV reads inks and planes as something else, and of several pages always the first.
    if image.mode == "CMYK" or _tags(image).get(_PLANES) == _SEPARATE_PLANES or getattr(image, "n_frames", 1) > 1:
        raise refusal
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # [H, W, C], BGR or BGRA
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != (image.height, image.width):
        raise refusal
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise refusal
    # A fourth channel of a TIFF that calls itself RGB is unused; a PNG says with `transparency` that it is not.
    if pixels.shape[2] == 4 and (image.mode != "RGB" or "transparency" in image.info):
        _require_even_alpha(pixels[..., 3])
    return luma(np.ascontiguousarray(pixels[..., 2::-1]))


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As seen: EXIF orientations count mirrored ones in, and the transposed ones from 5 on (CIPA DC-008, 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _require_even_alpha(alpha: np.ndarray) -> None:
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
        _require_even_alpha(np.asarray(image)[..., 1])
        return np.ascontiguousarray(np.asarray(image)[..., 0])
    if mode in ("RGBA", "PA") or (mode == "P" and "transparency" in image.info):
        pixels = np.asarray(image.convert("RGBA"))
        _require_even_alpha(pixels[..., 3])
        return luma(np.ascontiguousarray(pixels[..., :3]))
    if mode in ("RGB", "RGBX", "P", "CMYK", "YCbCr"):
        # P: the palette is applied, so an inverted one comes out right
        return luma(np.asarray(image if mode == "RGB" else image.convert("RGB")))
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":
        return _narrow(np.asarray(image))
    if mode == "F":
        return np.asarray(image)
    raise RefusedImageError("MODE", f"colour mode {mode} is not supported")


def _narrow(pixels: np.ndarray) -> np.ndarray:
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
    bits, sample_format = (tags.get(tag, (1,))[0] for tag in (_BITS, _SAMPLE_FORMAT))
    polarity = tags.get(_POLARITY)
    image.load()
    # Pillow keeps the upper byte of an entry, which is 0 where a writer filled in 8 bits only.
    if image.mode == "P" and _COLOUR_MAP in tags and "transparency" not in image.info:
        return _apply_palette(np.asarray(image), tags[_COLOUR_MAP]), None
    pixels = _grey(image)
    if bits == 8 and sample_format == _SIGNED and image.mode == "L":
        return pixels.view(np.int8).astype(np.float32), None
    if bits == 32 and sample_format == _UNSIGNED and image.mode == "I":
        return _narrow(np.asarray(image).view(np.uint32)), None
    full_range = (0.0, float((1 << bits) - 1)) if 8 < bits < 16 else None
    # Pillow inverts 1 and 8 bits itself. Floats have no white of their own: their extremes change places.
    if polarity == _WHITE_IS_ZERO and image.mode not in ("1", "L"):
        top = full_range[1] if full_range else 65535 if pixels.dtype == np.uint16 else pixels.max() + pixels.min()
        pixels = (top - pixels).astype(pixels.dtype)
    return pixels, full_range


def _apply_palette(numbers: np.ndarray, entries: tuple[int, ...]) -> np.ndarray:
    """A TIFF's palette, of 16 bits: all red entries first. Some writers fill in 8 bits only, in either half."""
    table = np.asarray(entries, np.uint16).reshape(3, -1).T
    if table.max() < 256:
        table = table.astype(np.uint8)
    elif not (table % 257).any() or not (table % 256).any():
        table = (table >> 8).astype(np.uint8)
    if numbers.max() >= len(table):
        raise RefusedImageError("BROKEN", "numbers of colours that its palette does not have")
    return luma(np.ascontiguousarray(table[numbers]))
