"""The way from one rank to all of them, for losses that compare images across ranks (`tasks.task.Everyone`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ddpm_lmk.engine.exact_reduce import all_gather
from ddpm_lmk.tasks.task import Everyone


class AllRanks(Everyone):
    """Rows of all ranks of the process group. Every rank calls it as often, with as many rows."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self._world = rank, world

    def rows(self, mine: Tensor) -> Tensor:
        """See `Everyone.rows`."""
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
