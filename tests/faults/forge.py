"""A process that has paid for its imports and forks a child per run: `python -m tests.faults.forge`.

Orders come as lines of JSON on standard input: a toy job (`tests.engine.worker`) or a whole run (`runs.execute`), what
breaks it (a fail-point, a kill after some time, strace on the thread that saves), and a log. The answer is the child's
exit code. So a run that is killed and continued costs two runs, and not two times torch.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]


class Forge:
    """The calling side: starts the process, sends orders, stops it at the end of a `with` block."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forge"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Forge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(
        self,
        job: dict[str, Any],
        *,
        failpoint: str = "",
        whole: bool = False,
        kill_after_s: float | None = None,
        trace: dict[str, Any] | None = None,
    ) -> tuple[int, str]:
        """Exit code (negative: the signal) and what was said to standard error.

        Args:
            failpoint: in the form of LMK_FAILPOINT.
            whole: the job is one of `runs.execute`, not of the toy.
            trace: {"save": which one, "options": of strace, "log": file} to watch, or disturb, one save.
        """
        log = Path(job["out"]).with_suffix(".log")
        order = {"job": job, "failpoint": failpoint, "whole": whole, "log": str(log), "trace": trace}
        order["kill_after_s"] = kill_after_s
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), log.read_text()

    def finish(self, job: dict[str, Any], **more: Any) -> None:
        """A run that must end well."""
        code, said = self.run(job, **more)
        assert code == 0, said


def serve() -> None:
    """Fork a child per order, one after the other."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_obey(json.loads(line)))
        _kill_later(child, json.loads(line)["kill_after_s"])
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _kill_later(child: int, after_s: float | None) -> None:
    """Kill the child that long after it began; it is waited for only then, so its number is still its own."""
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)


def _obey(order: dict[str, Any]) -> int:
    from ddpm_lmk import failpoints, runs
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.errors import LmkError
    from tests.engine import worker

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    failpoints.arm(order["failpoint"])
    if order["trace"]:
        _trace_a_save(**order["trace"])
    try:
        if order["whole"]:
            return runs.run_job(order["job"])
        worker.work(order["job"], Parallel("cpu"))
    except LmkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


def _trace_a_save(save: int, options: list[str], log: str) -> None:
    """Attach strace to the thread that saves, and to no other, when it begins its save number `save`."""
    from ddpm_lmk.rundir import RunDir

    original, begun = RunDir.save_checkpoint, 0

    def traced(self: RunDir, *arguments: Any, **more: Any) -> bool:
        nonlocal begun
        begun += 1
        if begun == save:
            # Another thread does it: what this one did for it would be counted among the calls of the save.
            command = ["strace", "-y", "-o", log, *options, "-p", str(threading.get_native_id())]
            helper = threading.Thread(target=_attach, args=(command,))
            helper.start()
            helper.join()
        return original(self, *arguments, **more)

    RunDir.save_checkpoint = traced  # type: ignore[method-assign]


def _attach(command: list[str]) -> None:
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        sys.stderr.write(f"strace is not attached: {said}\n")
        os._exit(1)


if __name__ == "__main__":
    # What a run imports when it needs it is imported before the first fork, so that no child has to.
    for module in ("numpy.random", "torch._dynamo", "ddpm_lmk.runs", "tests.engine.worker"):
        importlib.import_module(module)
    serve()
