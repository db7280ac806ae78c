"""The machine: what this process may use of its cores and memory, what it is, and versions of packages.

A machine's cores are not this process's: `taskset` and cpusets grant some (affinity), a container a share of time
(control group), a scheduler a number that nothing may enforce. The smallest counts. So does memory: that of the control
group, version 2 or 1, where it is less than the machine's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from ddpm_lmk.errors import LaunchError

THREADS = "OMP_NUM_THREADS"  # environment variable: threads of a process, as torch reads it
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_KEPT = 32 * 2**20  # bytes; glibc comes to as much by itself, and maps what is larger
GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# A scheduler's grant counts where the scheduler says that this process is in its job, or its step.
GRANTS = (
    ("SLURM_JOB_ID", "SLURM_CPUS_ON_NODE"),
    ("SLURM_STEP_ID", "SLURM_CPUS_PER_TASK"),
    ("SGE_ROOT", "NSLOTS"),
    ("PBS_JOBID", "NCPUS"),
)
# Below these a crafted file is known to do harm; there is no option to go below them. torch: CVE-2026-24747 (code runs
# in spite of weights_only). Pillow: CVE-2025-48379 (writes beyond a buffer). pydicom: the last release, since it reads
# what strangers send.
FLOORS = {"torch": (2, 10), "pydicom": (3, 0, 2), "pillow": (11, 3)}


def granted_cores() -> int:
    """Cores this process may use, at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    scheduled = [_positive(os.environ.get(count, "")) for job, count in GRANTS if job in os.environ]
    return max(1, min([affinity, *_quotas(), *(count for count in scheduled if count is not None)]))


def threads_per_process(processes: int = 1) -> int:
    """Threads for each of `processes` on this machine: those asked for by OMP_NUM_THREADS, else a share of the cores.

    A wish for more threads than there are cores was made for another machine, and does not count.
    """
    cores, wish = granted_cores(), wished_threads()
    return wish if wish is not None and wish <= cores else max(1, cores // processes)


def wished_threads() -> int | None:
    """What OMP_NUM_THREADS says, where it is a number (of a list for nested loops, the first)."""
    return _positive(os.environ.get(THREADS, "").partition(",")[0].strip())


def _positive(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process, to be used again; False where this C library has no such setting.

    A training step frees all it allocated. glibc returns the end of its heap to the system each time and faults it in
    again page by page: about 4 % of a small network's step. What a process holds at its highest hardly changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Give the system back what this process has freed and kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def total_bytes() -> int:
    """Memory that the processes of this machine, or container, may use together."""
    import psutil  # type: ignore[import-untyped]

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def available_bytes() -> int:
    """What of it is still free."""
    import psutil

    left = [max(0, limit - used) for limit, used in _memory_limits()]
    return min([int(psutil.virtual_memory().available), *left])


def count_oom_kills() -> int | None:
    """How often the kernel killed a process of this container for want of memory; None where it does not say."""
    for folder in _groups("memory"):
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            with suppress(OSError, ValueError):
                facts = dict(line.split() for line in (folder / name).read_text().splitlines())
                if "oom_kill" in facts:
                    return int(facts["oom_kill"])
    return None


def _groups(controller: str) -> Iterator[Path]:
    """Where `controller` may keep its files: this process's own group first, then every group around it."""
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):  # version 2 has one tree for all controllers
                place = PurePosixPath(own.lstrip("/"))
                root = GROUPS / controller if controllers else GROUPS
                yield from (root / part for part in (place, *place.parents) if str(part) != ".")
    # A container shows its own group as the root, whatever its members are told of their place.
    yield GROUPS
    yield GROUPS / controller


def _number(path: Path) -> int | None:
    """The one number in a file; None where there is none: no such file, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _quotas() -> list[int]:
    """Whole cores that a control group's share of processor time is worth."""
    cores = []
    for folder in _groups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text().split())  # version 2; "max" is no number
            cores.append(quota // period)
        quota_us = _number(folder / "cpu.cfs_quota_us")  # version 1; -1 where there is no limit
        period_us = _number(folder / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            cores.append(quota_us // period_us)
    return cores


def _memory_limits() -> list[tuple[int, int]]:
    """Limit and use of every control group around this process that has both."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    pairs = [(_number(folder / limit), _number(folder / use)) for folder in _groups("memory") for limit, use in names]
    return [(limit, used) for limit, used in pairs if limit is not None and used is not None]


def cpu_name() -> str:
    """The processor as the kernel names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError):
            if name := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
                return name
    return platform.processor() or platform.machine()


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver; None where none is loaded, or the system does not say."""
    try:
        return NVIDIA_DRIVER.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, load and niceness, for a result file: a measurement on a busy machine must be seen as one."""
    return {
        "cpu": cpu_name(),
        "cores": granted_cores(),
        "load_1_min": round(os.getloadavg()[0], 1),
        "niceness": os.nice(0),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of `packages`; None where one is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def version(package: str) -> str | None:
    """Installed version of a package; of a torch that is loaded with its build, which an index's name leaves out."""
    if package == "torch" and "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_digest() -> str:
    """16 hex digits over the source files of this package, as they are on this machine."""
    total, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def require_safe_versions() -> None:
    """Refuse to work with packages that are too old; raises `LaunchError`."""
    for name, installed in below_floor().items():
        raise LaunchError(f"{name} {installed} is open to crafted files; {advice(name)}")


def below_floor() -> dict[str, str]:
    """Installed packages that are too old, with their version."""
    installed = {name: version(name) for name in FLOORS}
    return {name: text for name, text in installed.items() if text is not None and release(text) < FLOORS[name]}


def advice(name: str) -> str:
    """What to do about a package that is too old."""
    wanted = ".".join(map(str, FLOORS[name]))
    return f"wanted {wanted} or newer: pip install '{name}>={wanted}'"


def release(text: str) -> tuple[int, ...]:
    """Numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    from packaging.version import Version

    return Version(text).release
