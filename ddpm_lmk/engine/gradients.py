"""How the gradients of micro-batches become one update: the differences between the ways to do it, behind six calls.

    with updater.micro_batch(number, of=count):     # for each micro-batch of the group
        updater.add(total, divisor)                 # its backward pass
    seen = updater.finish(stop_level)               # reduce, then tell all ranks of all: one exchange
    updater.apply(clip)                             # or not, where the step is left out
    updater.clear()

`Averaged` is DDP (classes ordered and none), `Treed` the fixed tree of `tree` (class exact), `sharded.Sharded` is
DeepSpeed. The gradient is the sum of what `add` was given over micro-batches and ranks, in all of them.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_lmk.config import ClipConfig, RunConfig
from ddpm_lmk.engine import exact_reduce
from ddpm_lmk.engine.optim import clip, global_norm, gradients, moments
from ddpm_lmk.engine.requirements import want_kept
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.models.weight_standardization import OncePerStep

if TYPE_CHECKING:
    from ddpm_lmk.engine.parallel import Parallel


@dataclass(frozen=True)
class Seen:
    """What all ranks know of a step before its update: the same on all of them.

    Attributes:
        loss: weighted sum of losses over the group.
        norm: norm of the reduced gradient, before clipping; infinite where any rank's is not finite.
        stop_level: the largest of any rank.
        wait_s: seconds that ranks waited for the data of this step, added up.
    """

    loss: float
    norm: float
    stop_level: float
    wait_s: float


class Updater(ABC):
    """Turns losses of micro-batches into one update of `state`.

    Attributes:
        net: the module a task calls.
    """

    net: nn.Module

    def __init__(self, state: TrainState, parallel: Parallel, standard: OncePerStep | None = None) -> None:
        self._state, self._parallel, self._standard = state, parallel, standard
        self._loss = torch.zeros((), device=parallel.device)
        self._norm = torch.zeros((), device=parallel.device)

    def micro_batch(self, number: int, *, of: int) -> AbstractContextManager[Any]:
        """Forward and backward of micro-batch `number` (0 is the first) of this rank's part of a group."""
        if number == 0 and self._standard is not None:
            self._standard.begin()
        return self._during(number, of)

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """What surrounds a micro-batch."""
        return nullcontext()

    def add(self, total: Tensor, divisor: Tensor | int) -> None:
        """Backward of one micro-batch, given the weighted sum of its losses and what the gradient is divided by."""
        self._loss += total.detach()
        self._backward(total / divisor * self._state.scale.value)

    def finish(self, stop_level: float, wait_s: float = 0.0) -> Seen:
        """Reduce the gradient and exchange what decides about the step; the one synchronisation of a step.

        What is only told rides along. Numbers of the host are filled in by the device: copying them would wait for it.
        """
        grads = self._reduce()
        if self._standard is not None:
            self._standard.end()
        self._norm = self._norm_of(grads)
        told = [self._loss.new_full((), value, dtype=torch.float64) for value in (stop_level, wait_s)]
        mine = torch.stack([self._loss.double(), self._norm.double(), *told])
        losses, norms, levels, waits = self._parallel.exchange(mine)
        norm = max(norms) if all(map(math.isfinite, norms)) else math.inf
        return Seen(self._loss_of_group(losses), norm, max(levels), math.fsum(waits))

    @abstractmethod
    def apply(self, cfg: ClipConfig | None) -> None:
        """Clip, and update the weights."""

    def clear(self) -> None:
        """Forget the gradient; the next micro-batch starts a new group."""
        self._loss.zero_()
        self._state.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Mapping[str, Tensor]:
        """Optimizer state by parameter name, whole; all ranks call it together."""
        return moments(self._state.optimizer, self._state.model)

    def reload(self) -> None:
        """Take over weights and moments that were put into the state from outside."""

    def close(self) -> None:
        """Leave the model as it was found, for another run to use."""
        if self._standard is not None:
            self._standard.drop()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _reduce(self) -> list[Tensor]:
        """The reduced gradient, or this rank's part of it, unscaled."""

    def _norm_of(self, grads: list[Tensor]) -> Tensor:
        return global_norm(grads)

    def _loss_of_group(self, losses: list[float]) -> float:
        return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan

    def _unscaled(self, grads: list[Tensor]) -> list[Tensor]:
        if self._state.scale:
            torch._foreach_mul_(grads, 1.0 / self._state.scale.value)
        return grads


