"""What `train.precision=auto` becomes, and what is said of a precision that this machine only emulates.

On CUDA bf16, where the device multiplies in it. On a CPU bf16 too, where this process may use instructions for it and
the network is large enough for them to make up for the conversions (benchmarks/README.md), and fp32 everywhere else. It
is decided by what is there and not by timing, so that a run does not depend on how busy the machine was when it began,
and once: `run.json` keeps it. Only the warning about a precision that was asked for is measured. Scoring and prediction
on a CPU stay in fp32.

Without instructions PyTorch computes bf16 and fp16 on a CPU in plain loops: steps took 10 to 14 times as long as in
fp32 on processors with AVX2. Two environment variables keep a process from instructions that its processor has:
ONEDNN_MAX_CPU_ISA (before it DNNL_MAX_CPU_ISA) those of convolutions and products, ATEN_CPU_CAPABILITY all others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import nn

from ddpm_lmk.config import RunConfig, UNetConfig
from ddpm_lmk.models import model_cost

Name = Literal["fp32", "bf16", "fp16"]

LEAST_FLOPS = 2e8  # of a forward pass of one image
# Of oneDNN's names of instruction sets (dnnl_cpu_isa_t) those without products in bf16. Others, and words that it does
# not know and so ignores, leave it what the processor has.
ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
ATEN_WITHOUT_BF16 = {"default", "avx2"}
WORTH_SAYING = 1.5  # times as long as fp32


@dataclass(frozen=True)
class ChosenPrecision:
    """The type of a run's products, and why."""

    name: Name
    reason: str


def choose_precision(cfg: RunConfig, device: str) -> ChosenPrecision:
    """The precision of a run on this kind of device."""
    wanted = cfg.train.precision
    if wanted != "auto":
        return ChosenPrecision(wanted, "as asked for")
    if device == "cuda":
        if cuda_has_bf16():
            return ChosenPrecision("bf16", "on CUDA")
        return ChosenPrecision("fp32", "this GPU has no instructions for bf16; train.precision=fp16 may be faster")
    if missing := missing_bf16():
        return ChosenPrecision("fp32", missing)
    if not isinstance(cfg.model, UNetConfig):
        return ChosenPrecision("fp32", f"model.kind={cfg.model.kind} was not measured in bf16 on a CPU")
    if cfg.train.exactness == "exact":
        return ChosenPrecision("fp32", "class exact is to be the same on CPUs without bf16")
    if model_cost(cfg.model, cfg.data.image_size, 1).flops_executed < LEAST_FLOPS:
        return ChosenPrecision("fp32", "so small a network loses more by converting than it gains")
    return ChosenPrecision("bf16", "this processor has instructions for it")


def missing_bf16(environment: Mapping[str, str] = os.environ) -> str:
    """Why this process cannot multiply bf16 numbers by instructions (AVX512_BF16 or AMX); empty where it can."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "this processor has no instructions for bf16"
    name = next((name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if environment.get(name)), "")
    if environment.get(name, "").upper() in ISA_WITHOUT_BF16:
        return f"{name}={environment[name]} keeps this processor from its instructions for bf16"
    if (held := environment.get("ATEN_CPU_CAPABILITY", "")) in ATEN_WITHOUT_BF16:
        return f"ATEN_CPU_CAPABILITY={held} keeps this processor from its instructions for bf16"
    return ""


def cuda_has_bf16() -> bool:
    """Does the GPU multiply bf16 numbers itself? Where there is none to ask, what is planned is for one that does."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def is_emulated(name: str, device: str) -> bool:
    """Does this device compute in this precision without instructions for it, as far as it is known to us?"""
    return device == "cpu" and (name == "fp16" or (name == "bf16" and bool(missing_bf16())))


def emulation_warning(cfg: RunConfig, name: str, device: str) -> str | None:
    """What to tell, before the first step, whoever trains in `name` on a CPU that only emulates it; else None.

    Args:
        name: what the run trains in; not what `auto` is here where the run began on another machine.
    """
    if not is_emulated(name, device):
        return None
    if (factor := times_fp32(name)) < WORTH_SAYING:
        return None
    found = f"{name} is emulated here: a convolution takes {factor:.0f} times as long as in fp32, measured just now"
    if cfg.train.precision == "auto":
        return f"this run began in {name} on another machine and keeps it; {found}; a new --out chooses again"
    why = missing_bf16() if name == "bf16" else "fp16 is meant for GPUs"
    return f"train.precision={found} ({why}); train.precision=auto takes what is fast"


@cache
def times_fp32(name: str) -> float:
    """How many times as long as in fp32 a small convolution takes, forward and backward; a tenth of a second or two."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    layer = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 32, 32, 32).to(memory_format=torch.channels_last)

    def step(*, is_half: bool) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=is_half):
            y = layer(x)
        torch.autograd.grad(y.float().sum(), layer.weight)

    return _shortest(lambda: step(is_half=True)) / _shortest(lambda: step(is_half=False))


def _shortest(call: Callable[[], None], times: int = 4) -> float:
    """Seconds of the fastest of a few calls: what others on the machine take away only ever adds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
