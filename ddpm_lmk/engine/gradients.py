"""How the gradients of micro-batches become one update: the differences between the ways to do it, behind six calls.

    with updater.micro_batch(number, of=count):     # for each micro-batch of the global batch
        updater.add(total, divisor)                 # its backward pass
    outcome = updater.finish(stop_level)            # reduce, then tell all ranks of all: one exchange
    updater.apply(clip)                             # or not, where the step is left out
    updater.clear()

`OrderedUpdater` adds by all-reduce (`bucket_reduce`; classes ordered and none), `ExactUpdater` by the fixed tree of
`exact_reduce` (class exact), and `zero.ZeroUpdater` is DeepSpeed. In all of them the gradient is the sum of what `add`
was given, over micro-batches and ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import ClipConfig
from ddpm_lmk.engine import exact_reduce
from ddpm_lmk.engine.bucket_reduce import BucketReduce
from ddpm_lmk.engine.optim import clip, global_norm, gradient_views, gradients, moments
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.models.weight_standardization import OncePerStep

if TYPE_CHECKING:
    from ddpm_lmk.engine.parallel import Parallel


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of a step before its update: the same on all of them.

    Attributes:
        loss: weighted sum of losses over the global batch.
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
        """Forward and backward of micro-batch `number` (0 is the first) of this rank's part of a global batch."""
        # Once per step and not once per pass: weights only change at an update.
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

    def finish(self, stop_level: float, wait_s: float = 0.0) -> StepOutcome:
        """Reduce the gradient and exchange what decides about the step; the one synchronisation of a step.

        What is only reported rides along. Numbers of the host are filled in by the device: a copy would wait for it.
        """
        grads = self._reduce()
        # Before the norm: clipping and the spike rule look at the gradient of the weights, not of their standardised
        # form.
        if self._standard is not None:
            self._standard.end()
        self._norm = self._norm_of(grads)
        host = [self._loss.new_full((), value, dtype=torch.float64) for value in (stop_level, wait_s)]
        mine = torch.stack([self._loss.double(), self._norm.double(), *host])
        losses, norms, levels, waits = self._parallel.exchange(mine)
        # All ranks decide by one number, also where their norms differ in the last bit.
        norm = max(norms) if all(map(math.isfinite, norms)) else math.inf
        return StepOutcome(self._loss_of_batch(losses), norm, max(levels), math.fsum(waits))

    def apply(self, cfg: ClipConfig | None) -> None:
        """Clip, and update the weights."""
        clip(cfg, gradients(self._state.model), self._norm)
        self._state.optimizer.step()

    def clear(self) -> None:
        """Forget the gradient; the next micro-batch starts a new global batch."""
        self._loss.zero_()
        # None and not zero: a parameter no pass reaches must not be decayed (AdamW skips None only).
        self._state.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Mapping[str, Tensor]:
        """Optimizer state by parameter name, whole; all ranks call it together."""
        return moments(self._state.optimizer, self._state.model)

    def reload(self) -> None:
        """Take over weights and moments that were put into the state from outside."""

    def close(self) -> None:
        """Leave the model as it was found, for another run to use."""
        # After an error there is what the passes of a step have added up by then.
        self._state.optimizer.zero_grad(set_to_none=True)
        if self._standard is not None:
            self._standard.drop()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @abstractmethod
    def _reduce(self) -> list[Tensor]:
        """The reduced gradient, or this rank's part of it, unscaled."""

    def _norm_of(self, grads: list[Tensor]) -> Tensor:
        return global_norm(grads)

    def _loss_of_batch(self, losses: list[float]) -> float:
        return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan

    def _unscaled(self, grads: list[Tensor]) -> list[Tensor]:
        # In fp32 and after the reduction: dividing in fp16 first would lose what the scale has saved.
        if self._state.scale:
            torch._foreach_mul_(grads, 1.0 / self._state.scale.value)
        return grads


class OrderedUpdater(Updater):
    """Gradients are added by all-reduce while the last backward pass still runs."""

    def __init__(self, state: TrainState, parallel: Parallel, standard: OncePerStep | None = None) -> None:
        super().__init__(state, parallel, standard)
        self.net = state.model
        self._buckets = BucketReduce(state.model) if parallel.world > 1 else None

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """Only the last micro-batch of a global batch sends gradients around."""
        # Adding up locally first sends one gradient per step instead of one per micro-batch.
        if self._buckets is not None and number == of - 1:
            self._buckets.expect()
        return nullcontext()

    def _reduce(self) -> list[Tensor]:
        if self._buckets is not None:
            self._buckets.finish()
        return self._unscaled(gradients(self._state.model))

    def close(self) -> None:
        """Leave the model as it was found, for another run to use."""
        super().close()
        if self._buckets is not None:
            self._buckets.close()


