"""Running out of memory: what would fit, and what becomes of the run (failures.md, C3).

In the first steps the answer is a smaller micro-batch, which the user has to choose: it is never changed silently,
since that would change the bits. Later it is bad luck (another process, fragmentation), the state is in the middle of
a step and cannot be saved, and a restart from the last checkpoint at the same micro-batch is the answer.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from ddpm_lmk.config import RunConfig, UNetConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.precision import choose_precision
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.errors import ResourceError, StoppedError
from ddpm_lmk.models import ModelCost, model_cost
from ddpm_lmk.models.cost import FLOAT_BYTES
from ddpm_lmk.models.kernels.group_norm import choose_norm
from ddpm_lmk.models.unet import linear_levels
from ddpm_lmk.system.memory import total_bytes
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
