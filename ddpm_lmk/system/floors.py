"""Versions below which a crafted file is known to do harm. There is no option to go below them.

For torch that is CVE-2026-24747 (code runs in spite of weights_only), for Pillow CVE-2025-48379 (writes beyond a
buffer); of pydicom the last release is wanted, since it reads what strangers send.
"""

from __future__ import annotations

from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system.machine import version

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
