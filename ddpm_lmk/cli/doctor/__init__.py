"""Looks at this machine: what is there, what a run would use, what is missing and what to do about it.

Each check returns findings; a finding that says `problem` makes `ddpm-lmk doctor` end with exit code 5. Nothing is
changed; one temporary file is written to measure the disk and removed again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddpm_lmk.cli.doctor import hardware
from ddpm_lmk.cli.doctor import hardware as place
from ddpm_lmk.cli.doctor import hardware as software
from ddpm_lmk.cli.doctor.hardware import Finding, Level
from ddpm_lmk.config import RunConfig

__all__ = ["Finding", "Level", "examine"]


def examine(folder: Path, *, cfg: RunConfig | None = None) -> list[Finding]:
    """All checks of this machine; `folder` is where runs would be written, `cfg` a run it should have room for."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        software.check_versions,
        software.check_extras,
        software.check_builds,
        hardware.check_processor,
        hardware.check_gpus,
        hardware.check_collectives,
        hardware.check_group_norm,
        lambda: place.check_disk(folder, cfg),
        place.check_shared_memory,
        place.check_limits,
        place.check_protections,
    )
    return [finding for check in checks for finding in check()]
