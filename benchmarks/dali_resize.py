"""Why DALI does not resize here: what its filters make of a stored square against what every other loader does.

    python benchmarks/dali_resize.py [--out benchmarks/results]

A set stored at another size than `data.image_size` is shrunk by area (OpenCV) and enlarged linearly, in the type it is
stored in. DALI has no area filter; its nearest ones are compared on phantoms of 512 pixels, in grey levels of 255: the
largest difference and the mean, after rounding to the stored type as ours is. `host_us` is the processor time of ours
per image. Writes `dali_resize.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddpm_lmk.data.phantom import render
from ddpm_lmk.system.machine import hardware, versions

STORED, SIZES, COUNT, ROUNDS = 512, (256, 384, 448, 768), 8, 15


def main() -> None:
    """Compare and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    films = [render("chest", 0, index, STORED).image for index in range(COUNT)]
    result = {
        "benchmark": "dali_resize",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions("numpy", "opencv-python-headless", "nvidia-dali-cuda130"),
        "stored_px": STORED,
        "rows": [compared(films, bits, size) for bits in (8, 16) for size in SIZES],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "dali_resize.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result['rows'], indent=1)}\n{path}\n")


def compared(films: list[np.ndarray], bits: int, size: int) -> dict[str, Any]:
    """One depth and size of 16-bit films, both filters of DALI that could stand in for ours."""
    stored = films if bits == 16 else [(film >> 8).astype(np.uint8) for film in films]
    level = 1.0 if bits == 8 else 257.0
    wanted = np.stack([_ours(film, size) for film in stored]).astype(np.float64)
    row: dict[str, Any] = {"bits": bits, "size_px": size, "host_us": _cost_us(stored, size)}
    for name in ("triangular", "linear"):
        error = np.abs(np.rint(_dali(stored, size, name)) - wanted) / level
        row |= {
            f"{name}_max_levels": round(float(error.max()), 4),
            f"{name}_mean_levels": round(float(error.mean()), 4),
        }
    return row


def _ours(film: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(film, (size, size), interpolation=cv2.INTER_AREA if size < len(film) else cv2.INTER_LINEAR)


def _cost_us(stored: list[np.ndarray], size: int) -> int:
    seconds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for film in stored:
            _ours(film, size)
        seconds.append(time.process_time() - began)
    return round(statistics.median(seconds) / len(stored) * 1e6)


def _dali(stored: list[np.ndarray], size: int, name: str) -> np.ndarray:
    from nvidia.dali import Pipeline, fn, types

    dtype = types.UINT8 if stored[0].dtype == np.uint8 else types.UINT16
    kinds = {"triangular": types.INTERP_TRIANGULAR, "linear": types.INTERP_LINEAR}
    pipeline = Pipeline(batch_size=len(stored), num_threads=1, device_id=None, exec_pipelined=False, exec_async=False)
    with pipeline:
        image = fn.external_source(name="image", dtype=dtype, ndim=3, layout="HWC")
        is_smooth = name == "triangular"
        pipeline.set_outputs(
            fn.resize(image, size=(size, size), interp_type=kinds[name], antialias=is_smooth, dtype=types.FLOAT)
        )
    pipeline.build()
    pipeline.feed_input("image", [film[:, :, None] for film in stored])
    (made,) = pipeline.run()
    return np.array(made.as_tensor())[..., 0].astype(np.float64)


if __name__ == "__main__":
    main()
