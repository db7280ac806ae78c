"""Decoding in confined processes (`system.sandbox`): what parents ask for, and the program that answers.

Files to be packed or predicted are of unknown origin. PNGs and JPEGs out of shards are the bytes that were packed, but
who packed them may have been anybody, so they are decoded here too. That costs 0.2 ms for an image of 256 pixels,
beside 0.55 ms of decoding for a PNG and 0.2 for a JPEG. Raw shards, the default, have no decoder and do not come here.
Images of a dataset in place go through all that packing does with them, at every access.
Nor does DALI: a decoder that hangs there is a rank that hangs (docs/faults.md, C6).
"""

from __future__ import annotations

import atexit
import hashlib
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.images.decode import decode_image, read_content
from ddpm_lmk.data.images.dicom import is_dicom, read_spacing
from ddpm_lmk.data.images.image import DecodedImage, ReadOptions, RefusedImageError, check_information
from ddpm_lmk.data.images.resize import as_packed, decode_square, encode
from ddpm_lmk.system.sandbox import Answer, Limits, Sandbox, serve

LIMITS = Limits(memory_bytes=2 << 30, deadline_s=30.0)
# 20,000 times as long as a PNG of 256 pixels takes. Two tries end before a launcher takes the rank for dead (60 s).
SHARD_LIMITS = Limits(memory_bytes=2 << 30, deadline_s=10.0)
_MODULE = "ddpm_lmk.data.images.sandbox"
_COSTLY = {"TIMEOUT", "CRASH", "MEMORY"}  # refusals that are remembered: such a sample is met again every epoch
_RETRY_DELAYS_S = (0.2, 1.0, 3.0)  # a network mount that is back by then costs nothing

_refused: dict[bytes, tuple[str, str]] = {}  # by digest of the bytes


def decoders(count: int, limits: Limits = LIMITS) -> Sandbox:
    """`count` processes that answer the jobs of `answer`."""
    return Sandbox(_MODULE, limits, count=count)


def decode_sandboxed(data: bytes, *, size: int, bits: int, settings: Mapping[str, Any] | None = None) -> np.ndarray:
    """As `resize.decode_square`, and read-only; any number of threads may call.

    Args:
        settings: pack settings, where the image is one that was not packed; the stored image it would be is returned.

    Raises:
        RefusedImageError: also for bytes whose decoder twice crashed, hung, or wanted too much memory.
        LaunchError: no process can be started.
    """
    if _refused and (known := _refused.get(hashlib.sha256(data).digest())) is not None:
        raise RefusedImageError(*known)
    how = {"size": size, "bits": bits} if settings is None else job_settings(settings)
    fields, content = _shard_decoders().ask({"content": data, **how})
    if "refused" in fields:
        refusal = fields["code"], fields["refused"]
        if fields["code"] in _COSTLY:
            _refused[hashlib.sha256(data).digest()] = refusal
        raise RefusedImageError(*refusal)
    return np.frombuffer(content, np.uint8 if bits == 8 else np.uint16).reshape(size, size)


@cache
def _shard_decoders() -> Sandbox:
    """Of this process, not of a loader: as many processes as its threads decode at a time, left to the next loader."""
    sandbox = decoders(1, SHARD_LIMITS)
    atexit.register(sandbox.__exit__, None, None, None)
    return sandbox


