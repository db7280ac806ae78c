"""Running out of memory: what would fit, and what becomes of the run (failures.md, C3).

In the first steps the answer is a smaller micro-batch, which the user has to choose: it is never changed silently,
since that would change the bits. Later it is bad luck (another process, fragmentation), the state is in the middle of
a step and cannot be saved, and a restart from the last checkpoint at the same micro-batch is the answer.
"""

from __future__ import annotations

from types import TracebackType

import psutil  # type: ignore[import-untyped]
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.errors import ResourceError, StoppedError
from ddpm_lmk.tasks.task import Task

FIRST_STEPS = 3
USABLE = 0.9  # of a device's memory; the rest goes to the CUDA context and to fragmentation
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
        tried = self._cfg.train.micro_batch or share
        sizes = [size for size in range(1, tried) if share % size == 0]
        fitting = [size for size in sizes if size <= self._images_that_fit()] or sizes[:1]
        if not fitting:
            return "not even one image fits; use model.checkpointing=true, a smaller model or smaller images"
        return (
            f"train.micro_batch={tried} images at once do not fit; by the model's estimate {fitting[-1]} would; set "
            f"train.micro_batch={fitting[-1]} (it changes the order of sums, so it is not done for you)"
        )

    def _images_that_fit(self) -> int:
        """By the estimate of `models.cost`: weights, gradients, moments and average, the rest for activations."""
        cfg, task = self._cfg, self._task
        cost = task.cost(cfg.model, cfg.data.image_size)
        copies = copies_of_weights(cfg, world=self._parallel.world, zero=self._parallel.zero)
        room = USABLE * self._device_bytes() - copies * cost.weight_bytes
        return int(room // (cost.activation_bytes / (2 if is_half(cfg, self._parallel.device.type) else 1)))

    def _device_bytes(self) -> int:
        if self._parallel.device.type == "cuda":
            return torch.cuda.get_device_properties(self._parallel.device).total_memory
        return psutil.virtual_memory().total // self._parallel.world


def copies_of_weights(cfg: RunConfig, *, world: int, zero: int) -> float:
    """How many times the size of the weights a process keeps in fp32, activations aside.

    Weights and average are whole everywhere. ZeRO shares out AdamW's moments and keeps a second copy of the weights,
    shared out too; stage 2 shares out the gradient. Class exact keeps the partial sums of its tree.
    """
    moments, average = 2 * (cfg.optim.kind == "adamw"), cfg.train.ema is not None
    if zero:
        return 1 + average + (moments + 1) / world + (1 if zero == 1 else 1 / world)
    leaves = cfg.train.group_size // ((cfg.train.micro_batch or cfg.train.group_size) * world)
    sums = leaves.bit_length() + 1 if cfg.train.exactness == "exact" else 0
    return 2 + moments + average + sums


def is_half(cfg: RunConfig, device: str) -> bool:
    """Are activations kept in 16 bits on this kind of device?"""
    return cfg.train.precision in ("bf16", "fp16") or (cfg.train.precision == "auto" and device == "cuda")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Did the device, or the host, have no memory left?"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and CPU_WORDS in str(error)
    )
