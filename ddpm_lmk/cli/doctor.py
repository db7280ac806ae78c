"""`ddpm-lmk doctor`: what this machine has, what a run would use, what is missing and what to do about it.

Each check yields findings; one of level `problem` makes the command end with exit code 5. Nothing is changed; one
temporary file is written to measure the disk and removed again.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from ddpm_lmk.config import RunConfig
from ddpm_lmk.launcher.placement import split_address
from ddpm_lmk.system.limits import absent
from ddpm_lmk.system.machine import FLOORS, advice, below_floor, granted_cores, nvidia_driver, version

# The package that stands for all of an extra.
EXTRAS = {
    "nvidia-dali-cuda130": "dali",
    "deepspeed": "deepspeed",
    "pydicom": "dicom",
    "s3fs": "cloud",
    "tensorboard": "trackers",
    "onnxscript": "onnx",
}
PROBE_MIB = 64
LOW_DISK_GIB = 5.0  # a few checkpoints of the paper's network, 79.5 M parameters
LOW_SHM_GIB = 1.0  # Docker's default is 64 MiB
LIMITS = (
    # Every loading process keeps its shards open.
    ("open files", resource.RLIMIT_NOFILE, 1024, "many shards need more; ulimit -n 4096"),
    ("processes", resource.RLIMIT_NPROC, 512, "threads count too; ulimit -u 4096"),
)
MEETING_S = 60  # to start the same command on all nodes by hand


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and what to do where something is amiss."""

    level: Literal["ok", "note", "problem"]
    topic: str
    seen: str
    advice: str = ""


def examine(folder: Path, *, cfg: RunConfig | None = None) -> list[Finding]:
    """All checks of this machine; `folder` is where runs would be written, `cfg` a run it should have room for."""
    checks = (
        *(check_versions(), check_extras(), check_processor(), check_gpus()),
        *(check_disk(folder, cfg), check_limits(), check_protections()),
    )
    return [finding for findings in checks for finding in findings]


