"""Gradients that both forms of the fused GroupNorm, CPU and Triton, finish in the same way."""

from __future__ import annotations

import torch
from torch import Tensor


def parameter_gradients(
    sums: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of weight, bias and film from those of z, what SiLU was given.

    Args:
        sums: per image and channel, the sum of dz over pixels [B, C].
        moments: the sum of dz times the normalised input [B, C].
    """
    if film is None:
        return moments.sum(0).to(weight.dtype), sums.sum(0).to(bias.dtype), None
    factor = 1 + film[:, : film.shape[1] // 2].to(sums.dtype)
    d_film = torch.cat((weight * moments + bias * sums, sums), dim=1).to(film.dtype)
    return (factor * moments).sum(0).to(weight.dtype), (factor * sums).sum(0).to(bias.dtype), d_film
