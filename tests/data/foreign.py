"""A WebDataset as others have it: written by the package, with images of several kinds, classes and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.in_place import index_in_place
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.sources.webdataset import Roles

LABELLED = Roles(split="json:split", patient="json:patient")


def film(seed: int, *, kind: str = "png", size: tuple[int, int] = (90, 70)) -> bytes:
    """A smooth picture `size` (width, height), as grey png, png of 16 bits, or colour jpg."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.uniform(0, 1, (9, 7)).astype(np.float32))
    pixels = np.clip(np.asarray(small.resize(size, Image.Resampling.BICUBIC)), 0, 1)
    if kind == "png16":
        picture = Image.fromarray((pixels * 65535).astype(np.uint16))
    elif kind == "jpg":
        shades = np.stack([pixels, pixels**2, 1 - pixels / 2], axis=-1)
        picture = Image.fromarray((shades * 255).astype(np.uint8))
    else:
        picture = Image.fromarray((pixels * 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG" if kind == "jpg" else "PNG")
    return file.getvalue()


def write_tars(folder: Path, count: int, *, per_tar: int = 6, **more: Any) -> list[Path]:
    """`count` samples in tars `x-000000.tar` and so on; `more` are further members of each."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=per_tar, verbose=0) as writer:
        for number in range(count):
            kind = ("png", "jpg", "png16")[number % 3]
            facts = {"patient": f"patient-{number // 2}", "split": "test" if number % 6 == 5 else "train"}
            image = {kind[:3]: film(number, kind=kind, size=(90 + number, 70))}
            sample = {"__key__": f"{number:04d}", **image, "cls": number % 4, "json": facts}
            writer.write({**sample, **more})
    return sorted(folder.glob("*.tar"))


def index(source: Path | str, out: Path, roles: Roles = LABELLED, **settings: Any) -> Manifest:
    """An index in place, at 32 pixels."""
    index_in_place(str(source), out, PackSettings(kind="folder", **{"size": 32, **settings}), roles, workers=1)
    return Manifest.open(out)


def refusals(out: Path) -> dict[str, list[str]]:
    """The ids that were left out, by code."""
    found: dict[str, list[str]] = {}
    for line in map(json.loads, (out / "refused.jsonl").read_text().splitlines()):
        found.setdefault(line["code"], []).append(line["id"])
    return found
