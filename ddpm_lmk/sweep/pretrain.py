"""Pre-training runs that a sweep starts from, run before its cells where they are not finished.

On CPUs as many stages run side by side as the sweep has workers, one process each, so that what a stage learns does
not depend on that number; on GPUs one after the other, each on all of them. A stage is an ordinary run directory: it
goes on where it was, and `ddpm-lmk pretrain` with the same run file may have made it. Each runs in a process of its own
(`python -m ddpm_lmk.sweep.pretrain`, its job on standard input), whose output is in OUT/logs/stage-NAME.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import LmkError, StoppedError
from ddpm_lmk.launcher import Device
from ddpm_lmk.sweep.expand import StageRun, is_done
from ddpm_lmk.sweep.progress import SweepView
from ddpm_lmk.system import files, signals
from ddpm_lmk.system.console import duration
from ddpm_lmk.system.machine import THREADS, threads_per_process
from ddpm_lmk.system.processes import die_with_parent, leave
from ddpm_lmk.system.signals import MARGIN_S, InterruptedRunError, grace_s

POLL_S = 0.2


@dataclass
class Running:
    """A stage under way."""

    stage: StageRun
    process: subprocess.Popen[str]
    log: Path
    since: float


class Stages:
    """Runs stages, and shows them in `view`; `failed` says why some are not finished, by name."""

    def __init__(self, out: Path, *, processes: int, device: Device, view: SweepView) -> None:
        self._out, self._processes, self._device, self._view = out, processes, device, view
        self.failed: dict[str, str] = {}

    def run(self, stages: Sequence[StageRun], asked: Callable[[], int]) -> None:
        """Run what is not finished, until all is or `asked` names a signal, which the stages are then given."""
        waiting = [stage for stage in stages if not is_done(stage.folder, stage)]
        at_once = self._processes if self._device == "cpu" else 1
        running: list[Running] = []
        told, told_at = 0, 0.0
        while running or (waiting and not told):
            while waiting and not told and len(running) < at_once:
                running.append(self._start(waiting.pop(0), side_by_side=min(at_once, len(waiting) + 1 + len(running))))
            if asked() and not told:
                told, told_at = asked(), time.monotonic()
                for each in running:
                    each.process.send_signal(told)
            if told and time.monotonic() - told_at > grace_s() - MARGIN_S / 2:
                for each in running:
                    each.process.kill()
            time.sleep(POLL_S)
            self._view.refresh()
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                self._see(each)

    def _start(self, stage: StageRun, *, side_by_side: int) -> Running:
        log = self._out / "logs" / f"stage-{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        processes = 1 if self._device == "cpu" else self._processes
        job = {"config": stage.cfg.model_dump(mode="json"), "out": str(stage.folder), "parent": os.getpid()}
        job |= {"is_foretold": False, "device": self._device, "processes": processes}
        environment = dict(os.environ)
        if self._device == "cpu":
            environment[THREADS] = str(threads_per_process(side_by_side))
        self._view.say(f"stage {stage.name}: pre-training in {stage.folder}, see {log}")
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "ddpm_lmk.sweep.pretrain"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
                env=environment,
                start_new_session=True,  # as the workers of a sweep: Ctrl-C reaches the parent only
            )
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(json.dumps(job))
        self._view.begin_stage(stage)
        return Running(stage, process, log, time.monotonic())

    def _see(self, ended: Running) -> None:
        """Take note of how a stage ended."""
        code, name = ended.process.returncode, ended.stage.name
        if is_done(ended.stage.folder, ended.stage):
            taken = time.monotonic() - ended.since
            self._view.end_stage(ended.stage, taken)
            self._view.say(f"stage {name} done, {duration(taken)}")
            return
        self._view.end_stage(ended.stage, None)
        if code in (StoppedError.exit_code, InterruptedRunError.exit_code):
            self._view.say(f"stage {name} stopped; the same command continues it")
        else:
            self.failed[name] = f"stage {name} ended with exit code {code}; see {ended.log}"
            self._view.say(self.failed[name])


def main() -> int:
    """Do the job on standard input; returns the exit code."""
    job: dict[str, Any] = json.load(sys.stdin)
    die_with_parent(job["parent"])
    files.protect()
    with signals.leaving_at_once():
        return _do(job)


def _do(job: dict[str, Any]) -> int:
    from ddpm_lmk.launcher import Placement, launch

    try:
        run = {key: job[key] for key in ("config", "out", "is_foretold")}
        return launch(run, Placement(job["device"], job["processes"]))
    except LmkError as error:
        sys.stderr.write(f"error[{type(error).__name__}]: {error}\n")
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    leave(main())
