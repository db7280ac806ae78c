"""What a measurement was made on: the processor, how busy it was, and the versions of packages."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

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
