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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _loader_sources import GpuWatch, make_films, object_store, read_as_the_paper, read_with_webdataset
from _subject import RESULTS, add_budget, budget_of, carried_out, device_of

from ddpm_lmk.bench import Budget, Result
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.run import execute
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

STORE_ROWS = 10  # what is to come from object stores, in times of a row
PartOfSeconds = tuple[str, Callable[[float], object]]  # name, and a call that measures for so long


def main() -> None:
    """Measure every combination and write the result file."""
    options = _options()
    budget = budget_of(options)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = options.data or scratch / "skulls"
        if options.data is None:
            settings = PackSettings(kind="phantom", counts={"train": PHANTOMS}, size=max(SIZES))
            if not budget.run("packing phantoms", lambda: pack("skull", data, settings, workers=1)):
                return
        manifest = Manifest.open(data)
        result = Result("loader", settings=_circumstances(manifest, options), device=options.device, budget=budget)
        rows = [
            *residency_rows(result, data, options),
            *way_rows(result, data, scratch, options),
            *training_rows(result, {"local shards": data}, scratch, options),
        ]
        measure_rows(budget, rows, options.seconds, others=STORE_ROWS)
        urls: list[str | None] = []
        with ExitStack() as stack:
            budget.run("the object store", lambda: urls.append(stack.enter_context(object_store({"pack": data}))))
            if url := "".join(filter(None, urls)):
                stores: dict[str, Path | str] = {"http": f"{url}/films/pack", "s3": "s3://films/pack"}
                rows = [
                    *store_rows(result, stores, scratch, options),
                    *training_rows(result, stores, scratch, options),
                ]
                measure_rows(budget, rows, options.seconds)
        conclude(result, options.out, manifest.dataset, earlier=[RESULTS])


def measure_rows(budget: Budget, rows: Sequence[PartOfSeconds], wanted_s: float, *, others: int = 0) -> None:
    """Measure each row for `wanted_s` seconds, or for as long as leaves time for all and for `others` after them."""
    dearest_s = 0.0  # what a row took besides, at most: opening, warming up
    for number, (name, measure) in enumerate(rows):
        begin_s = budget.left_s
        seconds = max(0.0, min(wanted_s, begin_s / (len(rows) + others - number) - dearest_s))
        budget.run(name, partial(measure, seconds), needs_s=dearest_s)
        dearest_s = max(dearest_s, begin_s - budget.left_s - seconds)


def residency_rows(result: Result, data: Path, options: argparse.Namespace) -> Iterator[PartOfSeconds]:
    """Sizes, residencies, with augmentation and without."""
    for size, residency, share in itertools.product(SIZES, RESIDENCIES, (0.0, 1.0)):
        cfg = run_config(
            data,
            options,
            {"image_size": size, "augment": {"probability": share}},
            cache_pixels=residency,
            loader="torch",
        )
        conditions = {"image_size_px": size, "residency": residency, "augmented_share": share}
        name = f"loading at {size} px, {residency}{', augmented' if share else ''}"
        yield name, partial(_measure_loading, result, "loading", conditions, cfg, options)


def way_rows(result: Result, data: Path, scratch: Path, options: argparse.Namespace) -> Iterator[PartOfSeconds]:
    """The same images, streamed in every way there is, with the paper's augmentation."""
    yield _our_row(result, "ours, torch", "local shards", data, scratch, options, loader="torch")
    if version("nvidia-dali-cuda130") is not None:
        yield _our_row(result, "ours, DALI", "local shards", data, scratch, options, loader="dali")

    def films() -> list[Path]:
        return sorted(options.films.iterdir()) if options.films else make_films(data, scratch / "films", FILMS, FILM)

    others: dict[tuple[str, str], Callable[[], Iterator[Any]]] = {
        ("plain webdataset", "local shards, not moved"): lambda: read_with_webdataset(data, GROUP_SIZE),
        ("as the paper", "original films"): lambda: read_as_the_paper(films(), max(SIZES), GROUP_SIZE // 4),
    }
    for (way, where), read in others.items():

        def measure(seconds: float, way: str = way, where: str = where, read: Any = read) -> None:
            batches = read()
            _add(result, "way", {"way": way, "from": where}, _rate(lambda: len(next(batches)), options, seconds), {})

        yield f"{way} from {where}", measure


def store_rows(
    result: Result, stores: dict[str, Path | str], scratch: Path, options: argparse.Namespace
) -> Iterator[PartOfSeconds]:
    """Our loader from object stores: at first, from its cache, and without one."""
    for where, address in stores.items():
        common = (address, scratch, options)
        yield _our_row(result, "ours, torch", f"{where}, first epoch on", *common, first=True, loader="torch")
        yield _our_row(result, "ours, torch", f"{where}, all in the cache", *common, loader="torch")
        yield _our_row(result, "ours, torch", f"{where}, by range", *common, loader="torch", cache_gib=0)


def _our_row(
    result: Result,
    way: str,
    where: str,
    path: Path | str,
    scratch: Path,
    options: argparse.Namespace,
    *,
    first: bool = False,
    **settings: Any,
) -> PartOfSeconds:
    def measure(seconds: float) -> None:
        cache = scratch / "cache"
        if first:
            shutil.rmtree(cache, ignore_errors=True)
        cfg = run_config(path, options, cache_dir=str(cache), **settings)
        _measure_loading(result, "way", {"way": way, "from": where}, cfg, options, seconds)

    return f"{way} from {where}", measure


def training_rows(
    result: Result, places: dict[str, Path | str], scratch: Path, options: argparse.Namespace
) -> Iterator[PartOfSeconds]:
    """Short real runs of a small network, so that the data has little time to hide in."""
    parallel = Parallel("cuda" if options.device.startswith("cuda") else "cpu")
    loaders = ["torch", *(["dali"] if version("nvidia-dali-cuda130") is not None else [])]

    def measure(where: str, path: Path | str, loader: str, _seconds: float) -> None:
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

    for (where, path), loader in itertools.product(places.items(), loaders):
        yield f"training from {where} with {loader}", partial(measure, where, path, loader)


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


def _measure_loading(
    result: Result, what: str, conditions: dict[str, Any], cfg: RunConfig, options: argparse.Namespace, seconds: float
) -> None:
    """Open the loader, take two groups to warm up, then groups for `seconds`: a row."""
    began = time.perf_counter()
    loader = open_loader(cfg, stage="train", device=options.device)
    open_s = time.perf_counter() - began
    groups = loader.global_batches(0)
    try:
        rates = _rate(lambda: next(groups).size, options, seconds)
    finally:
        groups.close()
        loader.close()
    _add(result, what, conditions, rates, {"open_s": open_s})


def _rate(take: Callable[[], int], options: argparse.Namespace, seconds: float) -> dict[str, list[float]]:
    """Images per second and per processor second of calls that return a number of images, slice by slice."""
    for _ in range(2):
        take()
    rates: dict[str, list[float]] = {"images_per_s": [], "images_per_cpu_s": []}
    for _ in range(SLICES):
        wall, cpu, images = time.perf_counter(), time.process_time(), 0
        while images == 0 or time.perf_counter() - wall < seconds / SLICES:
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
    add_budget(parser, 120.0)
    options = parser.parse_args()
    options.device = device_of(options)
    return options


if __name__ == "__main__":
    carried_out(main)
