"""A process that has paid for its imports and forks a child per run: `python -m tests.faults.forge`.

Orders come as lines of JSON on standard input: a toy job (`tests.engine.worker`) or a whole run (`runs.execute`), what
breaks it (`breaking`, a kill after some time, strace on the thread that saves), and a log. The answer is the child's
exit code. So a run that is killed and continued costs two runs, and not two times torch. Ranks are started side by side
(`start`) and waited for one by one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.faults.breaking import Break, arm

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

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, module: str, file: Path, log: Path, *, threads: int, environment: dict[str, str]) -> Worker:
        """A child that calls `main(file)` of a module beside others, with so many threads; all it says is in `log`."""
        log.write_text("")
        order = {"module": module, "file": str(file), "log": str(log), "threads": threads, "environment": environment}
        return Worker(self._ask({"start": order}), log, lambda pid: self._ask({"wait": pid}))

    def run(
        self,
        job: dict[str, Any],
        *,
        breaks: Sequence[Break] = (),
        whole: bool = False,
        kill_after_s: float | None = None,
        trace: dict[str, Any] | None = None,
    ) -> tuple[int, str]:
        """Exit code (negative: the signal) and what was said to standard error.

        Args:
            breaks: where it is killed, waits, or is refused.
            whole: the job is one of `runs.execute`, not of the toy.
            trace: {"save": which one, "options": of strace, "log": file} to watch, or disturb, one save.
        """
        log = Path(job["out"]).with_suffix(".log")
        order = {"job": job, "breaks": list(breaks), "whole": whole, "log": str(log), "trace": trace}
        order["kill_after_s"] = kill_after_s
        return self._ask({"run": order}), log.read_text()

    def finish(self, job: dict[str, Any], **more: Any) -> None:
        """A run that must end well."""
        code, said = self.run(job, **more)
        assert code == 0, said


class Worker:
    """A child of the forge that runs beside others."""

    def __init__(self, pid: int, log: Path, wait: Callable[[int], int]) -> None:
        self.pid, self.log, self._wait = pid, log, wait
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Nothing, once it has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, whatever state it is in."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code (negative: the signal)."""
        if self.returncode is None:
            self.returncode = self._wait(self.pid)
        return self.returncode

    def wait_for(self, words: str) -> None:
        """Until it has said this, or has ended, which is an error."""
        while words not in self.log.read_text():
            assert psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE, self.log.read_text()
            time.sleep(0.01)


def serve() -> None:
    """Fork a child per order, which is answered when the child has ended, or at once when it was only to be started."""
    started = set()
    for line in sys.stdin:
        [(kind, order)] = json.loads(line).items()
        child = order if kind == "wait" else os.fork()
        if child == 0:
            os._exit(_obey(order) if kind == "run" else _work(order))
        if kind == "start":
            started.add(child)
            answer = child
        else:
            _kill_later(child, order["kill_after_s"] if kind == "run" else None)
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            started.discard(child)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for child in started:  # of a test that failed before it waited
        os.kill(child, signal.SIGKILL)


def _kill_later(child: int, after_s: float | None) -> None:
    """Kill the child that long after it began; it is waited for only then, so its number is still its own."""
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)


def _say_into(log: str) -> None:
    """Everything this process says goes into a file, and nobody is asked."""
    for number, path in ((0, os.devnull), (1, log), (2, log)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def _work(order: dict[str, Any]) -> int:
    import torch

    from ddpm_lmk.system.environment import PARENT

    _say_into(order["log"])
    if order["environment"]:  # a rank among several, as our launcher starts them
        order["environment"][PARENT] = str(os.getppid())
    os.environ.update(order["environment"] | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    torch.set_num_threads(order["threads"])
    warnings.simplefilter("error", UserWarning)
    try:
        return importlib.import_module(order["module"]).main(Path(order["file"]))
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _obey(order: dict[str, Any]) -> int:
    from ddpm_lmk import run as runs
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.errors import LmkError
    from tests.engine import worker

    Path(order["log"]).unlink(missing_ok=True)
    _say_into(order["log"])
    arm(order["breaks"])
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
    from ddpm_lmk.rundir.directory import RunDir

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
    for module in ("numpy.random", "torch._dynamo", "ddpm_lmk.run", "tests.engine.worker"):
        importlib.import_module(module)
    gc.freeze()  # no child walks through what is shared
    serve()
