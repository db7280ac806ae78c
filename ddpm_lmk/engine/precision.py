"""What `train.precision=auto` becomes.

On CUDA bf16. On a CPU bf16 too, where it has instructions for it and the network is large enough for them to make up
for the conversions (benchmarks/README.md), and fp32 everywhere else. It is decided by what is there and not by timing,
so that a run does not depend on how busy the machine was when it began, and once: `run.json` keeps it. Scoring and
prediction on a CPU stay in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ddpm_lmk.config import RunConfig, UNetConfig
from ddpm_lmk.models import model_cost

LEAST_FLOPS = 2e8  # of a forward pass of one image


@dataclass(frozen=True)
class ChosenPrecision:
    """The type of a run's products, and why."""

    name: Literal["fp32", "bf16", "fp16"]
    reason: str


def choose_precision(cfg: RunConfig, device: str) -> ChosenPrecision:
    """The precision of a run on this kind of device."""
    wanted = cfg.train.precision
    if wanted != "auto":
        return ChosenPrecision(wanted, "as asked for")
    if device == "cuda":
        return ChosenPrecision("bf16", "on CUDA")
    if not has_bf16_instructions():
        return ChosenPrecision("fp32", "this processor has no instructions for bf16")
    if not isinstance(cfg.model, UNetConfig):
        return ChosenPrecision("fp32", f"model.kind={cfg.model.kind} was not measured in bf16 on a CPU")
    if cfg.train.exactness == "exact":
        return ChosenPrecision("fp32", "class exact is to be the same on CPUs without bf16")
    if model_cost(cfg.model, cfg.data.image_size, 1).flops_executed < LEAST_FLOPS:
        return ChosenPrecision("fp32", "so small a network loses more by converting than it gains")
    return ChosenPrecision("bf16", "this processor has instructions for it")


def has_bf16_instructions() -> bool:
    """Does this processor multiply bf16 numbers itself (AVX512_BF16 or AMX)?"""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
