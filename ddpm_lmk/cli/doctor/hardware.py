"""Processors: cores, GPUs and their driver, what processes talk with, and one layout that costs time.

One line of the doctor.

Packages: the ones with a security floor, and the optional ones.

Where runs happen: room and speed of the disk, shared memory, limits of the system, and the way to other nodes.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from ddpm_lmk.config import RunConfig
from ddpm_lmk.launcher.placement import split_address
from ddpm_lmk.system.limits import absent
from ddpm_lmk.system.machine import FLOORS, advice, below_floor, granted_cores, nvidia_driver, version

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and what to do where something is amiss."""

    level: Level
    topic: str
    seen: str
    advice: str = ""


def check_processor() -> list[Finding]:
    """Cores this process may use, and the threads torch takes."""
    import torch

    from ddpm_lmk.engine.device_fit import missing_bf16

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


EXTRAS = {
    "nvidia-dali-cuda130": "dali",
    "deepspeed": "deepspeed",
    "pydicom": "dicom",
    "s3fs": "cloud",
    "tensorboard": "trackers",
    "onnxscript": "onnx",
}


def check_versions() -> list[Finding]:
    """Python and the packages with a security floor."""
    findings = [Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    old = below_floor()
    for name in FLOORS:
        found = version(name)
        if name in old:
            findings.append(Finding("problem", name, old[name], f"open to crafted files; {advice(name)}"))
        elif found is not None:
            findings.append(Finding("ok", name, found))
    return findings


def check_extras() -> list[Finding]:
    """Optional parts of the project that are installed or not."""
    findings = []
    for package, extra in EXTRAS.items():
        found = version(package)
        what_to_do = "" if found else f"only if you want it: pip install 'ddpm-lmk[{extra}]'"
        findings.append(Finding("ok" if found else "note", f"extra {extra}", found or "not installed", what_to_do))
    if version("deepspeed") is not None and shutil.which("g++") is None:
        findings.append(Finding("note", "compiler", "no g++", "DeepSpeed compiles a part of itself: install g++"))
    return findings


def check_builds() -> list[Finding]:
    """Locks of builds; one that was killed leaves its own behind, and PyTorch waits on it without a word."""
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    advice = "if no process is compiling, its build was killed: remove it, or ZeRO waits for ever"
    return [Finding("note", "compiled parts", f"locked by {lock}", advice) for lock in sorted(home.rglob("lock"))]


PROBE_BYTES = 64 * 2**20
LOW_DISK_GIB = 5.0
LOW_SHM_GIB = 1.0
LOW_FILES = 1024
LOW_PROCESSES = 512
MEETING_S = 60


def check_disk(folder: Path, cfg: RunConfig | None) -> list[Finding]:
    """Free space against the checkpoints of a run, and how fast a file is written and synced where runs would go."""
    place = next((parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()), Path("/"))
    free_gib = shutil.disk_usage(place).free / 2**30
    try:
        speed = _write_speed(place)
    except OSError as error:
        seen = f"{place} cannot be written ({error.strerror})"
        return [Finding("problem", "disk", seen, "choose another folder with --out")]
    seen = f"{place}: {free_gib:.1f} GiB free, {speed:.0f} MiB/s written and synced"
    needed_gib = LOW_DISK_GIB if cfg is None else room_gib(cfg)
    if free_gib < needed_gib:
        kept = "checkpoints need a few times the model" if cfg is None else f"{cfg.name} keeps {kept_of(cfg)}"
        return [Finding("problem", "disk", seen, f"make room: {kept}, at least {needed_gib:.2g} GiB")]
    findings = [Finding("ok", "disk", seen)]
    if cfg is not None:
        took_s = checkpoint_gib(cfg) * 1024 / speed
        text = f"{checkpoint_gib(cfg):.2f} GiB each, {took_s:.1f} s to write; {kept_of(cfg)}: {needed_gib:.2f} GiB"
        findings.append(Finding("ok", f"checkpoints of {cfg.name}", text))
    return findings


def checkpoint_gib(cfg: RunConfig) -> float:
    """One checkpoint: fp32 weights, average, the moments of AdamW, and the best weights where they are kept."""
    from ddpm_lmk.models import model_cost

    cost = model_cost(cfg.model, cfg.data.image_size, 1)
    copies = 1 + 2 * (cfg.optim.kind == "adamw") + (cfg.train.ema is not None) + (cfg.train.select == "best")
    return cost.weight_bytes * copies / 2**30


def room_gib(cfg: RunConfig) -> float:
    """What a run takes at most on the way: the checkpoints it keeps, and 1.5 more for the one being written."""
    return checkpoint_gib(cfg) * (cfg.train.keep_checkpoints + 1.5)


def kept_of(cfg: RunConfig) -> str:
    """How many checkpoints a run keeps, in words."""
    return f"{cfg.train.keep_checkpoints} checkpoints and one being written"


def check_shared_memory() -> list[Finding]:
    """`/dev/shm`, which containers make too small."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return []
    size_gib = shutil.disk_usage(shared).total / 2**30
    low = size_gib < LOW_SHM_GIB
    advice = "several GPU processes need more; with Docker: --shm-size=8g or --ipc=host" if low else ""
    return [Finding("note" if low else "ok", "/dev/shm", f"{size_gib:.1f} GiB", advice)]


def check_limits() -> list[Finding]:
    """What the system allows a process to have."""
    return [
        _limit("open files", resource.RLIMIT_NOFILE, LOW_FILES, f"many shards need more; ulimit -n {4 * LOW_FILES}"),
        _limit("processes", resource.RLIMIT_NPROC, LOW_PROCESSES, f"threads count too; ulimit -u {8 * LOW_PROCESSES}"),
    ]


def check_protections() -> list[Finding]:
    """What keeps foreign files and orphans at bay, as far as this system has it."""
    advice = "as on every system but Linux; pack and import only files of people you trust"
    missing = [Finding("note", "protection", seen, advice) for seen in absent()]
    return missing or [Finding("ok", "protections", "memory of decoders, ends with the parent, no network on import")]


def check_rendezvous(rdzv: str, *, nodes: int, node_rank: int, timeout_s: int = MEETING_S) -> Finding:
    """Meet the other nodes at `--rdzv`; run the same command on all of them at once.

    Raises:
        ConfigError: not an address.
    """
    from torch.distributed import DistError, TCPStore

    host, port = split_address(rdzv)
    began = time.monotonic()
    try:
        patience = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, world_size=nodes, is_master=node_rank == 0, timeout=patience)
        store.set(f"node-{node_rank}", "here")
        store.wait([f"node-{rank}" for rank in range(nodes)], patience)
        met_s = time.monotonic() - began
        began = time.monotonic()
        store.get(f"node-{node_rank}")
        answer_ms = (time.monotonic() - began) * 1e3
        store.add("left", 1)
        while node_rank == 0 and store.add("left", 0) < nodes and time.monotonic() - began < timeout_s:
            time.sleep(0.05)  # the store ends with this process
    except (DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        advice = "start the same command on every node; all must reach the first by that name, its port open and free"
        return Finding("problem", "rendezvous", f"{nodes} nodes did not meet at {rdzv} ({reason})", advice)
    return Finding("ok", "rendezvous", f"{nodes} nodes met at {rdzv} in {met_s:.1f} s, {answer_ms:.1f} ms an answer")


def _limit(topic: str, number: int, low: int, advice: str) -> Finding:
    found = resource.getrlimit(number)[0]
    is_low = 0 <= found < low
    return Finding("note" if is_low else "ok", topic, "unlimited" if found < 0 else str(found), advice * is_low)


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
