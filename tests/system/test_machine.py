"""Cores, threads and memory that were granted, whatever the machine has."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ddpm_lmk.launcher import supervise
from ddpm_lmk.system import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups made of files; this process is in `job/step`, and no scheduler is there."""
    for name in (machine.THREADS, *(name for grant in machine.GRANTS for name in grant)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job/step\n4:memory:/job/step\n0::/job/step\n")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"job/step/cpu.max": "max 100000", "cpu/job/step/cpu.cfs_quota_us": "-1"}, 16),
        ({"job/step/cpu.max": "400000 100000"}, 4),
        ({"job/step/cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "3200000 100000"}, 16),
        ({"cpu/job/step/cpu.cfs_quota_us": "300000", "cpu/job/step/cpu.cfs_period_us": "100000"}, 3),
    ],
    ids=["no limit", "own", "a group around it", "container, half a core", "more than there are", "version 1"],
)
def test_a_share_of_processor_time_is_worth_whole_cores(groups: Path, files: dict[str, str], granted: int) -> None:
    write(groups, files)
    assert machine.granted_cores() == granted


@pytest.mark.parametrize(
    ("words", "granted"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "64"}, 16),
        ({"NSLOTS": "4"}, 16),
        ({"SGE_ROOT": "/sge", "NSLOTS": "4"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "many"}, 16),
    ],
)
def test_a_scheduler_grants_cores_that_nothing_enforces(
    groups: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], granted: int
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert machine.granted_cores() == granted


def test_a_system_without_affinity_has_all_cores(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert machine.granted_cores() == 12


@pytest.mark.parametrize(
    ("wish", "processes", "threads"),
    [
        (None, 1, 16),
        (None, 3, 5),
        (None, 99, 1),
        ("2", 4, 2),
        ("16", 4, 16),
        ("64", 4, 4),
        ("8,2", 1, 8),
        ("0", 4, 4),
        ("abc", 4, 4),
        ("", 4, 4),
        ("-3", 4, 4),
        ("٣", 4, 4),
    ],
)
def test_processes_share_the_cores_unless_a_sane_wish_says_otherwise(
    groups: Path, monkeypatch: pytest.MonkeyPatch, wish: str | None, processes: int, threads: int
) -> None:
    if wish is not None:
        monkeypatch.setenv(machine.THREADS, wish)
    assert machine.threads_per_process(processes) == threads


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({"job/memory.max": "1000", "job/memory.current": "400", "job/step/memory.max": "max"}, 1000, 600),
        ({"memory/job/memory.limit_in_bytes": "900", "memory/job/memory.usage_in_bytes": "1000"}, 900, 0),
        ({"memory.max": "800", "memory.current": "100"}, 800, 700),
        ({"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"}, None, None),
    ],
    ids=["version 2, of the job", "version 1, used up", "container", "no limit"],
)
def test_memory_is_that_of_the_container(
    groups: Path, files: dict[str, str], total: int | None, available: int | None
) -> None:
    write(groups, files)
    if total is None:
        assert machine.total_bytes() > machine.available_bytes() > 2**20
    else:
        assert (machine.total_bytes(), machine.available_bytes()) == (total, available)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"job/step/memory.events": "low 0\noom_kill 4\n"}, 4),
        ({"memory/job/step/memory.oom_control": "under_oom 0\noom_kill 2\n"}, 2),
        ({"memory.events": "oom_kill 1\n"}, 1),
        ({}, None),
    ],
    ids=["version 2", "version 1", "container", "none"],
)
def test_kills_for_want_of_memory_are_counted(groups: Path, files: dict[str, str], count: int | None) -> None:
    write(groups, files)
    assert machine.count_oom_kills() == count


def test_a_real_kill_for_want_of_memory_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in a memory group of 64 MiB takes 256; where groups may not be made, there is nothing to test."""
    group = machine.GROUPS / "memory" / f"ddpm-lmk-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError:
        pytest.skip("no rights to make a memory group (cgroup version 1)")
    (tmp_path / "membership").write_text(f"4:memory:/{group.name}\n")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    try:
        assert machine.count_oom_kills() == 0
        enter = f"open('{group}/cgroup.procs', 'w').write('0')"
        code = subprocess.run([sys.executable, "-c", f"{enter}; b'x' * (256 << 20)"], check=False).returncode
        assert (code, machine.count_oom_kills()) == (-9, 1)
        assert "for want of memory; use a smaller train.micro_batch" in supervise.cause_of(code, oom_kills=1)
    finally:
        with suppress(OSError):
            group.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells it on Linux only")
def test_the_processor_has_a_name() -> None:
    assert machine.cpu_name()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    code = """
import os
from ddpm_lmk.system import machine
def used():
    return int(machine.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def freed():
    blocks = [b"x" * 2**20 for _ in range(64)]
    del blocks
    return used() - before
before = used()
returned = freed()
assert machine.keep_freed_memory()
kept = freed()
machine.return_freed_memory()
print(returned, kept, used() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    returned, kept, after = map(int, done.stdout.split())
    assert returned < 16 * 2**20 < 48 * 2**20 < kept
    assert after < 16 * 2**20
