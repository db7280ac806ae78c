"""Decodes samples into stored pictures, in parallel and in order.

A process pool with a bounded number of chunks under way: memory does not grow with the source, and results come back in
the order of the samples, so that what is written does not depend on the number of processes.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context

import cv2
import numpy as np

from ddpm_lmk.data.decode import RefusedImageError, check_information, encode, read_grey, to_square
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.raw import PhantomSource, RawSample
from ddpm_lmk.errors import DataError

_CHUNK = 8
_SOLO_LIMIT = 32  # so few images are done before other processes have started


@dataclass(frozen=True)
class Packed:
    """A picture ready to be written; `native` is width and height in native pixels."""

    sample: RawSample
    native: tuple[int, int]
    image: bytes


@dataclass(frozen=True)
class Refused:
    """A picture that is left out."""

    id: str
    reason: str


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def decoded(samples: Sequence[RawSample], settings: PackSettings, workers: int) -> Iterator[Packed | Refused]:
    """Every sample in order, decoded by `workers` processes, or in this one when there are few.

    Raises:
        DataError: a decoding process was killed, by the system or by a decoder.
    """
    if workers <= 1 or len(samples) <= _SOLO_LIMIT:
        yield from _decoded_here(samples, settings)
        return
    remaining = iter(samples)
    under_way: deque[tuple[str, Future[list[Packed | Refused]]]] = deque()
    # spawn: OpenCV's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        while True:
            while len(under_way) < 4 * workers and (chunk := list(islice(remaining, _CHUNK))):
                under_way.append((chunk[0].id, pool.submit(_decode_chunk, chunk, settings)))
            if not under_way:
                return
            first, future = under_way.popleft()
            yield from _result(first, future)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decoded_here(samples: Sequence[RawSample], settings: PackSettings) -> Iterator[Packed | Refused]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures are too small to share: on a busy machine threads waited 1.5 s for 0.04 s of work
    try:
        yield from (decode_sample(sample, settings) for sample in samples)
    finally:
        cv2.setNumThreads(threads)


def _result(first: str, future: Future[list[Packed | Refused]]) -> list[Packed | Refused]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a decoding process died at one of the {_CHUNK} images from {first!r} on, or ran out of memory; "
            f"remove that image, or use fewer workers"
        ) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(1)


def _decode_chunk(samples: list[RawSample], settings: PackSettings) -> list[Packed | Refused]:
    return [decode_sample(sample, settings) for sample in samples]


def decode_sample(sample: RawSample, settings: PackSettings) -> Packed | Refused:
    """Read or draw one picture, and bring it to its stored form."""
    try:
        if isinstance(sample.path, PhantomSource):
            sample, pixels = _draw(sample, sample.path)
        else:
            pixels = read_grey(sample.path)
        native = _checked_native(sample, pixels)
        square = to_square(
            pixels,
            native,
            size=settings.size,
            aspect=settings.aspect,
            resize=settings.filter,
            window=settings.window,
            bits=settings.bits,
        )
        check_information(square)
    except RefusedImageError as error:
        return Refused(sample.id, str(error))
    return Packed(sample, native, encode(square, settings.encoding, settings.quality))


def _draw(sample: RawSample, source: PhantomSource) -> tuple[RawSample, np.ndarray]:
    from ddpm_lmk.data.phantom import render

    drawn = render(source.kind, source.seed, source.index, source.size)
    return replace(sample, points=drawn.points, mm_per_px=drawn.mm_per_px), drawn.image


def _checked_native(sample: RawSample, pixels: np.ndarray) -> tuple[int, int]:
    """The size the labels refer to: what the table states, as long as the file has that shape, or the file's own."""
    height, width = pixels.shape
    if sample.native_size is None:
        return width, height
    factor = max(width, height) / max(sample.native_size)
    if any(abs(side - stated * factor) > 1 for side, stated in zip((width, height), sample.native_size)):
        stated = "{} x {}".format(*sample.native_size)
        raise RefusedImageError(f"the file is {width} x {height}, which is not the shape of the stated {stated}")
    return sample.native_size
