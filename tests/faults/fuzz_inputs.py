"""Whole files of every kind, files made wrong in a way that a seed decides, and the record of what came of them."""

from __future__ import annotations

import io
import json
import random
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_lmk.system.machine import hardware, versions
from tests.data.dicoms import dataset, table, to_bytes

_BIG = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80")
_CHANGES = ("flip", "flip", "header flip", "header flip", "number", "number", "cut", "remove", "repeat", "noise")
_CHANGES += ("zeros", "splice")


def picture(seed: int, *, kind: str, mode: str = "L", **options: Any) -> bytes:
    """A smooth picture with some noise, as a file."""
    y, x = np.mgrid[:48, :40]
    grey = (
        120 + 60 * np.sin(x / (3 + seed % 5)) + 40 * np.cos(y / 7) + np.random.default_rng(seed).normal(0, 6, (48, 40))
    )
    image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert(mode)
    if mode == "I;16":
        image = Image.fromarray((np.clip(grey, 0, 255) * 200).astype(np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds(kind: str) -> list[bytes]:
    """Whole files to start from."""
    if kind == "png":
        return [picture(n, kind="PNG", mode=mode) for n, mode in enumerate(("L", "RGB", "P", "LA", "1", "I;16"))]
    if kind == "jpeg":
        exif = Image.Exif()
        exif[0x0112] = 6
        colour = [picture(n, kind="JPEG", mode=mode) for n, mode in enumerate(("RGB", "CMYK"))]
        return [*colour, picture(2, kind="JPEG", progressive=True), picture(3, kind="JPEG", exif=exif)]
    film = dataset()
    lut = dataset(ModalityLUTSequence=[table(range(4096))], VOILUTSequence=[table(range(4096))])
    window = dataset(WindowCenter=1500, WindowWidth=900, RescaleSlope="2", RescaleIntercept="-5")
    rle = dataset()
    rle.compress("1.2.840.10008.1.2.5")
    j2k = dataset()
    j2k.compress("1.2.840.10008.1.2.4.90")
    deflated = dataset(syntax="1.2.840.10008.1.2.1.99")
    files = [to_bytes(made) for made in (film, lut, window, rle, j2k, deflated)]
    return [*files, to_bytes(dataset(), with_header=False)]


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three changes to `data`; `other` is a file of the same kind to take pieces from. Never equal to `data`."""
    changed = data
    while changed == data:
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = _change(bytearray(changed or b"\0"), other, rng)
    return changed


def _change(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(_CHANGES)
    reach = 600 if kind in ("header flip", "number") else len(data)  # sizes are in headers
    begin = rng.randrange(min(reach, len(data)))
    end = begin + rng.randint(1, 64 if kind == "noise" else 600)
    if kind in ("flip", "header flip"):
        data[begin] ^= 1 << rng.randrange(8)
    elif kind == "number":
        data[begin : begin + 4] = rng.choice(_BIG)
    elif kind == "noise":
        data[begin:end] = rng.randbytes(rng.randint(1, 64))
    elif kind == "zeros":
        data[begin:end] = bytes(len(data[begin:end]))
    elif kind == "repeat":
        data[begin:begin] = data[begin:end] * rng.randint(1, 49)
    elif kind == "remove":
        del data[begin:end]
    else:
        data[begin:] = other[rng.randrange(len(other)) :] if kind == "splice" else b""
    return bytes(data)


def write_outcomes(out: Path | None, name: str, outcomes: dict[str, Counter[str]], began: float, **facts: Any) -> None:
    """Print how many inputs ended how, and write it with the circumstances."""
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.monotonic() - began, 1),
        **facts,
        "inputs": sum(counts.total() for counts in outcomes.values()),
        "outcomes": {kind: dict(counts.most_common()) for kind, counts in outcomes.items()},
        "hardware": hardware(),
        "versions": versions("pillow", "pydicom", "pylibjpeg-openjpeg", "opencv-python-headless", "numpy"),
    }
    sys.stdout.write(f"{json.dumps(result['outcomes'], indent=1)}\n")
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
