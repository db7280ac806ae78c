"""The processor: its name, the cores that this process was granted, and threads for the processes that share them.

A machine's cores are not this process's: `taskset` and cpusets grant some (affinity), a container a share of time
(control group), a scheduler a number that nothing may enforce. The smallest counts.
"""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

from ddpm_lmk.system import memory

THREADS = "OMP_NUM_THREADS"  # environment: threads of a process, as torch reads it
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# A scheduler's grant counts where the scheduler says that this process is in its job, or its step.
GRANTS = (
    ("SLURM_JOB_ID", "SLURM_CPUS_ON_NODE"),
    ("SLURM_STEP_ID", "SLURM_CPUS_PER_TASK"),
    ("SGE_ROOT", "NSLOTS"),
    ("PBS_JOBID", "NCPUS"),
)


def granted_cores() -> int:
    """Cores this process may use, at least one."""
    return max(1, min([_affinity(), *_quotas(memory.ROOT, memory.MEMBERSHIP), *_scheduled()]))


def threads_per_process(processes: int = 1) -> int:
    """Threads for each of `processes` on this machine: those asked for by OMP_NUM_THREADS, else a share of the cores.

    A wish for more threads than there are cores is one for another machine, and no wish.
    """
    cores = granted_cores()
    wish = wished_threads()
    return wish if wish is not None and wish <= cores else max(1, cores // processes)


def wished_threads() -> int | None:
    """What OMP_NUM_THREADS says, where it is a number (of a list for nested loops, the first)."""
    first = os.environ.get(THREADS, "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) > 0 else None


def cpu_name() -> str:
    """The processor as the kernel names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError):
            found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
            if found:
                return found
    return platform.processor() or platform.machine()


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver; None where none is loaded, or the system does not say."""
    try:
        return NVIDIA_DRIVER.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path, membership: Path) -> list[int]:
    """Whole cores that a control group's share of processor time is worth."""
    found = []
    for folder in memory.folders("cpu", root, membership):
        with suppress(OSError, ValueError):
            quota, period = map(int, (folder / "cpu.max").read_text().split())  # version 2; "max" is no number
            found.append(quota // period)
        quota_us = memory.number(folder / "cpu.cfs_quota_us")  # version 1; -1 where there is no limit
        period_us = memory.number(folder / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            found.append(quota_us // period_us)
    return found


def _scheduled() -> list[int]:
    counts = [os.environ.get(count, "") for job, count in GRANTS if job in os.environ]
    return [int(count) for count in counts if count.isascii() and count.isdigit() and int(count) > 0]
