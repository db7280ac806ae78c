"""A child process of a sweep: does one stage, or cell after cell with dataset and network kept in memory between them.

Started by `sweep.run` as `python -m ddpm_lmk.sweep.worker` with its job as JSON on standard input; reports events as
lines of JSON on standard output, and writes everything else to standard error. A cell belongs to whoever holds its lock
file, so any number of workers, and of sweeps, can share a folder. A failed cell is recorded and the next one taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import LmkError, StoppedError
from ddpm_lmk.sweep.expand import Cell
from ddpm_lmk.system import files, heartbeat, locks
from ddpm_lmk.system.children import child_job
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.processes import leave
from ddpm_lmk.system.signals import grace_s

if TYPE_CHECKING:
    from ddpm_lmk.engine.session import Session


class Reporter:
    """Events for the parent, one JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: str, **fields: Any) -> None:
        """Send one event. A parent that is gone finds everything that counts in the folder."""
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(json.dumps({"event": event, **fields}) + "\n")
            self._stream.flush()


def main() -> int:
    """Read the job, work, return the exit code."""
    report = Reporter(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what libraries print must not end up among the events
    with child_job() as job:
        if "stage" in job:
            return do_stage(**job["stage"])
        heartbeat.start_heartbeats(job["slot"])
        return do_cells(job, report)


def do_stage(run: dict[str, Any], *, processes: int, device: Any) -> int:
    """Run a stage as `ddpm-lmk pretrain` would; returns the exit code."""
    from ddpm_lmk.launcher import Placement, launch

    try:
        return launch(run, Placement(device, processes, grace_s=grace_s()))
    except LmkError as error:
        sys.stderr.write(f"error[{type(error).__name__}]: {error}\n")
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


def do_cells(job: dict[str, Any], report: Reporter) -> int:
    """Take one cell after the other; returns 0, or 75 or 130 when stopped by a signal."""
    from ddpm_lmk.engine.session import Session  # imports torch, once per worker

    session = Session()
    for fields in job["cells"]:
        cell = Cell(**{**fields, "folder": Path(fields["folder"]), "cfg": RunConfig.model_validate(fields["cfg"])})
        try:
            _do_cell(cell, job, session, report)
        except StoppedError as stopped:
            report("stopped", cell=cell.name)
            return stopped.exit_code
    return 0


def _do_cell(cell: Cell, job: dict[str, Any], session: Session, report: Reporter) -> None:
    """Run one cell unless it is done, taken by another worker, or has failed in this session already."""
    from ddpm_lmk import run

    with locks.locked(cell.folder.with_name(f"{cell.name}.lock")) as is_mine:
        if not is_mine:
            return
        if cell.is_done():  # by another sweep, since this worker was started
            report("done", cell=cell.name, wall_s=0.0)
            return
        failure = failure_file(cell)
        if (read_json(failure) or {}).get("session") == job["session"]:
            return  # another worker of this sweep has tried it; a later command tries it again
        report("start", cell=cell.name)
        sys.stderr.write(f"--- {cell.name}\n")  # the log of a worker holds many cells
        started = time.monotonic()
        try:
            run.execute(cell.cfg, cell.folder, device=job["device"], session=session, group=job["sweep"])
        except StoppedError:  # the cell is saved, and this worker has to leave
            raise
        except Exception as error:  # a cell that fails, for whatever reason, must not stop the others
            traceback.print_exc()
            facts = describe(error)
            files.write_json(failure, {"session": job["session"], **facts})
            report("failed", cell=cell.name, error=facts["error"])
            return
        failure.unlink(missing_ok=True)
        report("done", cell=cell.name, wall_s=round(time.monotonic() - started, 2))


def failure_file(cell: Cell) -> Path:
    """Beside the run directory of a cell: why it failed, and in which session."""
    return cell.folder.with_name(f"{cell.name}.error.json")


def describe(error: BaseException) -> dict[str, Any]:
    """One line for a table, and the exit code the error would have had on its own."""
    line = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, LmkError):
        line = f"{type(error).__name__}: {line}"
    return {"error": line, "type": type(error).__name__, "exit_code": getattr(error, "exit_code", 1)}


if __name__ == "__main__":
    leave(main())
