"""Memory of the process while a loader goes through the same data for many epochs: it has to stay where it was.

    python benchmarks/loader_memory.py [--out benchmarks/results] [--epochs 50]

For each backend a process of its own streams packed synthetic skulls, with the paper's augmentation, and notes its
resident memory after every epoch. Writes `loader_memory.json` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.system.machine import hardware, versions

IMAGES = 256
SIZE = 128
GROUP_SIZE = 32
WARM_UP = 10  # epochs in which allocators and caches fill


def main() -> None:
    """Measure both backends, each in a fresh process, and write the result file."""
    options = _options()
    if options.backend is not None:
        sys.stdout.write(json.dumps(stream(options.data, options.backend, options.epochs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "skulls"
        pack("skull", data, PackSettings(kind="phantom", counts={"train": IMAGES}, size=SIZE))
        rows = [_row(data, backend, options.epochs) for backend in ("torch", "dali")]
    result = {
        "benchmark": "loader_memory",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images_per_epoch": IMAGES,
        "image_size_px": SIZE,
        "group_size_images": GROUP_SIZE,
        "hardware": hardware(),
        "versions": versions("torch", "numpy", "opencv-python-headless", "nvidia-dali-cuda130"),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "loader_memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


def stream(data: Path, backend: str, epochs: int) -> list[float]:
    """Resident memory in MiB after each epoch."""
    cfg = RunConfig.model_validate(
        {
            "data": {"path": str(data), "image_size": SIZE, "residency": "stream", "loader": backend, "workers": 1},
            "task": {"kind": "denoise"},
            "train": {"group_size": GROUP_SIZE},
        }
    )
    process, loader = psutil.Process(), open_loader(cfg, stage="train")
    groups, curve = loader.groups(0), []
    for _ in range(epochs):
        for _ in range(IMAGES // GROUP_SIZE):
            next(groups)
        curve.append(round(process.memory_info().rss / 2**20, 2))
    groups.close()
    loader.close()
    return curve


def _row(data: Path, backend: str, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--backend", backend, "--data", str(data), "--epochs", str(epochs)]
    curve = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    row: dict[str, Any] = {"loader": backend, "epochs": epochs, "rss_mib": curve}
    row["growth_after_warm_up_mib"] = round(curve[-1] - curve[min(WARM_UP, epochs) - 1], 2)
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument("--epochs", type=int, default=50, help="times the data is gone through")
    parser.add_argument("--backend", choices=("torch", "dali"), help="measure one, here; used by the script itself")
    parser.add_argument("--data", type=Path, help="the pack of --backend")
    return parser.parse_args()


if __name__ == "__main__":
    main()
