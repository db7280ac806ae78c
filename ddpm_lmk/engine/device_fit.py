"""What `auto` becomes on this device: micro-batch, recomputed levels, compilation, precision.

The memory model (`memory.process_bytes`) says which settings fit, a count of operations which of those is fastest, and
on CUDA one step with random images whether the model was right; where it was not, the next best is tried. What was
chosen is printed and kept in `run.json`, and a continued run takes it from there. None of it is decided by a clock.

Running out of memory: what would fit, and what becomes of the run (failures.md, C3).

In the first steps the answer is a smaller micro-batch, which the user has to choose: it is never changed silently,
since that would change the bits. Later it is bad luck (another process, fragmentation), the state is in the middle of
a step and cannot be saved, and a restart from the last checkpoint at the same micro-batch is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import torch

from ddpm_lmk.config import RunConfig, UNetConfig
from ddpm_lmk.engine.parallel import Parallel, Precision
from ddpm_lmk.engine.precision import choose_precision
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.errors import ResourceError, StoppedError
from ddpm_lmk.models import ModelCost, build_model, model_cost
from ddpm_lmk.models.cost import FLOAT_BYTES
from ddpm_lmk.models.kernels.group_norm import choose_norm
from ddpm_lmk.models.unet import linear_levels
from ddpm_lmk.system.machine import total_bytes
from ddpm_lmk.tasks.task import Task

FIRST_STEPS = 3
USABLE = 0.9  # of a device's memory; the rest goes to the CUDA context and to fragmentation
WORKING_MAPS = {"cuda": 8, "cpu": 16}  # of the first level's size: gradients of a block, and what kernels rearrange
WORKING_KEYS = 4  # of queries or keys, fp32 under autocast: the gradients around a softmax of linear attention
KERNELS_HALF = {"cuda": 0, "cpu": 48 * 2**20}  # what oneDNN keeps for itself in 16 bits; measured: 50 to 110 MiB
WORKING_IMAGES = 6  # of full size: noise, what is noised, result, target and their gradients
CPU_WORDS = "can't allocate memory"  # of the RuntimeError of torch's CPU allocator


class MemoryWatch:
    """Turns an out-of-memory error inside the `with` block into an error that says what to do."""

    def __init__(self, cfg: RunConfig, task: Task, state: TrainState, parallel: Parallel) -> None:
        self._cfg, self._task, self._state, self._parallel = cfg, task, state, parallel
        self._first = state.step

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_out_of_memory(error):
            return
        steps = self._state.step - self._first
        if steps >= FIRST_STEPS:
            raise StoppedError(
                f"out of memory in step {self._state.step + 1}, after {steps} steps that fitted; nothing of this step "
                "can be saved; the same command continues from the last checkpoint at the same micro-batch"
            ) from error
        raise ResourceError(f"out of memory in step {self._state.step + 1}: {self._advice()}") from error

    def _advice(self) -> str:
        share = self._cfg.train.group_size // self._parallel.world
        tried = self._cfg.train.given_micro_batch or share
        sizes = [size for size in range(1, tried) if share % size == 0]
        fitting = [size for size in sizes if size <= self._images_that_fit()] or sizes[:1]
        if not fitting:
            return "not even one image fits; use model.checkpointing=true, a smaller model or smaller images"
        return (
            f"train.micro_batch={tried} images at once do not fit; by the model's estimate {fitting[-1]} would; set "
            f"train.micro_batch={fitting[-1]} (it changes the order of sums, so it is not done for you)"
        )

    def _images_that_fit(self) -> int:
        """By the estimate of `process_bytes`, which grows evenly with the images."""
        cfg, parallel = self._cfg, self._parallel
        cost = training_cost(cfg, self._task, is_fused=uses_fused(cfg, parallel.device.type))
        place: dict[str, Any] = {"device": parallel.device.type, "world": parallel.world, "zero": parallel.zero}
        is_half = parallel.dtype(cfg.train.precision) is not None
        none, one = (process_bytes(cfg, cost, images, is_half=is_half, **place) for images in (0, 1))
        return int((USABLE * device_bytes(parallel) - none) // (one - none))


def training_cost(cfg: RunConfig, task: Task, *, is_fused: bool) -> ModelCost:
    """What one training image costs; `is_fused`: norms of a ddpm_unet keep nothing but their input."""
    if not isinstance(cfg.model, UNetConfig):
        return task.cost(cfg.model, cfg.data.image_size)
    size, outputs = cfg.data.image_size, task.out_channels
    return model_cost(cfg.model, size, outputs, full_size=task.full_size, is_fused=is_fused)


def process_bytes(
    cfg: RunConfig, cost: ModelCost, images: int, *, device: str, is_half: bool, world: int = 1, zero: int = 0
) -> int:
    """Estimated peak of one process that computes `images` of this cost at once.

    The weights in fp32, and copies of those that learn; the weights convolutions compute with, standardised and in the
    type they compute in, which live until the backward pass; what the blocks keep for it; and the maps one block works
    on while it runs.

    Args:
        is_half: activations are kept in 16 bits.
    """
    share = 2 if is_half else 1
    kept = 0 if cfg.optim.freeze else cost.kept_bytes(is_half=is_half)  # no backward pass goes through what is frozen
    learning = learning_bytes(cfg, cost) * (copies_of_weights(cfg, world=world, zero=zero) - 1)
    working = kept + _working_bytes(cfg, device, is_half=is_half)
    libraries = KERNELS_HALF[device] if is_half else 0
    return int(cost.weight_bytes * (1 + 1 / share) + learning + images * working + libraries)


def memory_gib(cfg: RunConfig, task: Task, *, device: str, micro_batch: int, world: int = 1, zero: int = 0) -> float:
    """The same of a run's task on this kind of device, in GiB."""
    cost = training_cost(cfg, task, is_fused=uses_fused(cfg, device))
    place: dict[str, Any] = {"device": device, "is_half": is_half(cfg, device), "world": world, "zero": zero}
    return process_bytes(cfg, cost, micro_batch, **place) / 2**30


