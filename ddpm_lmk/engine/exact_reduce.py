"""A sum of gradients whose bits do not depend on who computed which: always the same binary tree.

Floating-point addition is not associative, so a plain all-reduce gives other bits on another number of processes. Here
the leaves are numbered (leaf k is micro-batch k of the group, wherever it was computed), and node (level, index) is
the sum of its two children, nodes (level - 1, 2 * index) and (level - 1, 2 * index + 1). Leaves past the last are
zeros and are not computed: adding them changes nothing but the sign of a zero, which `fold` makes positive.

A rank owns consecutive leaves and adds what it can as they come (`Stack`), which leaves a few whole nodes, one where
the count is a power of two. Between ranks every element is folded by one rank (`fold_over_ranks`): all-to-all, fold,
all-gather. That sends 2 (W - 1) / W gradients per rank, like a ring, and takes any W; recursive doubling would send
log2(W) of them and take powers of two only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

# torch 2.13 has the same thing under a new name and warns of the old one.
all_gather: Callable[[Tensor, Tensor], Any] = getattr(
    distributed, "all_gather_single", distributed.all_gather_into_tensor
)


@dataclass
class Node:
    """The sum of leaves [index << level, (index + 1) << level), a flat tensor."""

    level: int
    index: int
    values: Tensor

    @property
    def parent(self) -> tuple[int, int]:
        """Level and index of the node this one is a half of."""
        return self.level + 1, self.index // 2


class Stack:
    """Adds leaves `first`, `first + 1`, ... as they come; keeps log2(count) + 1 partial sums at most."""

    def __init__(self, first: int) -> None:
        self._next = first
        self.nodes: list[Node] = []

    def push(self, leaf: Tensor) -> list[Tensor]:
        """Take in the next leaf, which now belongs to the stack; returns tensors that are free to be used again."""
        self.nodes.append(Node(0, self._next, leaf))
        self._next += 1
        free = []
        # Two halves of one node meet as early as they can, so that log2(count) + 1 tensors are alive and not `count`.
        while len(self.nodes) > 1 and self.nodes[-2].parent == self.nodes[-1].parent:
            right = self.nodes.pop()
            # The left tensor keeps the sum, the right one is used for a later leaf: no allocation in a step.
            free.append(right.values)
            self.nodes[-1] = Node(*right.parent, self.nodes[-1].values.add_(right.values))
        return free


def blocks(first: int, count: int) -> list[tuple[int, int]]:
    """Level and index of the nodes a `Stack` holds after leaves `first` to `first + count - 1`."""
    found, end = [], first + count
    while first < end:
        level = (end - first).bit_length() - 1
        if first:
            # A node begins at a multiple of its size, which is the lowest bit that is set in `first`.
            level = min(level, (first & -first).bit_length() - 1)
        found.append((level, first >> level))
        first += 1 << level
    return found


def fold(nodes: list[Node]) -> Tensor:
    """The sum of all leaves, from nodes in the order of their leaves; uses their tensors up."""
    level = 0
    while len(nodes) > 1:
        above: list[Node] = []
        for node in nodes:
            if node.level > level:
                above.append(node)
            elif above and (above[-1].level, above[-1].index) == node.parent:
                above[-1].values.add_(node.values)
            else:
                above.append(Node(*node.parent, node.values))
        nodes, level = above, level + 1
    # -0.0 + 0.0 is 0.0: whether zeros were added as padding leaves no trace in the sign.
    return nodes[0].values.add_(0.0)


def fold_over_ranks(nodes: list[Node], *, count: int, world: int) -> Tensor:
    """The sum of the leaves of all ranks, on every rank; rank r owns leaves [r * count, (r + 1) * count).

    Args:
        nodes: what this rank's `Stack` holds, flat tensors whose length is a multiple of `world`; they are used up.
    """
    if world == 1:
        return fold(nodes)
    # Each rank folds one part of the elements for all: the work of folding is shared out as well as the traffic.
    width = nodes[0].values.numel() // world
    owned = [blocks(rank * count, count) for rank in range(world)]
    sent = nodes[0].values
    if len(nodes) > 1:
        sent = torch.stack([node.values.view(world, width) for node in nodes], 1).flatten()
    received = sent.new_empty(sum(map(len, owned)) * width)
    distributed.all_to_all_single(
        received,
        sent,
        output_split_sizes=[len(part) * width for part in owned],
        input_split_sizes=[len(nodes) * width] * world,
    )
    # In the order of the leaves, since that is the order in which `fold` pairs them.
    places = [place for part in owned for place in part]
    mine = fold([Node(*place, values) for place, values in zip(places, received.split(width), strict=True)])
    total = nodes[0].values
    all_gather(total, mine)
    return total
