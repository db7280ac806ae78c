"""Packages: the ones with a security floor, and the optional ones."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from ddpm_lmk.cli.doctor.finding import Finding
from ddpm_lmk.system.floors import FLOORS, advice, below_floor
from ddpm_lmk.system.machine import version

EXTRAS = {
    "nvidia-dali-cuda130": "dali",
    "deepspeed": "deepspeed",
    "pydicom": "dicom",
    "s3fs": "cloud",
    "tensorboard": "trackers",
    "onnxscript": "onnx",
}


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
        what_to_do = "" if found else f"only if you want it: pip install 'ddpm-lmk[{extra}]'"
        findings.append(Finding("ok" if found else "note", f"extra {extra}", found or "not installed", what_to_do))
    if version("deepspeed") is not None and shutil.which("g++") is None:
        findings.append(Finding("note", "compiler", "no g++", "DeepSpeed compiles a part of itself: install g++"))
    return findings


def check_builds() -> list[Finding]:
    """Locks of builds; one that was killed leaves its own behind, and PyTorch waits on it without a word."""
    home = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    advice = "if no process is compiling, its build was killed: remove it, or ZeRO waits for ever"
    return [Finding("note", "compiled parts", f"locked by {lock}", advice) for lock in sorted(home.rglob("lock"))]