def job_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a job says of pack settings: how a file is read, and the stored square."""
    return {
        "options": {
            "frame": settings["frame"],
            "voi": settings["window"] == "voi",
            "allow_burned_in": settings["allow_burned_in"],
            "only_dicom": settings["kind"] == "dicom",
        },
        "store": {key: settings[key] for key in ("size", "aspect", "filter", "window", "bits", "encoding", "quality")},
    }


def answer(job: dict[str, Any]) -> Answer:
    """Do one job.

    A job has `options` and either `phantom` (kind, seed, index, size), or `path` and perhaps `offset` and `size` in it.
    With `store`, the settings of the stored square, the bytes are an encoded shard member; without, raw pixels; with
    `only_spacing` nothing is decoded, and the answer is what a DICOM header says of it. A job with `content` is such a
    member to decode, of `size` pixels and `bits`; with `store` too, an image that was not packed, whose stored pixels
    are the answer. With `digest` the answer has that of the file's bytes.
    """
    try:
        if "phantom" in job:
            return _draw(job)
        if "content" in job and "store" in job:
            image = decode_image(job["content"], ReadOptions(**job["options"]))
            return {}, as_packed(image, image.size, job["store"]).tobytes()
        if "content" in job:
            return {}, decode_square(job["content"], size=job["size"], bits=job["bits"]).tobytes()
        content = _read_patiently(job)
        if isinstance(content, OSError):  # what decoders raise is the file's fault, this is the file system's
            return {"io_error": content.strerror or type(content).__name__}, b""
        return _spacing(content, job) if job.get("only_spacing") else _decode(content, job)
    except RefusedImageError as error:
        return {"code": error.code, "refused": str(error)}, b""


def _read_patiently(job: dict[str, Any]) -> bytes | OSError:
    delays = iter(_RETRY_DELAYS_S)
    while True:
        try:
            return read_content(Path(job["path"]), job.get("offset", 0), job.get("size"))
        except OSError as error:
            if (delay := next(delays, None)) is None:
                return error
            time.sleep(delay)


def _decode(content: bytes, job: dict[str, Any]) -> Answer:
    image = decode_image(content, ReadOptions(**job["options"]))
    fields: dict[str, Any] = {"facts": image.facts, "mm_per_px": image.mm_per_px, "patient": image.patient}
    if "store" not in job:
        fields |= {"full_range": image.full_range, "is_windowed": image.is_windowed}
        fields |= {"shape": image.pixels.shape, "dtype": image.pixels.dtype.str}
        return fields, np.ascontiguousarray(image.pixels).tobytes()
    native = _native_size(image.size, job["native_size"])
    if job.get("digest"):
        fields["sha256"] = hashlib.sha256(content).hexdigest()[:32]
    fields |= {"native": native, "mm_per_px": _per_native_px(image.mm_per_px, image.size, native)}
    return fields, _encode_square(image, native, job["store"])


def _spacing(content: bytes, job: dict[str, Any]) -> Answer:
    if not is_dicom(content):
        return {"mm_per_px": None}, b""
    mm_per_px, size = read_spacing(content, ReadOptions(**job["options"]))
    return {"mm_per_px": _per_native_px(mm_per_px, size, _native_size(size, job["native_size"]))}, b""


def _draw(job: dict[str, Any]) -> Answer:
    from ddpm_lmk.data.phantom import render

    kind, seed, index, size = job["phantom"]
    phantom = render(kind, seed, index, size)
    image = DecodedImage(phantom.image)
    fields = {"native": image.size, "points": phantom.points.tolist(), "mm_per_px": phantom.mm_per_px, "facts": None}
    return fields, _encode_square(image, image.size, job["store"])


def _native_size(size: tuple[int, int], stated: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height the labels refer to: what the table states, as long as the file has that shape, or its own."""
    if stated is None:
        return size
    factor = max(size) / max(stated)
    if any(abs(side - wanted * factor) > 1 for side, wanted in zip(size, stated)):
        raise RefusedImageError(
            "SHAPE",
            f"the file is {size[0]} x {size[1]}, which is not the shape of the stated {stated[0]} x {stated[1]}",
        )
    return stated[0], stated[1]


def _per_native_px(mm_per_px: float | None, size: tuple[int, int], native: tuple[int, int]) -> float | None:
    """A file states the spacing of its own pixels, labels count native ones, of which there may be more."""
    return None if mm_per_px is None else mm_per_px * (max(size) / max(native))


def _encode_square(image: DecodedImage, native: tuple[int, int], store: dict[str, Any]) -> bytes:
    square = as_packed(image, native, store)
    check_information(square)  # a window may leave nothing of an image that had something to show
    return encode(square, store["encoding"], store["quality"])


if __name__ == "__main__":
    cv2.setNumThreads(1)  # many decoding processes share the cores
    serve(answer)