class ExactUpdater(Updater):
    """Class exact: micro-batch k of the global batch is leaf k of one tree, whatever rank computes it.

    A leaf is one flat tensor: the gradient, parameter by parameter in the memory layout of each, then a 1 for each
    parameter that was reached, then the loss, because decisions depend on it too. A parameter no rank reached keeps no
    gradient. Costs up to log2(micro-batches per rank) + 2 gradients of memory, and the reduction waits for the last
    backward pass.
    """

    def __init__(self, state: TrainState, parallel: Parallel, standard: OncePerStep | None = None) -> None:
        super().__init__(state, parallel, standard)
        self.net = state.model
        self._parameters = [p for p in state.model.parameters() if p.requires_grad]
        self._size = sum(p.numel() for p in self._parameters)
        # Gradients, flags and loss travel as one tensor: one collective, and the loss is summed in the same order.
        needed = self._size + len(self._parameters) + 1
        # A multiple of the ranks, for all-to-all in equal parts.
        self._length = -(-needed // parallel.world) * parallel.world
        self._stack = exact_reduce.Stack(0)
        self._count = 0
        self._reached: set[int] = set()  # numbers of parameters a micro-batch of this rank came to
        self._free: list[Tensor] = []
        self._known_flags: dict[tuple[bool, ...], Tensor] = {}

    def _during(self, number: int, of: int) -> AbstractContextManager[Any]:
        """The first of a global batch decides which leaves of the tree are this rank's."""
        if number == 0:
            self._stack, self._count, self._reached = exact_reduce.Stack(self._parallel.rank * of), of, set()
        return nullcontext()

    def add(self, total: Tensor, divisor: Tensor | int) -> None:
        """Backward of one micro-batch, whose gradient becomes a leaf."""
        super().add(total, divisor)
        # fp32 whatever the autocast type: class exact promises the same sum on any number of ranks.
        leaf = self._free.pop() if self._free else total.new_zeros(self._length, dtype=torch.float32)
        reached = tuple(p.grad is not None for p in self._parameters)
        # Known on the host from which gradients exist; asking the device would wait for it.
        self._reached |= {number for number, is_reached in enumerate(reached) if is_reached}
        places = gradient_views(leaf, self._parameters)
        torch._foreach_copy_(
            [place for place, is_reached in zip(places, reached) if is_reached],
            [p.grad for p in self._parameters if p.grad is not None],
        )
        for place, is_reached in zip(places, reached):
            if not is_reached:
                place.zero_()
        leaf[self._size : self._size + len(reached)] = self._flags(reached)
        leaf[self._size + len(reached)] = total.detach()
        self._state.optimizer.zero_grad(set_to_none=True)
        self._free += self._stack.push(leaf)

    @torch.no_grad()
    def _reduce(self) -> list[Tensor]:
        nodes = self._stack.nodes
        total = exact_reduce.fold_over_ranks(nodes, count=self._count, world=self._parallel.world)
        self._free = [*self._free, *(node.values for node in nodes)]  # used again from the next global batch on
        tail = self._size + len(self._parameters)
        reached = self._reached
        if self._parallel.world > 1:  # a process that is alone knows it, and need not wait for its device
            reached = {number for number, count in enumerate(total[self._size : tail].tolist()) if count}
        self._loss.copy_(total[tail])
        grads = []
        places = gradient_views(total, self._parameters)
        for number, (parameter, place) in enumerate(zip(self._parameters, places, strict=True)):
            if number in reached:
                # A view into the flat sum: no copy, and the optimizer sees the layout of the parameter.
                parameter.grad = place
                grads.append(place)
        return self._unscaled(grads)

    def _loss_of_batch(self, losses: list[float]) -> float:
        return losses[0]

    def _flags(self, reached: tuple[bool, ...]) -> Tensor:
        """A 1 for each that was reached, on the device: made once, because bringing it there waits for the device."""
        if reached not in self._known_flags:
            self._known_flags[reached] = torch.tensor(reached, dtype=torch.float32, device=self._loss.device)
        return self._known_flags[reached]
