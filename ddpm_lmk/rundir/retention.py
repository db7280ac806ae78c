"""Which checkpoints stay, and how the others go.

Kept are the newest, every one at a multiple of an interval, and those pinned by a reason (the best evaluation, the one
this session resumed from): a union, so that no rule takes what another needs. Called only after a newer checkpoint is
durable, which the rules always keep.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Keep:
    """The newest `last`, those at multiples of `every` steps, and the newest at a multiple of `interval`; None: none.

    Signals make checkpoints between the intervals. A run that rolls back does so to one at the interval, so the newest
    of these stays, however often the run was interrupted since.
    """

    last: int
    every: int | None = None
    interval: int | None = None


def step_name(step: int) -> str:
    """Directory name of a checkpoint or snapshot."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a directory that `complete` has found."""
    return int(path.name.removeprefix("step-"))


def complete(directory: Path) -> list[Path]:
    """Directories of steps, newest step first; symbolic links are none."""
    steps = [path for path in directory.glob("step-*") if STEP.fullmatch(path.name)]
    # A link could name a folder outside, which `drop` would then empty.
    return [path for path in sorted(steps, key=step_of, reverse=True) if path.is_dir() and not path.is_symlink()]


def kept(steps: Iterable[int], keep: Keep, pinned: Collection[int | None]) -> set[int]:
    """The steps that stay, of those that exist."""
    newest_first = sorted(steps, reverse=True)
    stay = {*newest_first[: keep.last], *(step for step in newest_first if step in pinned)}
    if keep.every is not None:
        stay |= {step for step in newest_first if step % keep.every == 0}
    if keep.interval is not None:
        stay |= {*[step for step in newest_first if step % keep.interval == 0][:1]}
    return stay


def retain(directory: Path, keep: Keep, pinned: Collection[int | None]) -> None:
    """Drop what no rule keeps, oldest first; raises OSError where a rename is refused."""
    paths = {step_of(path): path for path in complete(directory)}
    # Oldest first: a kill in between leaves the newer ones.
    for step in sorted(paths.keys() - kept(paths, keep, pinned)):
        drop(paths[step])


def drop(path: Path) -> None:
    """Remove a directory; it leaves its name first, so that a kill in the middle leaves no half one with that name."""
    trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(trash)
    with contextlib.suppress(OSError):  # what stays behind has a name nobody reads, and `clean` comes back to it
        shutil.rmtree(trash)


def clean(directory: Path) -> None:
    """Remove what a killed writer left half done; call only with the lock of the run."""
    for pattern in (".tmp-*", ".trash-*"):
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
