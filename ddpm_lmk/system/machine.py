"""What a measurement was made on: the processor, how busy it was, and the versions of packages.

Versions below which a crafted file is known to do harm. There is no option to go below them.

For torch that is CVE-2026-24747 (code runs in spite of weights_only), for Pillow CVE-2025-48379 (writes beyond a
buffer); of pydicom the last release is wanted, since it reads what strangers send.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system.cores import cpu_name, granted_cores


def hardware() -> dict[str, Any]:
    """Processor, cores, load and niceness, for a result file."""
    return {
        "cpu": cpu_name(),
        "cores": granted_cores(),
        "load_1_min": round(os.getloadavg()[0], 1),
        "niceness": os.nice(0),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of `packages`; None where one is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@cache
def code_digest() -> str:
    """16 hex digits over the source files of this package, as they are on this machine."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(str(path.relative_to(Path(__file__).parents[1])).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def version(package: str) -> str | None:
    """Installed version of a package; of a torch that is loaded with its build, which an index's name leaves out."""
    if package == "torch" and "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


FLOORS = {"torch": (2, 10), "pydicom": (3, 0, 2), "pillow": (11, 3)}


def want_floors() -> None:
    """Refuse to work with packages that are too old; raises `LaunchError`."""
    for name, found in below_floor().items():
        raise LaunchError(f"{name} {found} is open to crafted files; {advice(name)}")


def below_floor() -> dict[str, str]:
    """Installed packages that are too old, with their version."""
    found = {name: version(name) for name in FLOORS}
    return {name: text for name, text in found.items() if text is not None and release(text) < FLOORS[name]}


def advice(name: str) -> str:
    """What to do about a package that is too old."""
    wanted = ".".join(map(str, FLOORS[name]))
    return f"wanted {wanted} or newer: pip install '{name}>={wanted}'"


def release(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
