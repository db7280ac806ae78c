"""Whole pictures and films of every kind, for the fuzz campaign to break."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from tests.data.dicoms import dataset, table, to_bytes


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
