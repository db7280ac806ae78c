"""Going on from another run's checkpoint under another configuration: `--fork NEWDIR`.

The newest good checkpoint is copied into the new run directory before anything else happens there, so from then on the
new run is one like any other, and the old one may go on, or go away. Nothing is written into the old directory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import CheckpointError, ResourceError
from ddpm_lmk.rundir import retention
from ddpm_lmk.rundir.checkpoint import load_checkpoint
from ddpm_lmk.system import durable, privacy


def bring_checkpoint(old: Path, new: Path) -> dict[str, Any]:
    """Copy the newest good checkpoint of the run `old` into the run directory `new`, once; returns facts for run.json.

    Raises:
        CheckpointError: `old` has no checkpoint that is whole.
        ResourceError: no space.
    """
    target = new / "checkpoints"
    brought = retention.complete(target)
    if not brought:
        source = _newest_good(old / "checkpoints")
        try:
            _copy(source, target / source.name)
        except OSError as error:
            raise ResourceError(
                f"cannot copy {source} to {target} ({error.strerror}); free some space, the same command continues"
            ) from None
        brought = [source]
    step = int(brought[0].name.removeprefix("step-"))
    return {"path": str(old), "use": "state", "step": step, "loaded": "fork"}


def _newest_good(directory: Path) -> Path:
    reason = "there is none"
    for path in retention.complete(directory):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            reason = str(error)
            continue
        return path
    raise CheckpointError(f"no checkpoint in {directory} to go on from ({reason}); give the run with --out")


def _copy(source: Path, target: Path) -> None:
    """A copy that is there as a whole or not at all; it is verified again when it is loaded."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=privacy.folder_mode())
    temporary = target.with_name(f".tmp-fork-{target.name}-{os.getpid()}")
    try:
        temporary.mkdir(mode=privacy.folder_mode())
        for path in source.iterdir():
            copy = temporary / path.name
            shutil.copyfile(path, copy, follow_symlinks=False)
            copy.chmod(privacy.file_mode())
            with copy.open("rb") as file:
                os.fsync(file.fileno())
        durable.flush_directory(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    durable.flush_directory(target.parent)
