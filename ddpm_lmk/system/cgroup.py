"""Files of the control groups that this process is in, version 2 and version 1; none where there are no such groups."""

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
