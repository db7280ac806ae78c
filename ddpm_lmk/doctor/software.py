"""Packages: the ones with a security floor, and the optional ones."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path

from ddpm_lmk.doctor.finding import Finding
from ddpm_lmk.floors import FLOORS, advice, below_floor
from ddpm_lmk.machine import version

EXTRAS = {
    "nvidia-dali-cuda130": "dali",
    "deepspeed": "deepspeed",
    "pydicom": "dicom",
    "tensorboard": "trackers",
    "onnxscript": "onnx",
}

LONGEST_BUILD_S = 1800.0


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
        what_to_do = "" if found else f"only if you want it: pip install -c constraints.txt -e '.[{extra}]'"
        findings.append(Finding("ok" if found else "note", f"extra {extra}", found or "not installed", what_to_do))
    if version("deepspeed") is not None and shutil.which("g++") is None:
        findings.append(Finding("note", "compiler", "no g++", "DeepSpeed compiles a part of itself: install g++"))
    return findings


def check_builds() -> list[Finding]:
    """Locks that builds killed on the way left behind: PyTorch waits on them without a word, ZeRO runs with it."""
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    old = [lock for lock in home.rglob("lock") if time.time() - lock.stat().st_mtime > LONGEST_BUILD_S]
    return [
        Finding("problem", "compiled parts", f"an old lock {lock}", "no build is running? remove it") for lock in old
    ]
