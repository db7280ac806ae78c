"""Where decoded pixels live: nowhere (each sample is decoded when it is due), in memory, or on the device.

All kinds, and `DaliPixels`, have the same calls: `fetch` gets a sample's pixels or raises CorruptSampleError, `images`
turns what was fetched into network input on the device, `fine` brings the finer copies there where there are some. The
batches are the same to the bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_lmk.data.loading.augment import Changes
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.loading.warp import Intensity, develop
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.system import accelerator
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.system.machine import available_bytes

log = logging.getLogger(__name__)

Residency = Literal["stream", "ram", "device"]

_SHARE_OF_DEVICE = 0.25  # the model, its gradients and activations need the rest
_SHARE_OF_MEMORY = 0.5  # the page cache of the shards and the other programs of the machine need the rest
_CHUNK = 4096  # images decoded between copies to a device


class StreamPixels:
    """Reads and decodes every sample when it is due."""

    residency: Residency = "stream"

    def __init__(self, corpora: Sequence[Corpus], device: torch.device) -> None:
        self._corpora, self._device = corpora, device
        self._wide = needs_16_bits(corpora)

    def fetch(self, corpus: int, row: int) -> Any:
        """What `images` takes of a sample: here its pixels `[S, S]`, of each size. Raises CorruptSampleError."""
        return [_as_stored(pixels, wide=self._wide) for pixels in self._corpora[corpus].decode(row)]

    def images(
        self, fetched: Sequence[Any], changes: Changes, *, seed: int, positions: np.ndarray, intensity: Intensity
    ) -> Tensor:
        """Network input `[B, 1, S, S]` float32 in [0, 1], channels-last, on the device."""
        return develop(self._stack(fetched, 0), changes, seed=seed, positions=positions, intensity=intensity)

    def fine(self, fetched: Sequence[Any]) -> Tensor | None:
        """The finer copies `[B, 1, F, F]` as they are stored, uint8 or int16 on the device, if there are some."""
        return self._stack(fetched, 1)[:, None] if len(self._corpora[0].sizes) > 1 else None

    def close(self) -> None:
        """Nothing is held that another loader of the same data would not want."""

    def _stack(self, fetched: Sequence[Any], size: int) -> Tensor:
        """`[B, S, S]` uint8 or int16 on the device, of the size of this number."""
        return to_device(torch.from_numpy(np.stack([pixels[size] for pixels in fetched])), self._device)


class ResidentPixels(StreamPixels):
    """Decoded once, kept in memory or on the device; rows can be added, for the next run of a sweep."""

    def __init__(self, corpora: Sequence[Corpus], residency: Residency, device: torch.device) -> None:
        super().__init__(corpora, device)
        self.residency = residency
        home = device if residency == "device" else torch.device("cpu")
        self._slots = [np.full(len(corpus.manifest), -1, dtype=np.int64) for corpus in corpora]
        self._bad: dict[tuple[int, int], str] = {}
        dtype = torch.int16 if self._wide else torch.uint8
        self._stores = [torch.empty(0, size, size, dtype=dtype, device=home) for size in corpora[0].sizes]

    def add(self, corpora: Sequence[Corpus], workers: int) -> None:
        """Decode the rows that are not here yet."""
        used = [np.asarray(corpus.rows) for corpus in corpora]
        missing = [(c, int(row)) for c, rows in enumerate(used) for row in rows[self._slots[c][rows] < 0]]
        if not missing:
            return
        first = len(self._stores[0])
        for number, store in enumerate(self._stores):
            grown = store.new_empty((first + len(missing), *store.shape[1:]))
            grown[:first] = store
            self._stores[number] = grown
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for begin in range(0, len(missing), _CHUNK):
                chunk = missing[begin : begin + _CHUNK]
                decoded = list(pool.map(lambda key: self._decode(corpora[key[0]], *key), chunk))
                begin += first
                for store, pixels in zip(self._stores, zip(*decoded, strict=True), strict=True):
                    store[begin : begin + len(chunk)] = to_device(torch.from_numpy(np.stack(pixels)), store.device)
                for slot, (c, row) in enumerate(chunk, begin):
                    self._slots[c][row] = slot

    def fetch(self, corpus: int, row: int) -> Any:
        """The place of a sample in the stores. Raises CorruptSampleError."""
        if (corpus, row) in self._bad:
            raise CorruptSampleError(self._bad[corpus, row])
        return int(self._slots[corpus][row])

    def bad_among(self, corpora: Sequence[Corpus]) -> list[tuple[int, int, str]]:
        """Corpus, row and reason of those of the rows that could not be decoded."""
        used = [set(corpus.rows.tolist()) for corpus in corpora]
        return sorted((c, row, reason) for (c, row), reason in self._bad.items() if row in used[c])

    def _stack(self, fetched: Sequence[Any], size: int) -> Tensor:
        store = self._stores[size]
        pixels = store.index_select(0, to_device(torch.tensor(fetched), store.device))
        return to_device(pixels, self._device)

    def _decode(self, corpus: Corpus, c: int, row: int) -> list[np.ndarray]:
        try:
            return [_as_stored(pixels, wide=self._wide) for pixels in corpus.decode(row)]
        except CorruptSampleError as error:
            self._bad[c, row] = str(error)
            dtype = np.int16 if self._wide else np.uint8
            return [np.zeros(store.shape[1:], dtype=dtype) for store in self._stores]


def open_pixels(
    corpora: Sequence[Corpus],
    wanted: Literal["auto", "stream", "ram", "device"],
    *,
    device: torch.device,
    workers: int,
    world: int,
    cache: dict[Any, Any] | None,
) -> StreamPixels:
    """The pixels of a run; `cache` keeps resident ones for the next run of the same datasets.

    Raises:
        ResourceError: they do not fit where they were asked to be.
    """
    residency = choose_residency(corpora, wanted, device, world)
    log.info("pixels: %s (runtime.cache_pixels=%s, %.2f GiB decoded)", residency, wanted, _bytes(corpora) / 2**30)
    if residency == "stream":
        return StreamPixels(corpora, device)
    cache = {} if cache is None else cache
    digests = tuple(corpus.manifest.fingerprint for corpus in corpora)
    key = ("pixels", digests, corpora[0].sizes, residency, str(device))
    pixels = cache[key] = cache.get(key) or ResidentPixels(corpora, residency, device)
    pixels.add(corpora, workers)
    return pixels


def needs_16_bits(corpora: Sequence[Corpus]) -> bool:
    """Whether any dataset is 16-bit; 8-bit pixels of such a pool are then multiplied by 257: 255 becomes 65535."""
    return any(corpus.manifest.bits == 16 for corpus in corpora)


def choose_residency(corpora: Sequence[Corpus], wanted: str, device: torch.device, world: int) -> Residency:
    """Where the pixels will live; "auto" means where they fit. Raises ResourceError as `open_pixels`."""
    if wanted == "stream":
        return "stream"
    need = _bytes(corpora)
    # Each process of this machine keeps its own copy.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    memory, on_device = available_bytes() // processes, accelerator.free_bytes(device, processes=processes)
    if wanted == "auto":
        if device.type == "cuda" and need <= _SHARE_OF_DEVICE * on_device:
            return "device"
        return "ram" if need <= _SHARE_OF_MEMORY * memory else "stream"
    free = on_device if wanted == "device" else memory
    if need > free:
        raise ResourceError(
            f"runtime.cache_pixels={wanted} needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB is free for this "
            "process; use runtime.cache_pixels=stream or auto"
        )
    return "device" if wanted == "device" else "ram"


def _bytes(corpora: Sequence[Corpus]) -> int:
    count = sum(len(corpus.rows) for corpus in corpora)
    pixels = sum(size**2 for size in corpora[0].sizes)
    return count * pixels * (2 if needs_16_bits(corpora) else 1)


def _as_stored(pixels: np.ndarray, *, wide: bool) -> np.ndarray:
    if not wide:
        return pixels
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    # torch has few kernels for uint16: 16-bit pixels travel as the same bits in int16 until `warp` makes floats.
    return np.ascontiguousarray(pixels, dtype=np.uint16).view(np.int16)
