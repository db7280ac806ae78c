"""A disk of a given size, to run out of: a tmpfs, which the superuser may mount."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.errors import ResourceError
from ddpm_lmk.rundir import retention
from tests.engine import processes
from tests.faults.forge import Forge
from tests.faults.saving import Outcome, good_steps, job

BALLAST = 50_000  # floats; makes a checkpoint of 0.8 MB, so that lines and run files weigh little beside it
LINES_BYTES = 96 << 10  # run file, journals and directories beside the checkpoints


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """`folder` as a file system of its own; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(forge: Forge, folder: Path, wanted: Outcome, *, times: float, checkpoint_bytes: int) -> dict[str, Any]:
    """A run on a disk of `times` checkpoints: it goes on or says what is missing; with room made it continues."""
    with small_disk(folder, int(times * checkpoint_bytes) + LINES_BYTES) as disk:
        work = job(disk / "run", ballast=BALLAST)
        code, said = forge.run(work)
        assert code in (0, ResourceError.exit_code), said
        names = processes.events(disk / "run")
        facts = {"times": times, "exit": code, "saved": names.count("checkpoint.saved")}
        facts["failed"] = names.count("checkpoint.failed")
        assert bool(good_steps(disk / "run")) == bool(facts["saved"])
        if code == 0:
            assert Outcome.of(disk / "run").digest == wanted.digest
            return facts
        subprocess.run(["mount", "-o", f"remount,size={20 * checkpoint_bytes}", str(disk)], check=True)
        forge.finish(work)
        assert Outcome.of(disk / "run").digest == wanted.digest
        return facts


def checkpoint_size(out: Path) -> int:
    """Bytes of the newest checkpoint of a run."""
    [path, *_] = retention.complete(out / "checkpoints")
    return sum(file.stat().st_size for file in path.iterdir())
