"""Images per second of loading: residencies, backends, stores, and other ways to read the same films.

    python benchmarks/loader.py [--data PACK] [--out benchmarks/results] [--device cpu] [--seconds 3] [--workers 2]

Without `--data` it packs synthetic skulls first. In the first tables nothing trains: the consumer only takes groups, so
the figures are the most a training loop can get. `images_per_cpu_s` divides by processor seconds of this process
(servers are processes of their own) and so holds on a busy machine too; `cores_for_4000_per_s` follows from it.
`training` are short real runs, with the share of time they waited for data; on a GPU also how long it was idle. Writes
`loader.json` (`loader-NAME.json` for a given pack) into `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _loader_sources import GpuWatch, make_films, object_store, read_as_the_paper, read_with_webdataset

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack import pack
from ddpm_lmk.data.shards import Manifest
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.machine import hardware, versions
from ddpm_lmk.runs import execute

GROUP_SIZE = 32
PHANTOMS = 256
SIZES = (128, 256)
RESIDENCIES = ("stream", "ram", "device")
FILM = (1935, 2400)  # of a cephalogram
FILMS = 8
WANTED_PER_S = 4000
TRAINED_STEPS = 12


def main() -> None:
    """Measure every combination and write the result file."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = options.data
        if data is None:
            data = scratch / "skulls"
            pack("skull", "phantom", data, counts={"train": PHANTOMS}, size=max(SIZES))
        manifest = Manifest.open(data)
        rows = [
            measure(data, size, residency, augmented=augmented, options=options)
            for size, residency, augmented in itertools.product(SIZES, RESIDENCIES, (False, True))
        ]
        with object_store({"pack": data}) as url:
            ways = list(measure_ways(data, url, scratch, options))
            training = list(measure_training(data, url, scratch, options))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("loader.json" if options.data is None else f"loader-{manifest.dataset}.json")
    found = {"rows": rows, "ways": ways, "training": training}
    path.write_text(json.dumps({**_circumstances(manifest, options), **found}, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")


def measure(data: Path, size: int, residency: str, *, augmented: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row of residencies."""
    cfg = run_config(
        data,
        options,
        image_size=size,
        residency=residency,
        loader="torch",
        augment={"probability": 1.0 if augmented else 0.0},
    )
    row = {"image_size_px": size, "residency": residency, "augmented_share": float(augmented)}
    return _say({**row, **_loading(cfg, options)})


def measure_ways(data: Path, url: str | None, scratch: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same images, streamed in every way there is, with the paper's augmentation."""
    cache = scratch / "cache"

    def ours(way: str, where: str, path: Path | str, *, first: bool = False, **settings: Any) -> dict[str, Any]:
        if first:
            shutil.rmtree(cache, ignore_errors=True)
        cfg = run_config(path, options, residency="stream", cache_dir=str(cache), **settings)
        return _say({"way": way, "from": where, **_loading(cfg, options)})

    yield ours("ours, torch", "local shards", data, loader="torch")
    yield ours("ours, DALI", "local shards", data, loader="dali")
    for where, address in {} if url is None else {"http": f"{url}/films/pack", "s3": "s3://films/pack"}.items():
        yield ours("ours, torch", f"{where}, first epoch on", address, first=True, loader="torch")
        yield ours("ours, torch", f"{where}, all in the cache", address, loader="torch")
        yield ours("ours, torch", f"{where}, by range", address, loader="torch", cache_gib=0)
    plain = read_with_webdataset(data, GROUP_SIZE)
    yield _say(
        {"way": "plain webdataset", "from": "local shards, not moved", **_rate(lambda: len(next(plain)), options)}
    )
    films = sorted(options.films.iterdir()) if options.films else make_films(data, scratch / "films", FILMS, FILM)
    paper = read_as_the_paper(films, max(SIZES), GROUP_SIZE // 4)
    yield _say({"way": "as the paper", "from": "original films", **_rate(lambda: len(next(paper)), options)})


def measure_training(
    data: Path, url: str | None, scratch: Path, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Short real runs of a small network, so that the data has little time to hide in."""
    places: dict[str, Path | str] = {"local shards": data}
    if url is not None:
        places |= {"http": f"{url}/films/pack", "s3": "s3://films/pack"}
    parallel = Parallel("cuda" if options.device.startswith("cuda") else "cpu")
    for (where, path), loader in itertools.product(places.items(), ("torch", "dali")):
        settings = {"residency": "stream", "loader": loader, "cache_dir": str(scratch / f"training-{where}-{loader}")}
        cfg = run_config(path, options, image_size=min(SIZES), **settings)
        out = scratch / f"run-{where}-{loader}"
        with GpuWatch(options.device) as gpu:
            execute(cfg, out, parallel=parallel)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
        waits = sorted(line["data_wait"] for line in lines)
        rates = sorted(line["images_per_s"] for line in lines)
        middle = len(lines) // 2
        row: dict[str, Any] = {"loader": loader, "from": where, "data_wait_pct": round(100 * waits[middle], 2)}
        yield _say({**row, "images_per_s": round(rates[middle], 1), "gpu_idle_pct": gpu.idle_pct})


def run_config(path: Path | str, options: argparse.Namespace, **data: Any) -> RunConfig:
    """A run that streams the pack; `data` are settings of its section."""
    settings = {"path": str(path), "image_size": max(SIZES), "workers": options.workers, **data}
    train = {"group_size": GROUP_SIZE, "length": TRAINED_STEPS, "log_every": 1, "checkpoint_every": 10_000}
    model = {"width": 8, "multipliers": [1, 2, 2], "patch": 4, "head_dim": 8}
    return RunConfig.model_validate({"data": settings, "task": {"kind": "denoise"}, "train": train, "model": model})


def _loading(cfg: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Open the loader, take two groups to warm up, then groups for `--seconds`."""
    began = time.perf_counter()
    loader = open_loader(cfg, stage="train", device=options.device)
    open_s = time.perf_counter() - began
    groups = loader.groups(0)
    try:
        return {**_rate(lambda: next(groups).size, options), "open_s": round(open_s, 3)}
    finally:
        groups.close()
        loader.close()


def _rate(take: Callable[[], int], options: argparse.Namespace) -> dict[str, Any]:
    """Images per second and per processor second of calls that return a number of images."""
    for _ in range(2):
        take()
    wall, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < options.seconds:
        images += take()
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = {"images_per_s": round(images / wall, 1), "images_per_cpu_s": round(images / cpu, 1)}
    return {**figures, "cores_for_4000_per_s": round(WANTED_PER_S * cpu / images, 1)}


def _say(row: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.write(f"{json.dumps(row)}\n")
    return row


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
            "film_size_px": None if options.films else list(FILM),
        },
        "group_size_images": GROUP_SIZE,
        "decode_threads": options.workers,
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "hardware": hardware(),
        "versions": versions(
            "torch", "numpy", "opencv-python-headless", "nvidia-dali-cuda130", "webdataset", "s3fs", "aiohttp"
        ),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder written by `ddpm-lmk shards pack`; it needs a split train")
    parser.add_argument("--films", type=Path, help="original films for the paper's way; without, some are made")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument("--device", default="cpu", help="where batches are wanted: cpu, cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time per row")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
