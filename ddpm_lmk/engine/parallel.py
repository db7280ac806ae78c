"""The process group, the device and the precision of a run. The only file that knows Accelerate.

Accelerate makes the group and chooses the device. Two things are not left to it. Precision: its setting belongs to the
process and cannot change between the runs of a sweep, so autocast is entered here. And sums of gradients, which are
those of `gradients`. Buffers that a forward pass changes are `RunningStatistics`', all others are the same on all ranks
from the start.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from ddpm_lmk.engine.exact_reduce import all_gather
from ddpm_lmk.engine.requirements import check_zero
from ddpm_lmk.errors import LaunchError, LmkError
from ddpm_lmk.system import accelerator, environment
from ddpm_lmk.system.machine import cpu_name, granted_cores, keep_freed_memory, return_freed_memory
from ddpm_lmk.system.signals import print_status
from ddpm_lmk.tasks.task import OneRank

T = TypeVar("T")
Precision = Literal["auto", "fp32", "bf16", "fp16"]

LARGEST_BUCKET = 500_000_000  # elements, DeepSpeed's default


class Parallel:
    """The place of this process among all processes of a run, alone or under the torchelastic environment."""

    def __init__(self, device: Literal["auto", "cpu", "cuda"] = "auto", *, zero: int = 0) -> None:
        """Join the group of our launcher; a process that it has not started is the only one.

        Args:
            zero: ZeRO stage of the launch file; 0 is without DeepSpeed.

        Raises:
            LaunchError: no CUDA device or no DeepSpeed where asked for, or a group of another size than promised.
        """
        if device == "cuda" and not accelerator.is_available():
            raise LaunchError("asked for a CUDA device, found none; check `ddpm-lmk doctor`, or use --cpu N")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # class exact needs it before the first product
        for line in environment.stand_alone():
            print_status(f"note: {line}")
        promised = int(os.environ["WORLD_SIZE"]) if environment.is_rank() else 1
        if torch.get_num_threads() > granted_cores():  # torch knows of no control group
            torch.set_num_threads(granted_cores())
        use_cpu = device == "cpu" or not accelerator.is_available()
        if use_cpu:
            keep_freed_memory()
        # No mixed precision: it belongs to the process there, and a sweep has runs of several.
        self._accelerator = Accelerator(cpu=use_cpu, mixed_precision="no")
        self.zero = zero
        self.rank = self._accelerator.process_index
        self.world = self._accelerator.num_processes
        self.device = self._accelerator.device
        self.auto_precision: Precision = (
            "bf16" if self.device.type == "cuda" and accelerator.has_bf16() else "fp32"
        )  # a run may choose another
        # A rendezvous that ends early would train with fewer ranks and another global batch.
        if self.world != promised:
            raise LaunchError(f"joined a group of {self.world} processes, wanted WORLD_SIZE={promised}; start it again")
        if zero:
            self._join_deepspeed()

    @property
    def device_name(self) -> str:
        """The kind of device this process works on."""
        return accelerator.name(self.device) or cpu_name()

    @property
    def is_main(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    def shard(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """The DeepSpeed engine around `model`, which leaves each rank a part of the state of `optimizer`.

        DeepSpeed is used directly and not through Accelerate's plugin, which belongs to the process and not to a run,
        imports transformers, and is silently ignored for a process that was told to use the CPU. The settings that
        matter are written out: its default for clipping is 1.0, and a group ends where the loop says. Its buffer for
        gradients is 2 GB whatever the network, more than what is shared out saves: it gets the size of the gradient.
        """
        import deepspeed

        largest = min(LARGEST_BUCKET, sum(parameter.numel() for parameter in model.parameters()))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.zero, "reduce_bucket_size": largest},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        return engine

    def whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The moment `key` of a parameter, gathered from the ranks that `shard` gave parts of it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        value = safe_get_full_optimizer_state(parameter, key)
        assert value is not None, f"no {key} to gather"
        return value

    def set_whole(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Hand out the parts of a parameter, or of its moment `key`, to the ranks that keep them."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def release(self) -> None:
        """Forget prepared models, so that a process can train many, one after the other."""
        self._accelerator.free_memory()
        return_freed_memory()

    def autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """The precision of a forward pass; auto is `auto_precision`."""
        dtype = self.dtype(precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    @contextmanager
    def training_in(self, precision: Precision) -> Iterator[None]:
        """Have `auto` mean this while the block lasts."""
        before, self.auto_precision = self.auto_precision, precision
        try:
            yield
        finally:
            self.auto_precision = before

    def dtype(self, precision: Precision) -> torch.dtype | None:
        """The type that convolutions and matrix products compute in under `autocast`; None: that of the weights."""
        precision = self.auto_precision if precision == "auto" else precision
        if precision == "fp32":
            return None
        return torch.float16 if precision == "fp16" else torch.bfloat16

    def exchange(self, values: Tensor) -> list[list[float]]:
        """`values` `[K]` of every rank, on the host: K lists of W numbers."""
        # Rank-major after the gather: one transpose on the host gives a list per value.
        table = values.repeat(self.world)
        if self.world > 1:
            all_gather(table, values)
        return table.view(self.world, -1).T.tolist()

    def sum(self, values: Tensor) -> list[float]:
        """Element-wise sum over ranks `[K]`, on the host."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """Element-wise mean over ranks, in place and on the device."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, on every rank, in rank order."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: T) -> T:
        """`value` of rank 0, on every rank."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; if it raises `LmkError` on one, it raises the same on all (none waits for ever).

        The block must not communicate. An error that left this way has `is_shared` set: one rank is enough to tell it.
        """
        error: LmkError | None = None
        try:
            yield
        except LmkError as caught:
            error = caught
        # Every rank takes part, whether it failed or not: this is what keeps the collectives in step.
        failed = [found for found in self.gather(error) if found is not None]
        if failed:
            # Alone, its own error is raised, with its traceback; one that was sent has none.
            found = error if error is not None and self.world == 1 else failed[0]
            found.is_shared = True
            raise found

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 only; every rank gets its result, or its `LmkError`."""
        result: Any = None
        with self.together():
            if self.is_main:
                result = function()
        return self.broadcast(result)

    def _join_deepspeed(self) -> None:
        """Have DeepSpeed use the group and the kind of device of this process."""
        check_zero(self.zero, self.world)
        os.environ["DS_ACCELERATOR"] = self.device.type
        # It reports a success to standard output, which belongs to results, and uses an old name of torch's.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor` is deprecated.*", category=FutureWarning)
        with redirect_stdout(sys.stderr):
            import deepspeed

            deepspeed.init_distributed(dist_init_required=False)

    def close(self) -> None:
        """Leave the group; call once, at the end of a worker process."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


