"""What `auto` becomes on this device: micro-batch, recomputed levels, compilation, precision.

The memory model (`memory.process_bytes`) says which settings fit, a count of operations which of those is fastest, and
on CUDA one step with random images whether the model was right; where it was not, the next best is tried. What was
chosen is printed and kept in `run.json`, and a continued run takes it from there. None of it is decided by a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.memory import USABLE, device_bytes, is_out_of_memory, process_bytes, uses_fused
from ddpm_lmk.engine.parallel import Parallel, Precision
from ddpm_lmk.engine.precision import choose_precision
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.models import build_model, model_cost

LOST_PER_PASS = 0.5  # images that a pass of a micro-batch costs beside its own: launches, and matrices that are small
COMPILED_FROM = 5000  # steps of a run that make up for a compilation
GIB = 2**30
Probe = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Fitted:
    """What a run does on this device; the content of `fit` in run.json."""

    precision: Precision
    precision_reason: str
    compile: bool
    micro_batch: int | None
    checkpointing: bool | tuple[bool, ...]
    predicted_gib: float | None = None  # where something was to be chosen
    device_gib: float | None = None

    def applied(self, cfg: RunConfig) -> RunConfig:
        """The run with numbers in the place of `auto`, precision aside, which belongs to training only."""
        train: dict[str, Any] = {"compile": self.compile}
        if cfg.train.micro_batch == "auto":
            train["micro_batch"] = self.micro_batch
        model = cfg.model
        if getattr(model, "checkpointing", False) == "auto":
            model = model.model_copy(update={"checkpointing": self.checkpointing})
        return cfg.model_copy(update={"model": model, "train": cfg.train.model_copy(update=train)})

    def __str__(self) -> str:
        words = [f"precision={self.precision} ({self.precision_reason})"]
        if self.predicted_gib is not None:
            again = self.checkpointing
            levels = "all" if again is True else [i for i, is_so in enumerate(again) if is_so] if again else "none"
            words.append(f"micro_batch={self.micro_batch}, recomputed levels: {levels}")
            words.append(f"about {self.predicted_gib:.1f} of {self.device_gib:.1f} GiB")
        return ", ".join([*words, *(["compiled"] if self.compile else [])])

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Fitted:
        """Back from run.json."""
        again = facts["checkpointing"]
        return cls(**{**facts, "checkpointing": tuple(again) if isinstance(again, list) else again})


def is_free(cfg: RunConfig) -> bool:
    """Is it left to the device how many images are computed at once, or what is recomputed?"""
    return cfg.train.micro_batch == "auto" or getattr(cfg.model, "checkpointing", None) == "auto"


def fit_to_device(
    cfg: RunConfig, outputs: int, parallel: Parallel, *, steps: int, room: int | None = None, probe: Probe | None = None
) -> Fitted:
    """Choose for this device; the same on all ranks.

    Args:
        outputs: channels of the network's result.
        steps: length of the run.
        room: bytes there are; None: the device's own.
        probe: does one step of this run fit? None: one is computed where the device is CUDA and something is auto.

    Raises:
        ResourceError: nothing fits by the memory model, or nothing that it allows fits in truth.
    """
    precision = choose_precision(cfg, parallel.device.type)
    room = min(parallel.gather(device_bytes(parallel) if room is None else room))
    compiled = cfg.train.compile
    if compiled == "auto":
        compiled = parallel.device.type == "cuda" and cfg.train.exactness != "exact" and steps >= COMPILED_FROM
    fixed: dict[str, Any] = {"precision": precision.name, "compile": compiled, "precision_reason": precision.reason}
    if not is_free(cfg):
        return Fitted(**fixed, micro_batch=None, checkpointing=getattr(cfg.model, "checkpointing", False))
    if probe is None and parallel.device.type == "cuda":
        probe = _Step(outputs, parallel, precision.name)
    tried = 0
    for candidate in _candidates(cfg, outputs, parallel, {**fixed, "device_gib": round(room / GIB, 2)}):
        assert candidate.predicted_gib is not None
        if candidate.predicted_gib * GIB > USABLE * room:
            continue
        if probe is None or all(parallel.gather(probe(candidate.applied(cfg)))):
            return candidate
        tried += 1
    raise ResourceError(
        f"no micro-batch fits the {room / GIB:.1f} GiB of this device{f', {tried} were tried' if tried else ''}; use a "
        "smaller model.width, smaller images, or a device with more memory"
    )


def _candidates(cfg: RunConfig, outputs: int, parallel: Parallel, fixed: dict[str, Any]) -> list[Fitted]:
    """Every way to do the run, the fastest first, by operations and what each pass loses."""
    found: list[tuple[float, Fitted]] = []
    half = fixed["precision"] != "fp32"
    place: dict[str, Any] = {"device": parallel.device.type, "world": parallel.world, "zero": parallel.zero}
    for micro_batch in _micro_batches(cfg, parallel.world):
        for again in _levels(cfg):
            fitted = Fitted(**fixed, micro_batch=micro_batch, checkpointing=again)
            run = fitted.applied(cfg)
            is_fused = uses_fused(run, parallel.device.type)
            cost = model_cost(run.model, cfg.data.image_size, outputs, is_fused=is_fused)
            needed = process_bytes(run, cost, micro_batch, is_half=half, **place)
            fitted = replace(fitted, predicted_gib=round(needed / GIB, 2))
            found.append((cost.flops_train * (1 + LOST_PER_PASS / micro_batch), fitted))
    return [fitted for _, fitted in sorted(found, key=lambda pair: pair[0])]


def _micro_batches(cfg: RunConfig, world: int) -> list[int]:
    """Sizes that divide the share of a rank; the one there is where the run file says it."""
    share = max(1, cfg.train.group_size // world)
    if cfg.train.micro_batch != "auto":
        return [cfg.train.micro_batch or share]
    return [size for size in range(1, share + 1) if share % size == 0]


def _levels(cfg: RunConfig) -> Iterator[bool | tuple[bool, ...]]:
    """What may be recomputed: nothing, then more and more levels from the first, whose maps are the largest."""
    wanted = getattr(cfg.model, "checkpointing", False)
    if wanted != "auto":
        yield wanted
        return
    levels = len(getattr(cfg.model, "multipliers", ()))
    yield False
    for count in range(1, levels):
        yield tuple(level < count for level in range(levels))
    yield True


class _Step:
    """Forward and backward pass of random images, and room for what the first update adds."""

    def __init__(self, outputs: int, parallel: Parallel, precision: Precision) -> None:
        self._outputs, self._parallel, self._precision = outputs, parallel, precision

    def __call__(self, cfg: RunConfig) -> bool:
        device, size = self._parallel.device, cfg.data.image_size
        images = cfg.train.given_micro_batch or cfg.train.group_size // self._parallel.world
        try:
            model = build_model(cfg.model, out_channels=self._outputs).to(device)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            later = [torch.empty_like(p) for p in model.parameters() for _ in range(2 + (cfg.train.ema is not None))]
            x = torch.rand(images, 1, size, size, device=device)
            with self._parallel.autocast(self._precision):
                out = model(x, torch.ones(images, dtype=torch.long, device=device))
            out.float().square().mean().backward()
            del model, later, x, out
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return True
