"""Outputs are for their owner only: images of patients are behind all of them, and weights can reproduce them.

Folders of runs are 0700 and files 0600 unless the owner shares them with the group on purpose. Nothing is sent
anywhere: libraries that could ask a hub are told not to.
"""

from __future__ import annotations

import os

SHARE = "DDPM_LMK_SHARE_GROUP"  # environment, so that ranks and workers know


def is_shared() -> bool:
    """May the group read and write?"""
    return os.environ.get(SHARE) == "1"


def folder_mode() -> int:
    """Mode of new folders."""
    return 0o770 if is_shared() else 0o700


def file_mode() -> int:
    """Mode of new files."""
    return 0o660 if is_shared() else 0o600


def protect(*, share_group: bool | None = None) -> None:
    """Set the mask of this process, and of those it starts; call it where a process begins."""
    if share_group is not None:
        os.environ[SHARE] = "1" if share_group else "0"
    os.umask(0o007 if is_shared() else 0o077)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