def check_versions() -> Iterator[Finding]:
    """Python and the packages with a security floor."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    old = below_floor()
    for name in FLOORS:
        if name in old:
            yield Finding("problem", name, old[name], f"open to crafted files; {advice(name)}")
        elif installed := version(name):
            yield Finding("ok", name, installed)


def check_extras() -> Iterator[Finding]:
    """Optional packages, and what DeepSpeed needs to compile a part of itself."""
    for package, extra in EXTRAS.items():
        if installed := version(package):
            yield Finding("ok", f"extra {extra}", installed)
        else:
            how = f"only if you want it: pip install 'ddpm-lmk[{extra}]'"
            yield Finding("note", f"extra {extra}", "not installed", how)
    if version("deepspeed") is not None and shutil.which("g++") is None:
        yield Finding("note", "compiler", "no g++", "DeepSpeed compiles a part of itself: install g++")
    # A build that was killed leaves its lock behind, and PyTorch waits for it without a message.
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    how = "if no process is compiling, its build was killed: remove it, or ZeRO waits for ever"
    for lock in sorted(home.rglob("lock")):
        yield Finding("note", "compiled parts", f"locked by {lock}", how)


def check_processor() -> Iterator[Finding]:
    """Cores this process may use, the threads torch takes, and whether bf16 has instructions."""
    import torch

    from ddpm_lmk.engine.device_fit import missing_bf16

    cores, threads = granted_cores(), torch.get_num_threads()
    bf16 = f"no ({missing})" if (missing := missing_bf16()) else "yes"
    seen = f"{cores} cores, {threads} torch threads, {torch.backends.cpu.get_cpu_capability()}, bf16 {bf16}"
    how = f"more threads than cores slow training down; export OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("note" if how else "ok", "cpu", seen, how)


def check_gpus() -> Iterator[Finding]:
    """Visible CUDA devices, their driver, and whether this torch can use them."""
    import torch

    from ddpm_lmk.system import accelerator

    driver = nvidia_driver()
    if driver:
        yield Finding("ok", "driver", driver)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = f"none (torch for CUDA {torch.version.cuda})"
    if accelerator.is_available():
        names = {gpu: accelerator.name(gpu) or "" for gpu in accelerator.devices()}
        for gpu, name in names.items():
            major, minor = accelerator.capability(gpu)
            has_bf16 = accelerator.has_bf16()
            size = f"{accelerator.total_bytes(gpu) / 2**30:.0f} GiB, compute {major}.{minor}"
            how = "" if has_bf16 else "no instructions for bf16: train.precision=auto is fp32; time fp16 too"
            bf16 = "yes" if has_bf16 else "no"
            yield Finding("ok" if has_bf16 else "note", f"gpu {gpu.index}", f"{name}, {size}, bf16 {bf16}", how)
        if len(kinds := sorted(set(names.values()))) > 1:  # kernels differ between kinds, and with them the last bits
            how = "one run on both waits for the slower, and is at most of class ordered; choose with "
            how += "CUDA_VISIBLE_DEVICES"
            yield Finding("note", "gpus", f"of {len(kinds)} kinds: {', '.join(kinds)}", how)
    elif torch.version.cuda is None:
        how = "runs use the CPU; for a GPU install the CUDA build: pip install torch from PyPI without a CPU index"
        yield Finding("note", "gpu", "this torch is a CPU build", how)
    elif hidden is not None and hidden.strip() in ("", "-1"):  # both hide all devices
        yield Finding("note", "gpu", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset it to use them")
    elif driver:  # most often the driver is older than this torch
        how = f"the driver is there but torch cannot use it; wanted one for CUDA {torch.version.cuda} or newer"
        yield Finding("problem", "gpu", wanted, how)
    else:
        yield Finding("note", "gpu", wanted, "runs use the CPU; if there is a GPU, install its driver")


def check_disk(folder: Path, cfg: RunConfig | None) -> Iterator[Finding]:
    """Free space against the checkpoints of a run, and how fast a file is written and synced where runs would go."""
    # The folder may not be there yet; its disk is that of the nearest one that is.
    place = next((parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()), Path("/"))
    free_gib = shutil.disk_usage(place).free / 2**30
    try:
        mib_per_s = _write_speed(place)
    except OSError as error:
        yield Finding("problem", "disk", f"{place} cannot be written ({error.strerror})", "choose another --out folder")
        return
    seen = f"{place}: {free_gib:.1f} GiB free, {mib_per_s:.0f} MiB/s written and synced"
    needed_gib, need = LOW_DISK_GIB, "checkpoints need a few times the model"
    if cfg is not None:
        each_gib = checkpoint_gib(cfg)
        kept = cfg.runtime.keep_checkpoints * (1 + len(cfg.teachers))  # a teacher is a run, and keeps its own
        needed_gib = each_gib * (kept + 1.5)  # the one being written needs room for its copy too
        need = f"{kept} checkpoints and one being written"
        text = f"{each_gib:.2f} GiB each, {each_gib * 1024 / mib_per_s:.1f} s to write; {need}: {needed_gib:.2f} GiB"
        yield Finding("ok", f"checkpoints of {cfg.name}", text)
    if free_gib < needed_gib:
        yield Finding("problem", "disk", seen, f"make room: {need}, at least {needed_gib:.2g} GiB")
    else:
        yield Finding("ok", "disk", seen)


def checkpoint_gib(cfg: RunConfig) -> float:
    """One checkpoint: fp32 weights, average, moments, and the best weights where they are kept."""
    from ddpm_lmk.models import model_cost

    cost = model_cost(cfg.model, cfg.data.image_size, 1)
    copies = 1 + 2 * (cfg.optim.kind != "sgd") + (cfg.train.ema is not None) + (cfg.train.select == "best")
    networks = 1 if getattr(cfg.task, "refine", None) is None else 2
    return cost.weight_bytes * networks * copies / 2**30


def _write_speed(folder: Path) -> float:
    """MiB/s of writing and syncing one file."""
    block = os.urandom(2**20)  # zeros may be compressed
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ddpm-lmk-doctor-") as file:
        started = time.perf_counter()
        for _ in range(PROBE_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_MIB / (time.perf_counter() - started)


def check_limits() -> Iterator[Finding]:
    """What the system allows a process to have; `/dev/shm`, which containers make too small."""
    for topic, number, low, how in LIMITS:
        limit = resource.getrlimit(number)[0]
        is_low = 0 <= limit < low
        yield Finding("note" if is_low else "ok", topic, "unlimited" if limit < 0 else str(limit), how * is_low)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size_gib = shutil.disk_usage(shared).total / 2**30
        is_low = size_gib < LOW_SHM_GIB
        how = "several GPU processes need more; with Docker: --shm-size=8g or --ipc=host" * is_low
        yield Finding("note" if is_low else "ok", "/dev/shm", f"{size_gib:.1f} GiB", how)


def check_protections() -> Iterator[Finding]:
    """Protections against crafted files and orphaned processes that only Linux has."""
    missing = absent()
    for seen in missing:
        how = "as on every system but Linux; pack and import only files of people you trust"
        yield Finding("note", "protection", seen, how)
    if not missing:
        yield Finding("ok", "protections", "memory of decoders, ends with the parent, no network on import")


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
        how = "start the same command on every node; all must reach the first by that name, its port open and free"
        return Finding("problem", "rendezvous", f"{nodes} nodes did not meet at {rdzv} ({reason})", how)
    return Finding("ok", "rendezvous", f"{nodes} nodes met at {rdzv} in {met_s:.1f} s, {answer_ms:.1f} ms an answer")
