"""What it costs to train on a WebDataset where it lies, against its images packed, and against the package's reader.

    ddpm-lmk bench in_place [--rounds 11] [--out DIR]

Tars are written with `webdataset.ShardWriter`: synthetic skulls as JPEG and PNG of 256 pixels, and as JPEG of the size
of original films. The three readers take turns, 32 images each: packed raw shards and the tars in place through our
loader, and plain webdataset that decodes with OpenCV, in one thread, which verifies, moves and keeps in order nothing.
Processor time counts that of the decoding processes too. `prepare` is what packing and indexing cost once.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from _subject import RESULTS, carried_out, option_parser
from loader import FILM, GROUP_SIZE, run_config
from torch import Tensor

from ddpm_lmk.bench import Result, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.in_place import index_in_place
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.sources.webdataset import Roles
from ddpm_lmk.system.machine import versions

SIZE = 256
SOURCES = {"256 px JPEG": (".jpg", (SIZE, SIZE), 64), "256 px PNG": (".png", (SIZE, SIZE), 64)}
SOURCES[f"{FILM[0]} x {FILM[1]} px JPEG"] = (".jpg", FILM, 32)  # suffix, width and height, images
READERS = ("packed", "in place", "webdataset and OpenCV")
WARM_UP = 2


def main() -> None:
    """Measure every kind of source and write the result file."""
    options = option_parser(__doc__).parse_args()
    options.workers = 0  # else a thread would read ahead in the turn of another reader
    settings = {"group_size_images": GROUP_SIZE, "stored_size_px": SIZE, "decode_threads": options.workers}
    settings["packages"] = versions("opencv-python-headless", "pillow", "webdataset")
    result = Result("in_place", settings=settings)
    for name, source in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            measure(result, name, Path(folder), *source, options=options)
    conclude(result, options.out, "phantom_skull", earlier=[RESULTS])


def measure(
    result: Result,
    name: str,
    scratch: Path,
    suffix: str,
    size: tuple[int, int],
    count: int,
    *,
    options: argparse.Namespace,
) -> None:
    """The rows of one kind of source, and the ratios between its readers."""
    tars = write_tars(scratch / "tars", suffix, size, count)
    chosen = PackSettings(kind="folder", size=SIZE)
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: pack(scratch / "tars", scratch / "packed", chosen, workers=1),
        "in place": lambda: index_in_place(str(scratch / "tars"), scratch / "in place", chosen, Roles(), workers=1),
    }
    for way, prepare in ways.items():
        began = _ended_s()
        prepare()
        cost = {"cpu_ms_per_image": 1e3 * (_ended_s() - began) / count}
        cost["disk_bytes_per_image"] = sum(path.stat().st_size for path in (scratch / way).iterdir()) / count
        result.add("prepare", conditions={"source": name, "way": way}, figures=cost)
    loaders = [open_loader(run_config(scratch / way, options), stage="train") for way in READERS[:2]]
    streams = [loader.global_batches(0) for loader in loaders]
    plain = read_plainly(tars)
    takes = dict(zip(READERS, (streams[0].__next__, streams[1].__next__, plain.__next__), strict=True))
    samples: dict[str, dict[str, list[float]]] = {
        reader: {"images_per_s": [], "images_per_cpu_s": []} for reader in READERS
    }
    for number in range(WARM_UP + options.rounds):
        for reader in READERS[:: 1 if number % 2 == 0 else -1]:
            wall, cpu = time.perf_counter(), _processor_s()
            takes[reader]()
            wall, cpu = time.perf_counter() - wall, _processor_s() - cpu
            if number >= WARM_UP:
                samples[reader]["images_per_s"].append(GROUP_SIZE / wall)
                samples[reader]["images_per_cpu_s"].append(GROUP_SIZE / cpu)
    for reader, found in samples.items():
        compared = compare_paired(samples["packed"]["images_per_cpu_s"], found["images_per_cpu_s"])
        figures = {"cpu_ms_per_image": 1e3 / float(np.median(found["images_per_cpu_s"]))}
        row = result.add("read", found, conditions={"source": name, "reader": reader}, figures=figures)
        row.warm_up = WARM_UP
        if reader != "packed":
            what = {"what": "processor time over packed", "source": name, "reader": reader}
            result.ratios.append(what | compared.facts())
    for stream, loader in zip(streams, loaders, strict=True):
        stream.close()
        loader.close()


def write_tars(folder: Path, suffix: str, size: tuple[int, int], count: int) -> list[str]:
    """Skulls of `size` (width, height), with grain, in four tars."""
    import webdataset

    folder.mkdir()
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=-(-count // 4), verbose=0) as writer:
        for number in range(count):
            drawn = render("skull", 0, number, 512).image.astype(np.float32) / 257  # of 16 bits
            drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_CUBIC)
            film = np.clip(drawn + rng.normal(0, 2, drawn.shape), 0, 255).astype(np.uint8)
            content = cv2.imencode(suffix, film)[1].tobytes()
            writer.write({"__key__": f"{number:06d}", suffix[1:]: content, "json": {"number": number}})
    return sorted(map(str, folder.iterdir()))


def read_plainly(tars: list[str]) -> Iterator[Tensor]:
    """Batches as people read their tars with the package: decoded in this process, resized, scaled."""
    import webdataset

    def pixels(sample: dict[str, bytes]) -> np.ndarray:
        content = sample["jpg"] if "jpg" in sample else sample["png"]
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
        image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
        low, high = image.min(), image.max()
        return (image - low) / max(high - low, 1)

    images = iter(webdataset.WebDataset(tars, shardshuffle=False).repeat().shuffle(2 * GROUP_SIZE).map(pixels))
    while True:
        yield torch.from_numpy(np.stack([next(images) for _ in range(GROUP_SIZE)]))[:, None]


def _processor_s() -> float:
    """Processor seconds of this process and of the decoders it has running."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(each.user + each.system for each in times)


def _ended_s() -> float:
    """Processor seconds of this process and of those that it had, which are gone."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


if __name__ == "__main__":
    carried_out(main)
