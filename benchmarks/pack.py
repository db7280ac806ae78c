"""Images per second of packing, and size and reading speed of each encoding at 256 px.

    python benchmarks/pack.py --source table:TABLE_DIR [--source folder:DIR] [--source phantom:skull] [--name NAME]

One process packs (`workers=1`; it decodes in a second one) and reads, with pixels in the page cache. `..._per_cpu_s`
divides by processor seconds and so holds on a busy machine too; reading is read, check of the sha256, and decode.
`rms_levels` is the difference from the raw encoding, in grey levels of 255. Writes `pack_NAME.json` into `--out`; the
default encoding was chosen from what it says of the 300 ISBI cephalograms (`pack_real.json`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system.machine import hardware, versions

SIZE_PX = 256
ENCODINGS: tuple[tuple[Any, int, int], ...] = (
    ("raw", 8, 95),
    ("png", 8, 95),
    ("jpeg", 8, 95),
    ("jpeg", 8, 85),
    ("raw", 16, 95),
    ("png", 16, 95),
)
PHANTOMS = 50


def main() -> None:
    """Pack every source in every encoding and write the result file."""
    options = _options()
    cv2.setNumThreads(1)
    rows: list[dict[str, Any]] = []
    for source in options.source:
        kind, _, where = source.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            raw: dict[int, Path] = {}
            for encoding, bits, quality in ENCODINGS:
                out = Path(folder) / f"{encoding}{bits}-{quality}"
                row = measure(kind, where, out, encoding=encoding, bits=bits, quality=quality)
                raw.setdefault(bits, out)
                row["rms_levels"] = round(_difference(raw[bits], out), 3)
                rows.append(row)
                sys.stdout.write(f"{json.dumps(row)}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"pack_{options.name}.json"
    path.write_text(json.dumps({**_circumstances(), "rows": rows}, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


def measure(kind: Any, where: str, out: Path, *, encoding: Any, bits: int, quality: int) -> dict[str, Any]:
    """One row: pack, then read everything three times and keep the fastest."""
    counts = {"train": PHANTOMS} if kind == "phantom" else None
    wall, cpu = time.perf_counter(), _cpu_s()
    summary = pack(
        where,
        out,
        PackSettings(kind=kind, size=SIZE_PX, encoding=encoding, bits=bits, quality=quality, counts=counts or {}),
        workers=1,
    )
    wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    read_wall, read_cpu = min((_read_all(out) for _ in range(3)), key=lambda times: times[1])
    return {
        "kind": kind,
        "dataset": Manifest.open(out).dataset,
        "images": summary.packed,
        "encoding": encoding,
        "bits": bits,
        "quality": quality if encoding == "jpeg" else None,
        "bytes_per_image": round(summary.image_bytes / summary.packed),
        "pack_images_per_s": round(summary.packed / wall, 1),
        "pack_images_per_cpu_s": round(summary.packed / cpu, 1),
        "read_images_per_s": round(summary.packed / read_wall, 1),
        "read_images_per_cpu_s": round(summary.packed / read_cpu, 1),
    }


def _cpu_s() -> float:
    """Of this process and of the decoding processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read_all(out: Path) -> tuple[float, float]:
    manifest = Manifest.open(out)
    wall, cpu = time.perf_counter(), time.process_time()
    for row in range(len(manifest)):
        manifest.decode(row)
    times = time.perf_counter() - wall, time.process_time() - cpu
    manifest.close()
    return times


def _difference(reference: Path, out: Path) -> float:
    """Root mean square difference over up to 50 images, in levels of 255."""
    wanted, found = Manifest.open(reference), Manifest.open(out)
    squares = []
    for row in range(min(50, len(wanted))):
        a, b = wanted.decode(row), found.decode(row)
        squares.append(np.mean(((a.astype(float) - b) * 255 / np.iinfo(a.dtype).max) ** 2))
    return float(np.sqrt(np.mean(squares)))


def _circumstances() -> dict[str, Any]:
    return {
        "benchmark": "pack",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "stored_size_px": SIZE_PX,
        "processes": 1,
        "hardware": hardware(),
        "versions": versions("numpy", "opencv-python-headless", "pillow"),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", metavar="KIND:WHERE", help="as of `shards pack`; repeatable")
    parser.add_argument("--name", default="phantoms", help="the result is pack_NAME.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    options = parser.parse_args()
    options.source = options.source or ["phantom:chest", "phantom:skull", "phantom:hand"]
    return options


if __name__ == "__main__":
    main()
