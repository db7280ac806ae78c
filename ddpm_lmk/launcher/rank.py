"""A rank of a run: `python -m ddpm_lmk.launcher.rank JOB.json`, started by the launcher through torchelastic.

It follows its launcher and catches signals before it imports torch: a launcher that dies or a signal that comes in
these seconds must not leave a rank behind. Then it does the job as `ddpm_lmk.run` does it in one process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from ddpm_lmk.errors import LmkError, StoppedError
from ddpm_lmk.system import environment, files, heartbeat, processes, signals


def main(arguments: list[str]) -> NoReturn:
    """Do the job in the file, and leave with its exit code."""
    parent = os.environ.get(environment.PARENT)
    if parent is not None:
        processes.die_with_parent(int(parent))
    rank = int(os.environ.get("RANK", "0"))
    files.protect()
    heartbeat.start_heartbeats(rank)
    with signals.leaving_at_once():
        code = _run_job(Path(arguments[0]), rank)
    processes.leave(code)


def _run_job(path: Path, rank: int) -> int:
    try:
        from ddpm_lmk import run

        return run.run_job(json.loads(path.read_text()))
    except LmkError as error:
        # Rank 0 reports an error that all ranks share; what only another rank met, that rank has to report.
        if rank == 0 or not (error.is_shared or isinstance(error, StoppedError)):
            signals.print_status(f"error[{type(error).__name__}]: {'' if rank == 0 else f'rank {rank}: '}{error}")
        return error.exit_code
    except KeyboardInterrupt:
        return signals.InterruptedRunError.exit_code
    except Exception:
        signals.print_status(f"rank {rank}:\n{traceback.format_exc()}")
        return 1


if __name__ == "__main__":
    main(sys.argv[1:])
