"""Decodes PNGs and JPEGs out of shards in processes of their own, so that none can stop or end a training (B27).

Their bytes are those that were packed, but who packed them may have been anybody, and a decoder that hangs holds a
thread for ever: no thread can be ended from outside. So they go where the files of packing go (`isolation`), with a
shorter deadline: two tries are over before a launcher would take the rank for dead. That costs 0.2 ms for a picture of
256 pixels, beside 0.55 ms of decoding for a PNG and 0.2 for a JPEG. Raw shards, the default, have no decoder and do not
come here. Nor does DALI: a decoder that hangs there is a rank that hangs (C6).

Processes belong to this process, not to a loader: as many as its threads decode at a time, kept for the next. So is
what came of bytes that no decoder got through: a sample that hangs is met again every epoch.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
from contextlib import ExitStack

import numpy as np

from ddpm_lmk.data.images.decode import RefusedImageError
from ddpm_lmk.data.images.sandbox import Isolation

DEADLINE_S = 10.0  # 20,000 times as long as a PNG of 256 pixels takes

_KEPT = {"TIMEOUT", "CRASH", "MEMORY"}  # what is costly to find out again

_lock = threading.Lock()
_idle: list[Isolation] = []
_refused: dict[bytes, tuple[str, str]] = {}  # by digest of the bytes
_ending = ExitStack()
atexit.register(_ending.close)


def decode_guarded(data: bytes, *, size: int, bits: int) -> np.ndarray:
    """As `stored.decode_square`, and read-only.

    Raises:
        RefusedImageError: also for bytes whose decoder twice crashed, hung, or wanted too much memory.
        LaunchError: no process can be started.
    """
    if _refused and (known := _refused.get(hashlib.sha256(data).digest())) is not None:
        raise RefusedImageError(*known)
    with _lock:
        isolation = _idle.pop() if _idle else _ending.enter_context(Isolation(1, deadline_s=DEADLINE_S))
    ((said, content),) = isolation.answers([{"content": data, "size": size, "bits": bits}])
    with _lock:  # not reached after an error: what state it is in is not known
        _idle.append(isolation)
    if "refused" in said:
        refusal = said["code"], said["refused"]
        if said["code"] in _KEPT:
            _refused[hashlib.sha256(data).digest()] = refusal
        raise RefusedImageError(*refusal)
    return np.frombuffer(content, np.uint8 if bits == 8 else np.uint16).reshape(size, size)
