"""Linear attention image by image: the same numbers and gradients as over the batch, and nothing large kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_lmk.models.blocks import LinearAttention
from ddpm_lmk.models.kernels import linear_attention_cpu
from ddpm_lmk.models.kernels.linear_attention_cpu import Pool, Spread, is_faster


def normal(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


def test_gradients_of_both_halves_are_those_of_differences() -> None:
    pixels = normal(2, 5, 3)
    assert torch.autograd.gradcheck(Pool.apply, (pixels, normal(4, 3, seed=1)))
    inputs = (pixels, normal(4, 3, seed=1), normal(2, 4, 3, seed=2), normal(3, seed=3))
    assert torch.autograd.gradcheck(lambda *values: Spread.apply(*values, 2), inputs)


def test_image_by_image_is_the_attention_over_the_batch_and_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = LinearAttention(6, heads=2, head_dim=8).double()
    found, kept = [], []
    for large_bytes in (0, 2**40):
        monkeypatch.setattr(linear_attention_cpu, "LARGE_BYTES", large_bytes)
        sizes: dict[int, int] = {}
        x = normal(3, 6, 8, 8, seed=1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, to=sizes: to.setdefault(value.untyped_storage().data_ptr(), value.numel()) and value,
            lambda value: value,
        ):
            out = module(x.contiguous(memory_format=torch.channels_last))
        grads = torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])
        found.append([out, *grads])
        kept.append(sum(sizes.values()))
    for by_image, over_batch in zip(*found, strict=True):
        assert (by_image - over_batch).norm() <= 1e-12 * (1 + over_batch.norm())
    assert kept[0] < 0.6 * kept[1]


def test_it_is_for_large_maps_of_wide_types_on_a_processor() -> None:
    large = torch.empty(4, 4096, 32)
    assert is_faster(large, 128)
    assert not is_faster(large[:1], 128)
    assert not is_faster(large.bfloat16(), 128)
    assert not is_faster(large.to("meta"), 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_faster(large, 128)
