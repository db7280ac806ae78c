"""What `loader.py` compares besides our own loader: other ways to read, and stores to read from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_lmk.data.shards.manifest import Manifest

SHIFT, ROTATE_DEG = 0.02, 2.0


def read_with_webdataset(pack: Path, batch: int) -> Iterator[Tensor]:
    """Plain webdataset over raw shards: tar, array, batch. Nothing is verified, moved or kept in order."""
    import webdataset

    manifest = Manifest.open(pack)
    urls = [str(pack / shard["name"]) for shard in manifest.shards]

    def pixels(sample: dict[str, bytes]) -> np.ndarray:
        image = manifest.decode_bytes(sample["npy"]).astype(np.float32)
        low, high = image.min(), image.max()
        return (image - low) / max(high - low, 1)

    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat().shuffle(1000).map(pixels)
    images = iter(samples)
    while True:
        yield torch.from_numpy(np.stack([next(images) for _ in range(batch)]))[:, None]


def read_as_the_paper(films: list[Path], size: int, batch: int) -> Iterator[Tensor]:
    """Decode, move at full resolution and resize at every access (paper.md, section 2; cv2, as albumentations does)."""
    rng = np.random.default_rng(0)
    while True:
        made = [_paper_image(films[i], size, rng) for i in rng.integers(len(films), size=batch)]
        yield torch.from_numpy(np.stack(made))[:, None]


def _paper_image(path: Path, size: int, rng: np.random.Generator) -> np.ndarray:
    with Image.open(path) as film:
        image = np.asarray(film.convert("L"), dtype=np.float32)
    height, width = image.shape
    if rng.random() < 0.5:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-ROTATE_DEG, ROTATE_DEG), 1.0)
        matrix[:, 2] += rng.uniform(-SHIFT, SHIFT, 2) * (width, height)
        image = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    low, high = image.min(), image.max()
    return (image - low) / (high - low)


def make_films(pack: Path, out: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Films as large as originals are (`size` is width, height), as 8-bit PNG: packed ones, enlarged, with grain."""
    rng, manifest = np.random.default_rng(0), Manifest.open(pack)
    out.mkdir()
    for row in range(count):
        film = cv2.resize(manifest.decode(row), size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
        grain = rng.normal(0, 2, film.shape)
        Image.fromarray(np.clip(film + grain, 0, 255).astype(np.uint8)).save(out / f"{row:03d}.png")
    return sorted(out.iterdir())


@contextmanager
def object_store(packs: dict[str, Path]) -> Iterator[str | None]:
    """An S3 server on this machine that holds `packs` in a bucket `films`; its address, or None without moto."""
    try:
        import fsspec
        import moto  # noqa: F401 - is it there?
        import s3fs  # noqa: F401
    except ImportError:
        sys.stdout.write("no object store: install the extras cloud and cloud-dev to measure one\n")
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    try:
        _wait_for(port)
        store = fsspec.filesystem("s3")
        store.mkdir("films", acl="public-read")
        for name, pack in packs.items():
            store.put(f"{pack}/", f"films/{name}/", recursive=True, ACL="public-read")
        yield url
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the object store did not start")


class GpuWatch:
    """Share of time the GPU does nothing, as nvidia-smi samples it ten times a second; a context manager."""

    def __init__(self, device: str) -> None:
        self._command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self._command += ["-i", device.partition(":")[2] or "0"]
        self._is_gpu = device.startswith("cuda")
        self.idle_pct: float | None = None

    def __enter__(self) -> GpuWatch:
        if self._is_gpu:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *unused: object) -> None:
        if self._is_gpu:
            self._process.terminate()
            busy = [float(line) for line in self._process.communicate()[0].split()]
            self.idle_pct = round(100 - sum(busy) / len(busy), 1) if busy else None
