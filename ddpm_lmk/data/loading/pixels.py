"""Where the pixels of a run live: decoded as they are needed, or once, in memory or on the device.

Both kinds answer the same two calls, as `DaliPixels` does: `fetch` names a sample's pixels or says that they are
corrupt, `images` turns what was fetched into network input on the device. So the loader does not know which kind it
has, and the batches are the same. 16-bit pixels travel as int16 bits.
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
from ddpm_lmk.system.machine import available_bytes

log = logging.getLogger(__name__)

Residency = Literal["stream", "ram", "device"]

_SHARE_OF_DEVICE = 0.25  # the model, its gradients and activations need the rest
_SHARE_OF_MEMORY = 0.5
_CHUNK = 4096  # images decoded between copies to a device


class _TorchPixels:
    """What both kinds do with the pixels they stacked."""

    def stack(self, fetched: Sequence[Any]) -> Tensor:
        """`[B, S, S]` uint8 or int16 on the device."""
        raise NotImplementedError

    def images(
        self, fetched: Sequence[Any], changes: Changes, *, seed: int, positions: np.ndarray, intensity: Intensity
    ) -> Tensor:
        """Network input `[B, 1, S, S]` float32 in [0, 1], channels-last, on the device."""
        return develop(self.stack(fetched), changes, seed=seed, positions=positions, intensity=intensity)

    def close(self) -> None:
        """Nothing is held that another loader of the same data would not want."""


class StreamPixels(_TorchPixels):
    """Reads and decodes every sample when it is due."""

    def __init__(self, corpora: Sequence[Corpus], device: torch.device) -> None:
        self._corpora, self._device = corpora, device
        self._wide = needs_16_bits(corpora)

    def fetch(self, corpus: int, row: int) -> np.ndarray:
        """Pixels `[S, S]`. Raises CorruptSampleError."""
        return _as_stored(self._corpora[corpus].decode(row), wide=self._wide)

    def stack(self, fetched: Sequence[np.ndarray]) -> Tensor:
        """`[B, S, S]` uint8 or int16 on the device."""
        pixels = torch.from_numpy(np.stack(fetched))
        return pixels.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else pixels


class ResidentPixels(_TorchPixels):
    """Decoded once, kept as one tensor in memory or on the device; rows can be added, for the next run of a sweep."""

    def __init__(self, corpora: Sequence[Corpus], home: torch.device, device: torch.device) -> None:
        self._home, self._device = home, device
        self._wide = needs_16_bits(corpora)
        self._slots = [np.full(len(corpus.manifest), -1, dtype=np.int64) for corpus in corpora]
        self._bad: dict[tuple[int, int], str] = {}
        size = corpora[0].image_size
        self._store = torch.empty(0, size, size, dtype=torch.int16 if self._wide else torch.uint8, device=home)

    def add(self, corpora: Sequence[Corpus], workers: int) -> None:
        """Decode the rows that are not here yet."""
        used = [np.asarray(corpus.rows) for corpus in corpora]
        missing = [(c, int(row)) for c, rows in enumerate(used) for row in rows[self._slots[c][rows] < 0]]
        if not missing:
            return
        first = len(self._store)
        grown = self._store.new_empty((first + len(missing), *self._store.shape[1:]))
        grown[:first] = self._store
        self._store = grown
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for begin in range(0, len(missing), _CHUNK):
                chunk = missing[begin : begin + _CHUNK]
                decoded = list(pool.map(lambda key: self._decode(corpora[key[0]], *key), chunk))
                self._store[first + begin : first + begin + len(chunk)] = torch.from_numpy(np.stack(decoded)).to(
                    self._home
                )
                for slot, (c, row) in enumerate(chunk, first + begin):
                    self._slots[c][row] = slot

    def fetch(self, corpus: int, row: int) -> int:
        """Place of a sample in the store. Raises CorruptSampleError."""
        if (corpus, row) in self._bad:
            raise CorruptSampleError(self._bad[corpus, row])
        return int(self._slots[corpus][row])

    def bad_among(self, corpora: Sequence[Corpus]) -> list[tuple[int, int, str]]:
        """Corpus, row and reason of those of the rows that could not be decoded."""
        used = [set(corpus.rows.tolist()) for corpus in corpora]
        return sorted((c, row, reason) for (c, row), reason in self._bad.items() if row in used[c])

    def stack(self, fetched: Sequence[int]) -> Tensor:
        """`[B, S, S]` uint8 or int16 on the device."""
        pixels = self._store.index_select(0, torch.tensor(fetched).to(self._home))
        if self._device.type == "cuda" and self._home.type == "cpu":
            return pixels.pin_memory().to(self._device, non_blocking=True)
        return pixels

    def _decode(self, corpus: Corpus, c: int, row: int) -> np.ndarray:
        try:
            return _as_stored(corpus.decode(row), wide=self._wide)
        except CorruptSampleError as error:
            self._bad[c, row] = str(error)
            return np.zeros(self._store.shape[1:], dtype=np.int16 if self._wide else np.uint8)


def open_pixels(
    corpora: Sequence[Corpus],
    residency: Literal["auto", "stream", "ram", "device"],
    *,
    device: torch.device,
    workers: int,
    world: int,
    cache: dict[Any, Any] | None,
) -> tuple[StreamPixels | ResidentPixels, Residency]:
    """The pixels of a run and where they live; `cache` keeps resident ones for the next run of the same sets.

    Raises:
        ResourceError: they do not fit where they were asked to be.
    """
    chosen = choose_residency(corpora, residency, device, world)
    log.info("pixels: %s (data.residency=%s, %.2f GiB decoded)", chosen, residency, _bytes(corpora) / 2**30)
    if chosen == "stream":
        return StreamPixels(corpora, device), chosen
    home = device if chosen == "device" else torch.device("cpu")
    key = ("pixels", tuple(c.manifest.fingerprint for c in corpora), corpora[0].image_size, str(home), str(device))
    pixels = None if cache is None else cache.get(key)
    if pixels is None:
        pixels = ResidentPixels(corpora, home, device)
        if cache is not None:
            cache[key] = pixels
    pixels.add(corpora, workers)
    return pixels, chosen


def needs_16_bits(corpora: Sequence[Corpus]) -> bool:
    """Whether any set is 16-bit; 8-bit pixels of such a pool are then multiplied by 257, a like share of the range."""
    return any(corpus.manifest.bits == 16 for corpus in corpora)


def choose_residency(corpora: Sequence[Corpus], wanted: str, device: torch.device, world: int) -> Residency:
    """Where the pixels will live; "auto" means where they fit. Raises ResourceError as `open_pixels`."""
    if wanted == "stream":
        return "stream"
    need = _bytes(corpora)
    memory = available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
    if wanted == "auto":
        if device.type == "cuda" and need <= _SHARE_OF_DEVICE * on_device:
            return "device"
        return "ram" if need <= _SHARE_OF_MEMORY * memory else "stream"
    place, free = ("device", on_device) if wanted == "device" else ("ram", memory)
    if need > free:
        raise ResourceError(
            f"data.residency={wanted} needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB is free for this process; "
            "use data.residency=stream or auto"
        )
    return "device" if place == "device" else "ram"


def _bytes(corpora: Sequence[Corpus]) -> int:
    count = sum(len(corpus.rows) for corpus in corpora)
    return count * corpora[0].image_size ** 2 * (2 if needs_16_bits(corpora) else 1)


def _as_stored(pixels: np.ndarray, *, wide: bool) -> np.ndarray:
    if not wide:
        return pixels
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    return np.ascontiguousarray(pixels, dtype=np.uint16).view(np.int16)
