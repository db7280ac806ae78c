"""Images per second of loading: residencies, backends, stores, and other ways to read the same films.

    ddpm-lmk bench loader [--data PACK] [--device auto] [--seconds 3] [--workers 2] [--out DIR]

Without `--data` it packs synthetic skulls first. In the first rows nothing trains: the consumer only takes groups, so
the figures are the most a training loop can get. `images_per_cpu_s` divides by processor seconds of this process
(servers are processes of their own) and so holds on a busy machine too; `cores_for_4000_per_s` follows from it.
Rows of `training` are short real runs, with the share of time they waited for data; on a GPU also how long it was idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _loader_sources import GpuWatch, make_films, object_store, read_as_the_paper, read_with_webdataset
from _subject import RESULTS, carried_out, device_of

from ddpm_lmk.bench import Result
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.run import execute
from ddpm_lmk.system.console import print_status
from ddpm_lmk.system.machine import version, versions

GROUP_SIZE = 32
PHANTOMS = 256
SIZES = (128, 256)
RESIDENCIES = ("stream", "ram", "device")
FILM = (1935, 2400)  # of a cephalogram
FILMS = 8
WANTED_PER_S = 4000
TRAINED_STEPS = 12
SLICES = 6  # of the time of a row, for its spread
ROWS = 40  # with what stands between them, in times of a row


def main() -> None:
    """Measure every combination and write the result file."""
    options = _options()
    until = time.perf_counter() + options.budget_s
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = options.data
        if data is None:
            data = scratch / "skulls"
            pack("skull", data, PackSettings(kind="phantom", counts={"train": PHANTOMS}, size=max(SIZES)))
        manifest = Manifest.open(data)
        result = Result("loader", settings=_circumstances(manifest, options), device=options.device)
        for size, residency, augmented in itertools.product(SIZES, RESIDENCIES, (False, True)):
            measure(result, data, size, residency, augmented=augmented, options=options)
        with object_store({"pack": data}) as url:
            measure_ways(result, data, url, scratch, options)
            measure_training(result, data, url, scratch, options, until=until)
    conclude(result, options.out, manifest.dataset, earlier=[RESULTS])


def measure(
    result: Result, data: Path, size: int, residency: str, *, augmented: bool, options: argparse.Namespace
) -> None:
    """One row of residencies."""
    cfg = run_config(
        data,
        options,
        {"image_size": size, "augment": {"probability": 1.0 if augmented else 0.0}},
        cache_pixels=residency,
        loader="torch",
    )
    conditions = {"image_size_px": size, "residency": residency, "augmented_share": float(augmented)}
    _add(result, "loading", conditions, *_loading(cfg, options))


def measure_ways(result: Result, data: Path, url: str | None, scratch: Path, options: argparse.Namespace) -> None:
    """The same images, streamed in every way there is, with the paper's augmentation."""
    cache = scratch / "cache"

    def ours(way: str, where: str, path: Path | str, *, first: bool = False, **settings: Any) -> None:
        if first:
            shutil.rmtree(cache, ignore_errors=True)
        cfg = run_config(path, options, cache_dir=str(cache), **settings)
        _add(result, "way", {"way": way, "from": where}, *_loading(cfg, options))

    ours("ours, torch", "local shards", data, loader="torch")
    if version("nvidia-dali-cuda130") is not None:
        ours("ours, DALI", "local shards", data, loader="dali")
    for where, address in {} if url is None else {"http": f"{url}/films/pack", "s3": "s3://films/pack"}.items():
        ours("ours, torch", f"{where}, first epoch on", address, first=True, loader="torch")
        ours("ours, torch", f"{where}, all in the cache", address, loader="torch")
        ours("ours, torch", f"{where}, by range", address, loader="torch", cache_gib=0)
    plain = read_with_webdataset(data, GROUP_SIZE)
    conditions = {"way": "plain webdataset", "from": "local shards, not moved"}
    _add(result, "way", conditions, _rate(lambda: len(next(plain)), options), {})
    films = sorted(options.films.iterdir()) if options.films else make_films(data, scratch / "films", FILMS, FILM)
    paper = read_as_the_paper(films, max(SIZES), GROUP_SIZE // 4)
    conditions = {"way": "as the paper", "from": "original films"}
    _add(result, "way", conditions, _rate(lambda: len(next(paper)), options), {})


def measure_training(
    result: Result, data: Path, url: str | None, scratch: Path, options: argparse.Namespace, *, until: float
) -> None:
    """Short real runs of a small network, so that the data has little time to hide in.

    The first is made in any case, others only begin before `until`, a moment of `time.perf_counter`.
    """
    places: dict[str, Path | str] = {"local shards": data}
    if url is not None:
        places |= {"http": f"{url}/films/pack", "s3": "s3://films/pack"}
    parallel = Parallel("cuda" if options.device.startswith("cuda") else "cpu")
    loaders = ["torch", *(["dali"] if version("nvidia-dali-cuda130") is not None else [])]
    for (where, path), loader in itertools.product(places.items(), loaders):
        if result.rows[-1].what == "training" and time.perf_counter() > until:
            print_status(f"training from {where} with {loader}: left out, --budget-s {options.budget_s:.0f} is spent")
            continue
        cache = str(scratch / f"training-{where}-{loader}")
        cfg = run_config(path, options, {"image_size": min(SIZES)}, loader=loader, cache_dir=cache)
        out = scratch / f"run-{where}-{loader}"
        with GpuWatch(options.device) as gpu:
            execute(cfg, out, parallel=parallel)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
        samples = {"images_per_s": [line["images_per_s"] for line in lines]}
        samples["data_wait_pct"] = [100 * line["data_wait"] for line in lines]
        result.add(
            "training", samples, conditions={"loader": loader, "from": where}, figures={"gpu_idle_pct": gpu.idle_pct}
        )


def run_config(
    path: Path | str, options: argparse.Namespace, data: dict[str, Any] | None = None, **runtime: Any
) -> RunConfig:
    """A run that streams the pack; `data` and `runtime` are settings of those sections."""
    runtime = {"workers": options.workers, "cache_pixels": "stream", **runtime}
    runtime |= {"log_every": 1, "checkpoint_every": 10_000}
    settings = {"path": str(path), "image_size": max(SIZES), **(data or {})}
    train = {"global_batch_size": GROUP_SIZE, "duration": TRAINED_STEPS}
    model = {"width": 8, "multipliers": [1, 2, 2], "pixel_unshuffle": 4, "head_dim": 8}
    fields = {"data": settings, "task": {"kind": "denoise"}, "train": train, "model": model, "runtime": runtime}
    return RunConfig.model_validate(fields)


def _loading(cfg: RunConfig, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Open the loader, take two groups to warm up, then groups for `--seconds`."""
    began = time.perf_counter()
    loader = open_loader(cfg, stage="train", device=options.device)
    open_s = time.perf_counter() - began
    groups = loader.global_batches(0)
    try:
        return _rate(lambda: next(groups).size, options), {"open_s": open_s}
    finally:
        groups.close()
        loader.close()


def _rate(take: Callable[[], int], options: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second and per processor second of calls that return a number of images, slice by slice."""
    for _ in range(2):
        take()
    rates: dict[str, list[float]] = {"images_per_s": [], "images_per_cpu_s": []}
    for _ in range(SLICES):
        wall, cpu, images = time.perf_counter(), time.process_time(), 0
        while images == 0 or time.perf_counter() - wall < options.seconds / SLICES:
            images += take()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        rates["images_per_s"].append(images / (time.perf_counter() - wall))
        rates["images_per_cpu_s"].append(images / max(time.process_time() - cpu, 1e-9))
    return rates


def _add(
    result: Result, what: str, conditions: dict[str, Any], rates: dict[str, list[float]], figures: dict[str, float]
) -> None:
    figures |= {"cores_for_4000_per_s": WANTED_PER_S / median(rates["images_per_cpu_s"])}
    row = result.add(what, rates, conditions=conditions, figures=figures)
    row.warm_up = 2


def _circumstances(manifest: Manifest, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, besides the rows."""
    return {
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
        "packages": versions("opencv-python-headless", "nvidia-dali-cuda130", "webdataset", "s3fs", "aiohttp"),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder written by `ddpm-lmk shards pack`; it needs a split train")
    parser.add_argument("--films", type=Path, help="original films for the paper's way; without, some are made")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the result file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where batches are wanted")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time per row")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    parser.add_argument("--budget-s", type=float, default=120.0, help="seconds this may take, about")
    options = parser.parse_args()
    options.device = device_of(options)
    options.seconds = min(options.seconds, options.budget_s / ROWS)
    return options


if __name__ == "__main__":
    carried_out(main)