def _working_bytes(cfg: RunConfig, device: str, *, is_half: bool) -> float:
    """What a pass needs beside what it keeps, for one image; where kept maps are the most, at the first level."""
    if not isinstance(cfg.model, UNetConfig):
        return 0
    size, model = cfg.data.image_size, cfg.model
    maps = WORKING_MAPS[device] * model.width / (2 if is_half else 1)
    keys = WORKING_KEYS * model.heads * model.head_dim if is_half and linear_levels(model)[0] else 0
    return FLOAT_BYTES * (max(maps, keys) * (size // model.patch) ** 2 + WORKING_IMAGES * size**2)


def learning_bytes(cfg: RunConfig, cost: ModelCost) -> int:
    """Weights that have a gradient, moments and an average; what is frozen, by the run or its task, has none."""
    if cfg.optim.freeze:
        return cost.head_bytes or cost.weight_bytes
    return cost.weight_bytes - (0 if cfg.is_told_time else cost.time_bytes)


def uses_fused(cfg: RunConfig, device: str) -> bool:
    """Do the norms of this run keep nothing but their input?"""
    norm = choose_norm(cfg.train.group_norm, torch.device(device), is_compiled=cfg.train.compile is True)
    return norm.name != "native"


def device_bytes(parallel: Parallel) -> int:
    """Memory of this process's device; on a CPU its share of what this machine, or its container, has."""
    if parallel.device.type == "cuda":
        return torch.cuda.get_device_properties(parallel.device).total_memory
    return total_bytes() // parallel.world


def copies_of_weights(cfg: RunConfig, *, world: int, zero: int) -> float:
    """How many times the size of the weights that learn a process keeps in fp32, activations aside.

    Weights and average are whole everywhere. ZeRO shares out AdamW's moments and keeps a second copy of the weights,
    shared out too; stage 2 shares out the gradient. Class exact keeps the partial sums of its tree.
    """
    moments, average = 2 * (cfg.optim.kind != "sgd"), cfg.train.ema is not None
    if zero:
        return 1 + average + (moments + 1) / world + (1 if zero == 1 else 1 / world)
    leaves = cfg.train.group_size // ((cfg.train.given_micro_batch or cfg.train.group_size) * world)
    sums = leaves.bit_length() + 1 if cfg.train.exactness == "exact" else 0
    return 2 + moments + average + sums


def is_half(cfg: RunConfig, device: str) -> bool:
    """Are activations kept in 16 bits on this kind of device?"""
    return choose_precision(cfg, device).name != "fp32"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Did the device, or the host, have no memory left?"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and CPU_WORDS in str(error)
    )


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
