"""The way from one rank to all of them, for losses that compare images across ranks (`tasks.task.OneRank`).

What a forward pass leaves behind in a model: running statistics, the same on all ranks after every step.

By name: buffers called `running_*`, which are those of BatchNorm and of centring. A rank updates them from the images
it sees; after a step they become the mean over ranks, and where the step is left out they are as before it. So a
checkpoint holds what every rank has, a resumed run continues bit by bit on as many processes, and one batch of
not-a-number does not stay for ever. Batch statistics themselves are those of one micro-batch on one device, so another
number of processes is another run unless `train.micro_batch` is set, and even then running statistics differ: the
class says so (`exactness`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from ddpm_lmk.engine.exact_reduce import all_gather
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.tasks.task import OneRank


class AllRanks(OneRank):
    """Rows of all ranks of the process group. Every rank calls it as often, with as many rows."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self._world = rank, world

    def all_gather(self, mine: Tensor) -> Tensor:
        """See `OneRank.all_gather`."""
        return _Rows.apply(mine, self.rank, self._world)


class _Rows(torch.autograd.Function):
    """All-gather whose gradient is the sum of what every rank wants of a row.

    Losses are added over ranks (`updater`), so this is the gradient of the loss of all ranks together.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.count = rank, len(mine)
        rows = mine.new_empty(world * len(mine), *mine.shape[1:])
        all_gather(rows, mine.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        wanted = wanted.contiguous().clone()
        distributed.all_reduce(wanted)
        return wanted[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count], None, None


class Statistics:
    """The running statistics of one model; for a model without, every call does nothing."""

    def __init__(self, model: nn.Module, parallel: Parallel) -> None:
        self._parallel = parallel
        self._running = [buffer for name, buffer in model.named_buffers() if is_running(name)]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """A step begins."""
        self._before = [buffer.clone() for buffer in self._running]

    @torch.no_grad()
    def settle(self, *, is_kept: bool) -> None:
        """A step ends: take the mean over ranks, or go back."""
        if not self._running:
            return
        if not is_kept:
            torch._foreach_copy_(self._running, self._before)
        elif self._parallel.world > 1:
            flat = torch.cat([buffer.flatten() for buffer in self._running])
            parts = self._parallel.mean(flat).split([buffer.numel() for buffer in self._running])
            torch._foreach_copy_(self._running, [part.view_as(b) for part, b in zip(parts, self._running, strict=True)])


def is_running(name: str) -> bool:
    """Is this buffer a running statistic?"""
    return name.rpartition(".")[2].startswith("running_")
