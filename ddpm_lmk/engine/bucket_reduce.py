"""The sum of gradients over ranks by all-reduce, a bucket at a time, while the backward pass still runs.

What DistributedDataParallel does, without a wrapper around the network, at the same price. DDP makes its buckets
anew after the first step of a process, so that a resumed run would add in another order than one that was never
stopped, unless it searches the graph for unused parameters in every step. Here buckets are the same from the first step
on. Flags that travel with the gradients say which parameters no rank has reached: a task may leave a part of the
network out (fine-tuning without time conditioning does), and what has no gradient must not be decayed.

The backward pass of a compiled network is one graph, whose gradients come all at its end: nothing is sent while it
runs. DDP would have Dynamo cut the graph at the ends of its buckets, at the price of what is not fused across a cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ddpm_lmk.engine.optim import gradient_views

BUCKET = 25 * 2**18  # elements: 25 MiB, DDP's default


class BucketReduce:
    """Adds up the gradients of one model, whose trained weights become those of rank 0 at the start.

        buckets.expect()    # before the last backward pass of a step; those before it add up on this rank
        loss.backward()
        buckets.finish()

    The gradients are then views of the buckets, in the layout of their parameters; None where no rank has one.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        # A backward pass comes to the last parameters first.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad][::-1]
        self._buckets = [Bucket(part) for part in _cut(trained)]
        self._missing: list[int] = []  # gradients of each bucket that have not come yet; empty where none is expected
        self._sent: list[Any] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket.parameters
        ]
        for bucket in self._buckets:
            torch._foreach_copy_(bucket.places, list(bucket.parameters))
            distributed.broadcast(bucket.flat, 0)
            torch._foreach_copy_(list(bucket.parameters), bucket.places)

    def expect(self) -> None:
        """The next backward pass is the last of its step."""
        self._missing = [len(bucket.parameters) for bucket in self._buckets]

    def finish(self) -> None:
        """Wait for the sums."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for work in self._sent:
            work.wait()
        self._missing, self._sent = [], []
        for bucket in self._buckets:
            bucket.complete()

    def close(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, number: int) -> None:
        """A gradient of this bucket is there."""
        if not self._missing:
            return
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "only one backward pass may follow `expect`: this bucket may be on its way"
        # In their order, whichever is full first: all ranks must send the same.
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        self._sent.append(distributed.all_reduce(self._buckets[len(self._sent)].filled(), async_op=True))


class Bucket:
    """The gradients of some parameters, one behind the other, and a flag for each: how many ranks have reached it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        size = sum(parameter.numel() for parameter in parameters)
        self.flat = parameters[0].new_zeros(size + len(parameters))
        self.places = gradient_views(self.flat, parameters)
        self._flags = self.flat[size:]
        self._unreached: list[int] = []  # numbers of those that this rank has not

    @torch.no_grad()
    def filled(self) -> Tensor:
        """What to add up: the gradients of this rank, which live in the bucket from now on."""
        grads = {number: p.grad for number, p in enumerate(self.parameters) if p.grad is not None}
        self._flags.fill_(1.0)
        if grads:
            torch._foreach_copy_([self.places[number] for number in grads], list(grads.values()))
        for number in grads:
            self.parameters[number].grad = self.places[number]
        self._unreached = [number for number in range(len(self.parameters)) if number not in grads]
        if self._unreached:
            torch._foreach_zero_([part[number] for number in self._unreached for part in (self.places, self._flags)])
        return self.flat

    def complete(self) -> None:
        """Take the gradients of other ranks where this one has none."""
        if self._unreached:  # else there is nothing to learn, and no device to wait for
            counts = self._flags.tolist()
            for number in self._unreached:
                if counts[number]:
                    self.parameters[number].grad = self.places[number]


def _cut(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """Parts of at most a bucket, but for a parameter that is larger."""
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(p.numel() for p in part) + parameter.numel() > BUCKET:
            yield part
            part = []
        part.append(parameter)
    yield part