class Averaged(Updater):
    """DDP: gradients are added by all-reduce while the last backward pass still runs.

    DDP averages over ranks, so the loss is multiplied by their number, and the result is the plain sum.
    """

    def __init__(self, state: TrainState, parallel: Parallel, standard: OncePerStep | None = None) -> None:
        super().__init__(state, parallel, standard)
        self.net = parallel.wrap(state.model)

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a group sends gradients around."""
        is_last = number == of - 1
        return self.net.no_sync() if isinstance(self.net, DistributedDataParallel) and not is_last else nullcontext()

    def apply(self, cfg: ClipConfig | None) -> None:
        """Clip, and update the weights."""
        clip(cfg, gradients(self._state.model), self._norm)
        self._state.optimizer.step()

    def _backward(self, loss: Tensor) -> None:
        (loss * self._parallel.world).backward()

    def _reduce(self) -> list[Tensor]:
        return self._unscaled(gradients(self._state.model))


class Treed(Updater):
    """Class exact: micro-batch k of the group is leaf k of one tree, whatever rank computes it.

    A leaf is one flat tensor: the gradient, parameter by parameter in the memory layout of each, then a 1 for each
    parameter that was reached, then the loss, because decisions depend on it too. A parameter no rank reached keeps no
    gradient. Costs up to log2(micro-batches per rank) + 2 gradients of memory, and the reduction waits for the last
    backward pass.
    """

    def __init__(self, state: TrainState, parallel: Parallel, standard: OncePerStep | None = None) -> None:
        super().__init__(state, parallel, standard)
        self.net = state.model
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in self._parameters]
        self._starts = [0, *itertools.accumulate(sizes)]
        needed = self._starts[-1] + len(sizes) + 1
        self._length = -(-needed // parallel.world) * parallel.world
        self._stack = exact_reduce.Stack(0)
        self._count = 0
        self._reached: set[int] = set()  # numbers of parameters a micro-batch of this rank came to
        self._free: list[Tensor] = []
        self._known_flags: dict[tuple[bool, ...], Tensor] = {}

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """The first of a group decides which leaves of the tree are this rank's."""
        if number == 0:
            self._stack, self._count, self._reached = exact_reduce.Stack(self._parallel.rank * of), of, set()
        return nullcontext()

    def add(self, total: Tensor, divisor: Tensor | int) -> None:
        """Backward of one micro-batch, whose gradient becomes a leaf."""
        super().add(total, divisor)
        leaf = self._free.pop() if self._free else total.new_zeros(self._length, dtype=torch.float32)
        reached = tuple(p.grad is not None for p in self._parameters)
        self._reached |= {number for number, is_reached in enumerate(reached) if is_reached}
        places = self._places(leaf)
        torch._foreach_copy_(
            [place for place, is_reached in zip(places, reached) if is_reached],
            [p.grad for p in self._parameters if p.grad is not None],
        )
        for place, is_reached in zip(places, reached):
            if not is_reached:
                place.zero_()
        leaf[self._starts[-1] : self._starts[-1] + len(reached)] = self._flags(reached)
        leaf[self._starts[-1] + len(reached)] = total.detach()
        self._state.optimizer.zero_grad(set_to_none=True)
        self._free += self._stack.push(leaf)

    def apply(self, cfg: ClipConfig | None) -> None:
        """Clip, and update the weights."""
        clip(cfg, gradients(self._state.model), self._norm)
        self._state.optimizer.step()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def _reduce(self) -> list[Tensor]:
        nodes = self._stack.nodes
        total = exact_reduce.fold_over_ranks(nodes, count=self._count, world=self._parallel.world)
        self._free = [*self._free, *(node.values for node in nodes)]  # used again from the next group on
        tail = self._starts[-1] + len(self._parameters)
        reached = self._reached
        if self._parallel.world > 1:  # a process that is alone knows it, and need not wait for its device
            reached = {number for number, count in enumerate(total[self._starts[-1] : tail].tolist()) if count}
        self._loss.copy_(total[tail])
        grads = []
        for number, (parameter, place) in enumerate(zip(self._parameters, self._places(total), strict=True)):
            if number in reached:
                parameter.grad = place
                grads.append(place)
        return self._unscaled(grads)

    def _loss_of_group(self, losses: list[float]) -> float:
        return losses[0]

    def _flags(self, reached: tuple[bool, ...]) -> Tensor:
        """A 1 for each that was reached, on the device: made once, because bringing it there waits for the device."""
        if reached not in self._known_flags:
            self._known_flags[reached] = torch.tensor(reached, dtype=torch.float32, device=self._loss.device)
        return self._known_flags[reached]

    def _places(self, flat: Tensor) -> list[Tensor]:
        """By parameter, the part of a leaf that is its gradient."""
        return [torch.as_strided(flat, p.shape, p.stride(), start) for p, start in zip(self._parameters, self._starts)]


def build_updater(cfg: RunConfig, state: TrainState, parallel: Parallel) -> Updater:
    """The way of the run's exactness class and of the launch file's ZeRO stage.

    Raises:
        ConfigError: the run asks for what cannot be kept together.
    """
    want_kept(cfg, world=parallel.world, zero=parallel.zero)
    if parallel.zero:
        from ddpm_lmk.engine.zero import Sharded

        return Sharded(state, parallel, autocast=lambda: parallel.autocast(cfg.train.precision))
    standard = None
    if cfg.train.weight_standardization != "pass":
        standard = OncePerStep(state.model, dtype=parallel.dtype(cfg.train.precision))
    return (Treed if cfg.train.exactness == "exact" else Averaged)(state, parallel, standard)
