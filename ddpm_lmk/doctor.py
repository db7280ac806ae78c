"""Looks at this machine: what is there, what a run would use, what is missing and what to do about it.

Each check returns findings; a finding that says `problem` makes `ddpm-lmk doctor` end with exit code 5. Nothing is
changed; one temporary file is written to measure the disk and removed again.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "note", "problem"]

# Security floor: below these a crafted file runs code or reads out of bounds (torch: CVE-2026-24747).
FLOORS = {"torch": (2, 10), "pydicom": (3, 0, 2)}
EXTRAS = {
    "nvidia-dali-cuda130": "dali",
    "deepspeed": "deepspeed",
    "pydicom": "dicom",
    "tensorboard": "trackers",
    "onnxscript": "onnx",
}
PROBE_BYTES = 64 * 2**20
LOW_DISK_GIB = 5.0
LOW_SHM_GIB = 1.0
LOW_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, what was seen, and what to do where something is amiss."""

    level: Level
    topic: str
    seen: str
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """All checks; `folder` is where runs would be written."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        check_software,
        check_extras,
        check_processor,
        check_gpus,
        check_group_norm,
        lambda: check_disk(folder),
        check_limits,
    )
    return [finding for check in checks for finding in check()]


def check_software() -> list[Finding]:
    """Python and the packages with a security floor."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    for name, floor in FLOORS.items():
        version = _version(name)
        wanted = ".".join(map(str, floor))
        if version is None:
            continue
        if release(version) < floor:
            advice = f"older than {wanted} and open to crafted files; pip install -c constraints.txt '{name}>={wanted}'"
            findings.append(Finding("problem", name, version, advice))
        else:
            findings.append(Finding("ok", name, version))
    return findings


def check_extras() -> list[Finding]:
    """Optional parts of the project that are installed or not."""
    findings = []
    for package, extra in EXTRAS.items():
        version = _version(package)
        advice = "" if version else f"only if you want it: pip install -c constraints.txt -e '.[{extra}]'"
        findings.append(Finding("ok" if version else "note", f"extra {extra}", version or "not installed", advice))
    return findings


def check_processor() -> list[Finding]:
    """Cores this process may use, and the threads torch takes."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bf16 = "yes" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
    capability = torch.backends.cpu.get_cpu_capability()
    seen = f"{cores} cores, {torch.get_num_threads()} torch threads, {capability}, bf16 {bf16}"
    if torch.get_num_threads() > cores:
        return [
            Finding("note", "cpu", seen, f"more threads than cores slow training down; export OMP_NUM_THREADS={cores}")
        ]
    return [Finding("ok", "cpu", seen)]


def check_gpus() -> list[Finding]:
    """Visible CUDA devices, and whether this torch can use them."""
    import torch

    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None:
        advice = "runs use the CPU; for a GPU install the CUDA build: pip install torch from PyPI without a CPU index"
        return [Finding("note", "gpu", "this torch is a CPU build", advice)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return [Finding("note", "gpu", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset it to use the GPUs")]
    advice = "runs use the CPU; if there is a GPU, check `nvidia-smi` and that the driver is new enough"
    return [Finding("note", "gpu", f"none (torch for CUDA {torch.version.cuda})", advice)]


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


def check_disk(folder: Path) -> list[Finding]:
    """Free space, and how fast a file is written and synced where runs would go."""
    place = next((parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()), Path("/"))
    free_gib = shutil.disk_usage(place).free / 2**30
    try:
        speed = _write_speed(place)
    except OSError as error:
        return [
            Finding(
                "problem", "disk", f"{place} cannot be written ({error.strerror})", "choose another folder with --out"
            )
        ]
    seen = f"{place}: {free_gib:.1f} GiB free, {speed:.0f} MiB/s written and synced"
    if free_gib < LOW_DISK_GIB:
        return [
            Finding(
                "problem",
                "disk",
                seen,
                f"make room: checkpoints need a few times the model, at least {LOW_DISK_GIB:g} GiB",
            )
        ]
    return [Finding("ok", "disk", seen)]


def check_limits() -> list[Finding]:
    """Shared memory and open files, the two limits that containers set too low."""
    findings = []
    shared = Path("/dev/shm")
    if shared.is_dir():
        size_gib = shutil.disk_usage(shared).total / 2**30
        low = size_gib < LOW_SHM_GIB
        advice = "several GPU processes need more; with Docker: --shm-size=8g or --ipc=host" if low else ""
        findings.append(Finding("note" if low else "ok", "/dev/shm", f"{size_gib:.1f} GiB", advice))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = 0 <= files < LOW_FILES
    advice = f"packing and loading many shards needs more; ulimit -n {4 * LOW_FILES}" if low else ""
    findings.append(Finding("note" if low else "ok", "open files", "unlimited" if files < 0 else str(files), advice))
    return findings


def release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _gpu(index: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    size_gib = facts.total_memory / 2**30
    seen = f"{facts.name}, {size_gib:.0f} GiB, compute {facts.major}.{facts.minor}, bf16 {'yes' if bf16 else 'no'}"
    advice = "" if bf16 else "no native bf16: set train.precision=fp32"
    return Finding("ok" if bf16 else "note", f"gpu {index}", seen, advice)


def _write_speed(folder: Path) -> float:
    """MiB/s of writing and syncing one file of 64 MiB."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ddpm-lmk-doctor-") as file:
        started = time.perf_counter()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / 2**20 / (time.perf_counter() - started)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
