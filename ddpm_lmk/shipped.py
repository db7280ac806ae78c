"""Where the files that come with the package lie: inside it when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from ddpm_lmk.errors import LaunchError

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The folder `configs`, `benchmarks` or `launch`. Raises LaunchError in an incomplete installation."""
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise LaunchError(f"the folder {name}/ is missing beside {PACKAGE}; install the package again")
