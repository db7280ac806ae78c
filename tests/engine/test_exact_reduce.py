"""The fixed tree: the same bits for any way to deal leaves out, and the sum they should have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_lmk.engine.exact_reduce import Node, Stack, blocks, fold


def leaves(count: int) -> list[Tensor]:
    """Numbers of very different size, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(257, generator=generator) * 10.0 ** (3 * (k % 5) - 6) for k in range(count)]


def dealt(count: int, *, world: int) -> Tensor:
    """The sum of `count` leaves dealt out to `world` ranks in equal parts, zeros after the last."""
    part = -(-count // world)
    nodes: list[Node] = []
    padded = [*leaves(count), *(torch.zeros(257) for _ in range(part * world - count))]
    for rank in range(world):
        stack = Stack(rank * part)
        for leaf in padded[rank * part : (rank + 1) * part]:
            stack.push(leaf.clone())
        assert [(node.level, node.index) for node in stack.nodes] == blocks(rank * part, part)
        nodes += stack.nodes
    return fold(nodes)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12, 13])
def test_the_sum_has_the_same_bits_for_any_number_of_ranks(count: int) -> None:
    wanted = dealt(count, world=1)
    for world in range(2, 9):
        assert torch.equal(dealt(count, world=world).view(torch.int32), wanted.view(torch.int32)), world
    exact = torch.stack(leaves(count)).double().sum(0)
    torch.testing.assert_close(wanted.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_plain_sum_from_left_to_right_would_have_other_bits() -> None:
    total = torch.zeros(257)
    for leaf in leaves(13):
        total += leaf
    assert not torch.equal(total, dealt(13, world=1))


def test_the_sign_of_zero_does_not_depend_on_padding() -> None:
    stack = Stack(0)
    stack.push(torch.tensor([-0.0]))
    assert torch.equal(fold(stack.nodes).view(torch.int32), torch.zeros(1, dtype=torch.int32))
