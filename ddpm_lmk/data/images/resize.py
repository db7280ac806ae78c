"""From decoded pixels to the stored square, and back from its bytes: grey window, one anti-aliased resize, encoding.

An image is resized once at packing (`as_packed`) and, where the network takes another size, again when it is read
(`to_network_size`). `predict` does both, by the same functions.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import cv2
import numpy as np

from ddpm_lmk.data.images.image import DecodedImage, RefusedImageError
from ddpm_lmk.data.shards.records import Aspect, Encoding, content_box

Window = Literal["percentile", "minmax", "full", "voi"]
Filter = Literal["area", "linear", "gaussian"]

_WINDOW_PERCENTILES = (0.1, 99.9)  # markers and collimators are a few pixels at the extremes


def as_packed(image: DecodedImage, native: tuple[int, int], settings: Mapping[str, Any]) -> np.ndarray:
    """The stored image of a decoded one under these pack settings: size, aspect, filter, window, bits."""
    return to_square(
        image.pixels,
        native,
        size=settings["size"],
        aspect=settings["aspect"],
        resize=settings["filter"],
        window="full" if image.is_windowed else settings["window"],
        bits=settings["bits"],
        full_range=image.full_range,
    )


def to_network_size(stored: np.ndarray, size: int) -> np.ndarray:
    """A stored image at the side that the network takes."""
    if stored.shape == (size, size):
        return stored
    method = cv2.INTER_AREA if size < len(stored) else cv2.INTER_LINEAR
    return cv2.resize(stored, (size, size), interpolation=method)


def to_square(
    pixels: np.ndarray,
    native: tuple[int, int],
    *,
    size: int,
    aspect: Aspect,
    resize: Filter,
    window: Window,
    bits: int,
    full_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """The stored image `[size, size]`, uint8 or uint16.

    8-bit pixels keep their values (times 257 in 16 bits). Deeper ones are mapped linearly: the 0.1 to 99.9
    percentiles (`percentile`, and `voi` where a file has no window of its own), the extremes, or `full_range` become
    black and white. `pad` surrounds the image with its darkest value.

    Args:
        full_range: what black and white are to the file itself; None: the range of an integer type.
    """
    left, top, width, height = content_box(native, size, aspect)
    # Resized before the window is applied: percentiles are then those of what is stored.
    content = resized(pixels.astype(np.float32), width, height, resize)
    content = _windowed(content, pixels.dtype, window, full_range) * (255.0 if bits == 8 else 65535.0)
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
        # INTER_AREA enlarges by repeating pixels, so a side that grows is left to INTER_LINEAR below.
        inner = (min(width, pixels.shape[1]), min(height, pixels.shape[0]))
        if inner != pixels.shape[::-1]:
            pixels = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA)
    elif resize == "gaussian":
        for axis, (old, new) in enumerate(((pixels.shape[1], width), (pixels.shape[0], height))):
            sigma = max(0.0, (old / new - 1) / 2)
            kernel = 2 * int(4 * sigma + 0.5) + 1  # cut at 4 sigma, as scipy and scikit-image do
            if kernel > 1:
                ksize = (kernel, 1) if axis == 0 else (1, kernel)
                pixels = cv2.GaussianBlur(pixels, ksize, sigma, sigmaY=sigma, borderType=cv2.BORDER_REFLECT_101)
    if pixels.shape != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels


def _windowed(
    pixels: np.ndarray, source: np.dtype, window: Window, full_range: tuple[float, float] | None
) -> np.ndarray:
    """Scale float32 pixels that came from type `source` to [0, 1]."""
    if full_range is None and source.kind == "u":
        full_range = (0.0, float(np.iinfo(source).max))
    if source == np.uint8 or window == "full":
        if full_range is None:
            raise RefusedImageError(
                "NO_RANGE", "window=full needs 8 or 16 bit pixels; this file is deeper: use percentile or minmax"
            )
        low, high = full_range
    elif window == "minmax":
        low, high = float(pixels.min()), float(pixels.max())
    else:
        low, high = np.percentile(pixels, _WINDOW_PERCENTILES)
    if not high > low:
        raise RefusedImageError("LOW_INFORMATION", "low information: the grey window is empty")
    return np.clip((pixels - low) / (high - low), 0.0, 1.0)


def encode(pixels: np.ndarray, encoding: Encoding, quality: int) -> bytes:
    """The bytes of a shard member: a version 1 .npy file, a PNG, or a JPEG of this quality."""
    if encoding == "raw":
        buffer = io.BytesIO()
        # The version is pinned: digests of shards must not depend on which one numpy prefers.
        np.lib.format.write_array(buffer, pixels, version=(1, 0), allow_pickle=False)
        return buffer.getvalue()
    if encoding == "png":
        done, data = cv2.imencode(".png", pixels)
    else:
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "OpenCV encodes every grey image"
    return data.tobytes()


def decode_square(data: bytes, *, size: int, bits: int) -> np.ndarray:
    """Pixels of a PNG or JPEG that `encode` made, uint8 or uint16 `[size, size]`; RefusedImageError if it is none."""
    wanted = np.dtype(np.uint8 if bits == 8 else np.uint16)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape != (size, size) or image.dtype != wanted:
        raise RefusedImageError("BROKEN", f"does not decode to {size} x {size} {wanted.name}")
    return image
