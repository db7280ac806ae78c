"""One warm worker of a sweep: pulls cells, keeps the dataset resident and the model built between them.

Started by `sweep.run` as `python -m ddpm_lmk.sweep.worker` with its job as JSON on standard input; tells its parent
what happens as lines of JSON on standard output, and writes everything else to standard error. A cell belongs to
whoever holds its lock file, so any number of workers, and of sweeps, can share a folder. A failed cell is recorded and
the next one taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import LmkError, StoppedError
from ddpm_lmk.sweep.expand import Cell, cell_folder, is_done
from ddpm_lmk.system import files, heartbeat, locks, signals
from ddpm_lmk.system import files as privacy
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.processes import die_with_parent, leave


class Reporter:
    """Events for the parent, one JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: str, **fields: Any) -> None:
        """Send one event; a parent that is gone does not hear it, and finds everything that counts in the folder."""
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(json.dumps({"event": event, **fields}) + "\n")
            self.stream.flush()


def main() -> int:
    """Read the job, work, return the exit code: 0, or 75 or 130 when stopped by a signal."""
    report = Reporter(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # whatever prints goes to the log
    job = json.load(sys.stdin)
    die_with_parent(job["parent"])
    heartbeat.start_heartbeats(job["slot"])
    privacy.protect()
    with signals.leaving_at_once():
        return _pull(job, report)


def _pull(job: dict[str, Any], report: Reporter) -> int:
    """Take one cell after the other."""
    from ddpm_lmk.engine.session import Session  # torch, paid once per worker

    session = Session()
    out = Path(job["out"])
    for fields in job["cells"]:
        cell = Cell(**{**fields, "cfg": RunConfig.model_validate(fields["cfg"])})
        try:
            _work_on(cell, out, job, session, report)
        except StoppedError as stopped:
            report("stopped", cell=cell.name)
            return stopped.exit_code
    return 0


def _work_on(cell: Cell, out: Path, job: dict[str, Any], session: Any, report: Reporter) -> None:
    """Run one cell unless it is done, taken by another worker, or has failed in this session already."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with locks.locked(out / "cells" / f"{cell.name}.lock") as is_mine:
        if not is_mine:
            return
        if is_done(cell_folder(out, cell.name), cell):
            report("done", cell=cell.name, wall_s=0.0)
            return
        failure = out / "cells" / f"{cell.name}.error.json"
        if (read_json(failure) or {}).get("session") == job["session"]:
            return
        report("start", cell=cell.name)
        sys.stderr.write(f"--- {cell.name}\n")
        started = time.monotonic()
        try:
            _execute(cell, out, job, session)
        except StoppedError:
            raise
        except Exception as error:  # a cell that fails, for whatever reason, must not stop the others
            traceback.print_exc()
            files.write_json(failure, {"session": job["session"], **describe(error)})
            report("failed", cell=cell.name, error=describe(error)["error"])
            return
        failure.unlink(missing_ok=True)
        report("done", cell=cell.name, wall_s=round(time.monotonic() - started, 2))


def _execute(cell: Cell, out: Path, job: dict[str, Any], session: Any) -> None:
    from ddpm_lmk import run

    run.execute(cell.cfg, cell_folder(out, cell.name), device=job["device"], session=session)


def describe(error: BaseException) -> dict[str, Any]:
    """One line for a table, and the exit code the error would have had on its own."""
    line = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, LmkError):
        line = f"{type(error).__name__}: {line}"
    return {"error": line, "type": type(error).__name__, "exit_code": getattr(error, "exit_code", 1)}


if __name__ == "__main__":
    leave(main())
