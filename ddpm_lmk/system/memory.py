"""Memory of this machine, or of the control group that this process is in; what the kernel took back by force.

Files of the control groups that this process is in, version 2 and version 1; none where there are no such groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def folders(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """Where `controller` may keep its files: this process's own group first, then every group around it."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers == "":
                yield from _around(root, own)
            elif controller in controllers.split(","):
                yield from _around(root / controller, own)
    # A container shows its own group as the root, whatever its members are told of their place.
    yield root
    yield root / controller


def number(path: Path) -> int | None:
    """The one number in a file; None where there is none: no such file, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _around(root: Path, own: str) -> Iterator[Path]:
    place = PurePosixPath(own.lstrip("/"))
    yield from (root / part for part in (place, *place.parents) if str(part) != ".")


def total_bytes() -> int:
    """Memory that the processes of this machine, or container, may use together."""
    import psutil  # type: ignore[import-untyped]

    limits = [limit for limit, _ in _limits(ROOT, MEMBERSHIP)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_bytes() -> int:
    """What of it is still free."""
    import psutil

    left = [max(0, limit - used) for limit, used in _limits(ROOT, MEMBERSHIP)]
    return min([int(psutil.virtual_memory().available), *left])


def count_oom_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """How often the kernel killed a process of this container for want of memory; None where it does not say."""
    for folder in folders("memory", root, membership):
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
    for folder in folders("memory", root, membership):
        for limit_name, use_name in names:
            limit, used = number(folder / limit_name), number(folder / use_name)
            if limit is not None and used is not None:
                found.append((limit, used))
    return found
