"""Images per second of the training loader: each residency, with and without augmentation, at 128 and 256 px.

    python benchmarks/loader.py [--data PACK] [--out benchmarks/results] [--device cpu] [--seconds 3] [--workers 2]

Without `--data` it packs synthetic skulls first. Nothing trains: the consumer only takes the groups, so the figures are
the most a training loop can get. `images_per_cpu_s` divides by processor seconds of this process and so holds on a busy
machine too. Writes `loader.json` (`loader-NAME.json` for a given pack) into `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack import pack
from ddpm_lmk.data.shards import Manifest
from ddpm_lmk.machine import hardware, versions

GROUP_SIZE = 32
PHANTOMS = 256
SIZES = (128, 256)
RESIDENCIES = ("stream", "ram", "device")


def main() -> None:
    """Measure every combination and write the result file."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder) / "skulls"
            pack("skull", "phantom", data, counts={"train": PHANTOMS}, size=max(SIZES))
        manifest = Manifest.open(data)
        rows = [
            measure(data, size, residency, augmented=augmented, options=options)
            for size, residency, augmented in itertools.product(SIZES, RESIDENCIES, (False, True))
        ]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("loader.json" if options.data is None else f"loader-{manifest.dataset}.json")
    path.write_text(json.dumps({**_circumstances(manifest, options), "rows": rows}, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


def measure(data: Path, size: int, residency: str, *, augmented: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row: open the loader, take two groups to warm up, then groups for `--seconds`."""
    cfg = RunConfig.model_validate(
        {
            "data": {
                "path": str(data),
                "image_size": size,
                "residency": residency,
                "workers": options.workers,
                "augment": {"probability": 1.0 if augmented else 0.0},
            },
            "task": {"kind": "denoise"},
            "train": {"group_size": GROUP_SIZE},
        }
    )
    began = time.perf_counter()
    loader = open_loader(cfg, stage="train", device=options.device)
    open_s = time.perf_counter() - began
    groups = loader.groups(0)
    for _ in range(2):
        next(groups)
    wall, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < options.seconds:
        images += next(groups).size
    _finish(options.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    groups.close()
    loader.close()
    row = {
        "image_size_px": size,
        "residency": residency,
        "augmented_share": float(augmented),
        "images_per_s": round(images / wall, 1),
        "images_per_cpu_s": round(images / cpu, 1),
        "open_s": round(open_s, 3),
    }
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _circumstances(manifest: Manifest, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, besides the rows."""
    return {
        "benchmark": "loader",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            "dataset": manifest.dataset,
            "images": len(manifest),
            "encoding": manifest.encoding,
            "bits": manifest.bits,
            "stored_size_px": manifest.stored_size,
        },
        "group_size_images": GROUP_SIZE,
        "decode_threads": options.workers,
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "hardware": hardware(),
        "versions": versions("torch", "numpy", "opencv-python-headless"),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder written by `ddpm-lmk shards pack`; it needs a split train")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument("--device", default="cpu", help="where batches are wanted: cpu, cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time per row")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
