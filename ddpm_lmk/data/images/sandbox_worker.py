"""The process that decodes: reads jobs from one pipe, answers on another, and can do little else.

It may not use more memory than it was granted, write files, start programs, open connections or unpickle; its parent is
`isolation`, and it dies with it. Messages are JSON and, in answers, bytes: nothing that came out of a decoder is ever
interpreted by the parent. Imports are few, because every process pays for them.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from ddpm_lmk.data.images.decode import (
    Film,
    ReadOptions,
    RefusedImageError,
    check_information,
    film_from_bytes,
    read_content,
)
from ddpm_lmk.data.images.dicom import is_dicom, read_spacing
from ddpm_lmk.data.images.resize import decode_square, encode, to_square
from ddpm_lmk.system.limits import confine
from ddpm_lmk.system.processes import die_with_parent

HEADER = struct.Struct("<II")  # sizes of the JSON and of the bytes that follow it
_FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.", "pickle.", "shutil."),
    *("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.mkdir", "os.chmod", "os.chown"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RETRY_DELAYS_S = (0.2, 1.0, 3.0)  # a network mount that is back by then costs nothing

Answer = tuple[dict[str, Any], bytes]


def answer(job: dict[str, Any]) -> Answer:
    """Do one job; never raises for what a file may cause, whatever it is.

    A job has `options` and either `phantom` (kind, seed, index, size), or `path` and perhaps `offset` and `size` in it.
    With `store`, the settings of the stored square, the bytes are an encoded shard member; without, raw pixels; with
    `only_spacing` nothing is decoded, and the answer is what a DICOM header says of it. A job with `content` is such a
    member to decode, of `size` pixels and `bits`.
    """
    if "phantom" in job:
        return _drawn(job)
    if "content" in job:
        return _guarded(lambda: ({}, decode_square(job["content"], size=job["size"], bits=job["bits"]).tobytes()))
    try:
        content = _content(job)
    except OSError as error:
        return {"io_error": error.strerror or type(error).__name__}, b""
    except RefusedImageError as error:
        return {"code": error.code, "refused": str(error)}, b""
    return _guarded(lambda: _spacing(content, job) if job.get("only_spacing") else _decoded(content, job))


def _decoded(content: bytes, job: dict[str, Any]) -> Answer:
    film = film_from_bytes(content, ReadOptions(**job["options"]))
    said = {"facts": film.facts, "mm_per_px": film.mm_per_px, "patient": film.patient}
    if "store" not in job:
        return said | _described(film), np.ascontiguousarray(film.pixels).tobytes()
    native = _native(film.pixels.shape[::-1], job["native_size"])
    said["mm_per_px"] = _per_native_px(film.mm_per_px, film.pixels.shape[::-1], native)
    return said | {"native": native}, _stored(film, native, job["store"])


def _spacing(content: bytes, job: dict[str, Any]) -> Answer:
    if not is_dicom(content):
        return {"mm_per_px": None}, b""
    mm_per_px, size = read_spacing(content, ReadOptions(**job["options"]))
    return {"mm_per_px": _per_native_px(mm_per_px, size, _native(size, job["native_size"]))}, b""


def _per_native_px(mm_per_px: float | None, size: tuple[int, ...], native: tuple[int, int]) -> float | None:
    """A file states the spacing of its own pixels, labels count native ones, of which there may be more."""
    return None if mm_per_px is None else mm_per_px * (max(size) / max(native))


def _guarded(decode: Callable[[], Answer]) -> Answer:
    """What `decode` answers, or why it does not."""
    try:
        return decode()
    except RefusedImageError as error:
        return {"code": error.code, "refused": str(error)}, b""
    except MemoryError:
        return {"code": "MEMORY", "refused": "decoding needs more memory than a decoding process may use"}, b""
    except Exception as error:  # StopIteration and whatever else a decoder leaks (failures.md, B27)
        return {"code": "BROKEN", "refused": f"decoding failed ({type(error).__name__})"}, b""


def _content(job: dict[str, Any]) -> bytes:
    for delay in (*_RETRY_DELAYS_S, None):
        try:
            return read_content(Path(job["path"]), job.get("offset", 0), job.get("size"))
        except OSError:
            if delay is None:
                raise
            time.sleep(delay)
    raise AssertionError("unreachable")


def _drawn(job: dict[str, Any]) -> Answer:
    from ddpm_lmk.data.phantom import render

    kind, seed, index, size = job["phantom"]
    drawn = render(kind, seed, index, size)
    native = _native(drawn.image.shape[::-1], None)
    said = {"native": native, "points": drawn.points.tolist(), "mm_per_px": drawn.mm_per_px, "facts": None}
    return said, _stored(Film(drawn.image), native, job["store"])


def _described(film: Film) -> dict[str, Any]:
    """What turns the bytes of the pixels into a film again."""
    kept = {"full_range": film.full_range, "is_windowed": film.is_windowed}
    return kept | {"shape": film.pixels.shape, "dtype": film.pixels.dtype.str}


def _native(size: tuple[int, ...], stated: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height the labels refer to: what the table states, as long as the file has that shape, or its own."""
    width, height = size
    if stated is None:
        return width, height
    factor = max(width, height) / max(stated)
    if any(abs(side - wanted * factor) > 1 for side, wanted in zip((width, height), stated)):
        shape = "{} x {}".format(*stated)
        raise RefusedImageError(
            "SHAPE", f"the file is {width} x {height}, which is not the shape of the stated {shape}"
        )
    return stated[0], stated[1]


def _stored(film: Film, native: tuple[int, int], store: dict[str, Any]) -> bytes:
    square = to_square(
        film.pixels,
        native,
        size=store["size"],
        aspect=store["aspect"],
        resize=store["filter"],
        window="full" if film.is_windowed else store["window"],
        bits=store["bits"],
        full_range=film.full_range,
    )
    check_information(square)
    return encode(square, store["encoding"], store["quality"])


def main() -> None:
    """Answer the jobs of standard input on standard output, until there are no more; argument: memory in bytes."""
    # Both move out of a decoder's reach: whatever it prints goes nowhere, as it may quote files.
    with open(os.dup(0), "rb") as jobs, open(os.dup(1), "wb") as answers:
        _confine(int(sys.argv[1]))
        _send(answers, {"ready": True}, b"")
        while head := jobs.read(4):
            job = json.loads(jobs.read(int.from_bytes(head, "little")))
            if "content" in job:
                job["content"] = jobs.read(job["content"])
            _send(answers, *answer(job))


def _send(answers: BinaryIO, said: dict[str, Any], content: bytes) -> None:
    text = json.dumps(said).encode("ascii")
    answers.write(HEADER.pack(len(text), len(content)) + text)
    answers.write(content)
    answers.flush()


def _confine(memory_bytes: int) -> None:
    """Give up what decoding does not need; `memory_bytes` come on top of what the process has at its start."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(1)
    sys.dont_write_bytecode = True
    confine(memory_bytes=memory_bytes, file_bytes=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.addaudithook(_forbid)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Binds Python code; what compiled decoders might do meets the limits above."""
    is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if is_writing or event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not for a decoding process")