class AllRanks(OneRank):
    """Rows of all ranks of the process group. Every rank calls it as often, with as many rows."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self._world = rank, world

    def all_gather(self, mine: Tensor) -> Tensor:
        """See `OneRank.all_gather`."""
        return _Rows.apply(mine, self.rank, self._world)


class _Rows(torch.autograd.Function):
    """All-gather whose gradient is the sum of what every rank wants of a row.

    Losses are added over ranks (`gradients`), so this is the gradient of the loss of all ranks together.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.count = rank, len(mine)
        rows = mine.new_empty(world * len(mine), *mine.shape[1:])
        all_gather(rows, mine.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        # all_reduce works in place, and autograd still owns the gradient.
        wanted = wanted.contiguous().clone()
        distributed.all_reduce(wanted)
        return wanted[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count], None, None


class RunningStatistics:
    """Buffers of one model in training that a forward pass changes: the same on all ranks after every step.

    They are those called `running_*`, of BatchNorm and of centring. A rank updates them from the images it sees; after
    a step they become the mean over ranks, and where the step is left out they are as before it. So a checkpoint holds
    what every rank has, and one batch of not-a-number does not stay for ever. Batch statistics themselves are those of
    one micro-batch on one device, so another number of processes is another run unless `train.micro_batch` is set, and
    even then running statistics differ: the exactness class says so.
    """

    def __init__(self, model: nn.Module, parallel: Parallel) -> None:
        self._parallel = parallel
        # Those of a frozen encoder do not change, and the mean of three equal numbers may be another number.
        self._running = [
            buffer
            for module in model.modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
            if is_running(name)
        ]
        self._before: list[Tensor] = []

    def begin_step(self) -> None:
        """Remember what they are before the step."""
        self._before = [buffer.clone() for buffer in self._running]

    @torch.no_grad()
    def end_step(self, *, is_kept: bool) -> None:
        """Take the mean over ranks, or go back."""
        if not self._running:
            return
        if not is_kept:
            torch._foreach_copy_(self._running, self._before)
        elif self._parallel.world > 1:
            # One collective for all buffers, of which a ResNet-50 has over a hundred.
            flat = torch.cat([buffer.flatten() for buffer in self._running])
            parts = self._parallel.mean(flat).split([buffer.numel() for buffer in self._running])
            torch._foreach_copy_(self._running, [part.view_as(b) for part, b in zip(parts, self._running, strict=True)])


def is_running(name: str) -> bool:
    """Is this buffer a running statistic?"""
    return name.rpartition(".")[2].startswith("running_")
