"""Which library works on the pixels of a run, torch or DALI: chosen once, before the loaders open.

The two agree to a ten-thousandth of a grey level, not to the bit, so a resumed run keeps what it began with, and all
ranks take what one decides.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading.corpus import Corpus, training_corpora
from ddpm_lmk.data.loading.dali import require_dali
from ddpm_lmk.data.loading.loader import Name, Seat, open_training
from ddpm_lmk.data.loading.pixels import choose_residency
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system import accelerator

_MEASURED_S = 1.0  # of each: a choice that costs more than it brings is none
_WARM_UP = 2  # global batches before the clock starts: they start threads and build the pipelines of DALI


@dataclass(frozen=True)
class Backend:
    """The choice, why, and the images per second it rests on, where they were measured."""

    name: Name
    reason: str
    images_per_s: dict[str, float] | None = None


def choose_backend(
    cfg: RunConfig, *, device: torch.device | str, world: int = 1, before: dict[str, Any] | None = None
) -> Backend:
    """The backend of a run; `before` is what the run that is resumed recorded.

    Raises:
        ConfigError: DALI was asked for, and finer pixels, or pixels that are decoded beforehand.
        LaunchError: DALI was asked for and is not installed.
    """
    device = torch.device(device)
    if cfg.runtime.loader == "torch":
        return Backend("torch", "runtime.loader=torch")
    if cfg.runtime.loader == "dali":
        check_dali(cfg)
        return Backend("dali", "runtime.loader=dali")
    if cfg.data.fine_size is not None:
        return Backend("torch", "crops are cut from pixels that only it loads (data.fine_size)")
    if before is not None:
        return Backend(before["name"], "as this run began", before.get("images_per_s"))
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return Backend("torch", "DALI is not installed (extra dali)")
    if device.type != "cuda":
        return Backend("torch", "without a GPU the torch loader is the faster one (benchmarks/README.md, Loading)")
    corpora = training_corpora(cfg)
    if choose_residency(corpora, cfg.runtime.cache_pixels, device, world) != "stream":
        return Backend("torch", "pixels are decoded beforehand")
    return measure_backends(cfg, corpora, device=device)


def measure_backends(cfg: RunConfig, corpora: Sequence[Corpus], *, device: torch.device) -> Backend:
    """The faster of the two, each measured for a second on the run's own data."""
    names: tuple[Name, Name] = ("torch", "dali")
    speed: dict[str, float] = {name: round(_images_per_s(cfg, corpora, name, device), 1) for name in names}
    best: Name = "dali" if speed["dali"] > speed["torch"] else "torch"
    return Backend(best, f"the faster in {_MEASURED_S:g} s of loading", speed)


def check_dali(cfg: RunConfig) -> None:
    """Refuse DALI where it is not installed, or cannot prepare the pixels of this run; raises as `choose_backend`."""
    if cfg.data.fine_size is not None:
        raise ConfigError(
            f"runtime.loader=dali prepares pixels of one size, but data.fine_size={cfg.data.fine_size} wants finer "
            "ones beside them; use runtime.loader=auto or torch"
        )
    if cfg.runtime.cache_pixels in ("ram", "device"):
        raise ConfigError(
            f"runtime.loader=dali decodes as it streams, but runtime.cache_pixels={cfg.runtime.cache_pixels} decodes "
            "beforehand; use runtime.cache_pixels=stream or auto, or runtime.loader=torch"
        )
    require_dali()


def _images_per_s(cfg: RunConfig, corpora: Sequence[Corpus], name: Name, device: torch.device) -> float:
    loader = open_training(cfg, Seat(0, 1, device, name), cache=None, corpora=corpora)
    batches = loader.global_batches(0)
    for _ in itertools.islice(batches, _WARM_UP):
        pass
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < _MEASURED_S:
        images += next(batches).size
    accelerator.synchronize(device)  # copies and tone changes may still be under way
    elapsed = time.perf_counter() - began
    batches.close()
    loader.close()
    return images / elapsed
