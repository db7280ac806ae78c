"""Shapes that the fused norm has to get right, and how far it is from float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.models.kernels.group_norm import group_norm


@dataclass(frozen=True)
class Case:
    """One input: its shape [B, C, H, W], and what makes it hard."""

    shape: tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    film: bool = True
    silu: bool = True
    mean: float = 0.0  # of the input, whose deviation is 1

    def limit(self, use: str) -> float:
        """Largest relative distance; a mean takes digits away from the input itself.

        PyTorch's statistics on the CPU are means of squares less squared means, which a mean takes twice as many from.
        """
        rounding = 2e-6 if self.dtype == torch.float32 else 1.2e-2
        return max(rounding * max(1.0, abs(self.mean) / 2), 3e-6 * self.mean**2 if use == "folded" else 0.0)

    def __str__(self) -> str:
        words = [*map(str, self.shape), f"groups {self.groups}", str(self.dtype).removeprefix("torch.")]
        return " ".join([*words, *(["mean"] if self.mean else [])])


CASES = [
    Case((1, 8, 3, 5), groups=1),
    Case((2, 12, 7, 9), groups=4),
    Case((2, 24, 33, 31), groups=8, film=False),
    Case((2, 16, 8, 8), groups=1, film=False, silu=False),
    Case((1, 300, 9, 13), groups=4),  # more channels than a program holds, and not a power of two
    Case((2, 8, 70, 61), groups=4, mean=300.0),  # several chunks; the variance is 1e-5 of the squared mean
    Case((2, 16, 17, 19), groups=8, dtype=torch.bfloat16),
    Case((1, 32, 40, 40), groups=4, dtype=torch.bfloat16, film=False),
    Case((2, 8, 20, 20), groups=4, dtype=torch.bfloat16, mean=8.0),
]


def run(case: Case, use: str, *, dtype: torch.dtype, images: int | None = None) -> list[Tensor]:
    """Result, and gradients of input, weight, bias and film."""
    draw = torch.Generator().manual_seed(1)
    batch, channels = case.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x = (normal(*case.shape) + case.mean).to(case.dtype).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(channels).to(torch.float32), normal(channels).to(torch.float32)
    film = (0.3 * normal(batch, 2 * channels)).to(torch.float32)
    towards = normal(*case.shape).to(case.dtype).to(dtype).contiguous(memory_format=torch.channels_last)
    if dtype == torch.float64:
        weight, bias, film = weight.double(), bias.double(), film.double()
    inputs = [value.requires_grad_() for value in (x[:images], weight, bias, film[:images])]
    out = _compute(case, use, *inputs)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, inputs, towards[:images], allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)]


def _compute(case: Case, use: str, x: Tensor, weight: Tensor, bias: Tensor, film: Tensor) -> Tensor:
    if use != "plain":
        modulation = film if case.film else None
        return group_norm(x, weight, bias, groups=case.groups, eps=1e-5, film=modulation, silu=case.silu, use=use)
    z = F.group_norm(x, case.groups, weight, bias, 1e-5)
    if case.film:
        scale, shift = film[:, :, None, None].chunk(2, dim=1)
        z = z * (1 + scale) + shift
    return F.silu(z) if case.silu else z


def distances(case: Case, use: str) -> dict[str, float]:
    """Relative distance from float64 of the result and of each gradient."""
    exact = [value.detach() for value in run(case, "plain", dtype=torch.float64)]
    found = [value.detach() for value in run(case, use, dtype=case.dtype)]
    names = ["result", "input", "weight", "bias", *(["film"] if case.film else [])]
    assert len(names) == len(exact) == len(found)
    return {
        name: float((value.double() - wanted).norm() / wanted.norm())
        for name, value, wanted in zip(names, found, exact, strict=True)
    }


def check(case: Case, use: str) -> None:
    """Raise unless every distance is within the limit of the case."""
    for name, distance in distances(case, use).items():
        limit = case.limit(use)
        assert distance < limit, f"{case}: {name} is {distance:.1e} from float64, limit {limit:.1e}"
