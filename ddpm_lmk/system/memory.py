"""Memory of this machine, or of the control group that this process is in; what the kernel took back by force."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ddpm_lmk.system import cgroup


def total_bytes() -> int:
    """Memory that the processes of this machine, or container, may use together."""
    import psutil  # type: ignore[import-untyped]

    limits = [limit for limit, _ in _limits(cgroup.ROOT, cgroup.MEMBERSHIP)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_bytes() -> int:
    """What of it is still free."""
    import psutil

    left = [max(0, limit - used) for limit, used in _limits(cgroup.ROOT, cgroup.MEMBERSHIP)]
    return min([int(psutil.virtual_memory().available), *left])


def count_oom_kills(root: Path = cgroup.ROOT, membership: Path = cgroup.MEMBERSHIP) -> int | None:
    """How often the kernel killed a process of this container for want of memory; None where it does not say."""
    for folder in cgroup.folders("memory", root, membership):
        for name in ("memory.events", "memory.oom_control"):  # version 2, version 1
            with suppress(OSError, ValueError):
                facts = dict(line.split() for line in (folder / name).read_text().splitlines())
                if "oom_kill" in facts:
                    return int(facts["oom_kill"])
    return None


def _limits(root: Path, membership: Path) -> list[tuple[int, int]]:
    """Limit and use of every control group around this process that has both."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    found = []
    for folder in cgroup.folders("memory", root, membership):
        for limit_name, use_name in names:
            limit, used = cgroup.number(folder / limit_name), cgroup.number(folder / use_name)
            if limit is not None and used is not None:
                found.append((limit, used))
    return found
