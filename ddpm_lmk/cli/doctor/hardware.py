"""Processors: cores, GPUs and their driver, what processes talk with, and one layout that costs time."""

from __future__ import annotations

import os

from ddpm_lmk.cli.doctor.finding import Finding
from ddpm_lmk.system.cores import granted_cores, nvidia_driver


def check_processor() -> list[Finding]:
    """Cores this process may use, and the threads torch takes."""
    import torch

    from ddpm_lmk.engine.precision import missing_bf16

    cores = granted_cores()
    missing = missing_bf16()
    bf16 = f"no ({missing})" if missing else "yes"
    capability = torch.backends.cpu.get_cpu_capability()
    seen = f"{cores} cores, {torch.get_num_threads()} torch threads, {capability}, bf16 {bf16}"
    if torch.get_num_threads() > cores:
        return [
            Finding("note", "cpu", seen, f"more threads than cores slow training down; export OMP_NUM_THREADS={cores}")
        ]
    return [Finding("ok", "cpu", seen)]


def check_gpus() -> list[Finding]:
    """Visible CUDA devices, their driver, and whether this torch can use them."""
    import torch

    findings = [Finding("ok", "driver", found)] if (found := nvidia_driver()) else []
    if torch.cuda.is_available():
        return [*findings, *(_gpu(index) for index in range(torch.cuda.device_count())), *_kinds()]
    if torch.version.cuda is None:
        advice = "runs use the CPU; for a GPU install the CUDA build: pip install torch from PyPI without a CPU index"
        return [*findings, Finding("note", "gpu", "this torch is a CPU build", advice)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return [*findings, Finding("note", "gpu", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset it to use them")]
    wanted = f"none (torch for CUDA {torch.version.cuda})"
    if findings:
        advice = f"the driver is there but torch cannot use it; wanted one for CUDA {torch.version.cuda} or newer"
        return [*findings, Finding("problem", "gpu", wanted, advice)]
    return [Finding("note", "gpu", wanted, "runs use the CPU; if there is a GPU, install its driver")]


def check_collectives() -> list[Finding]:
    """What processes can talk to one another with."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        return [Finding("problem", "gloo", "not in this torch", "several processes need it; install torch from PyPI")]
    findings = [Finding("ok", "gloo", "available")]
    if not torch.cuda.is_available():
        return findings
    if not distributed.is_nccl_available():
        advice = "several GPUs need it; install the CUDA build of torch"
        return [*findings, Finding("problem", "nccl", "not in this torch", advice)]
    return [*findings, Finding("ok", "nccl", ".".join(map(str, torch.cuda.nccl.version())))]


def check_group_norm() -> list[Finding]:
    """Does GroupNorm keep the channels-last layout? Where it does not, every block pays two copies."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 8, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.nn.GroupNorm(4, 8, device=device)(x)
    if y.is_contiguous(memory_format=torch.channels_last):
        return [Finding("ok", "group norm", f"keeps channels-last on {device}")]
    return [
        Finding("note", "group norm", f"loses channels-last on {device}", "try train.channels_last=false and time both")
    ]


def _gpu(index: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    size_gib = facts.total_memory / 2**30
    seen = f"{facts.name}, {size_gib:.0f} GiB, compute {facts.major}.{facts.minor}, bf16 {'yes' if bf16 else 'no'}"
    advice = "" if bf16 else "no instructions for bf16: train.precision=auto is fp32; time fp16 too"
    return Finding("ok" if bf16 else "note", f"gpu {index}", seen, advice)


def _kinds() -> list[Finding]:
    import torch

    kinds = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if len(kinds) < 2:
        return []
    advice = "one run on both waits for the slower, and is at most of class ordered; choose with CUDA_VISIBLE_DEVICES"
    return [Finding("note", "gpus", f"of {len(kinds)} kinds: {', '.join(sorted(kinds))}", advice)]
