"""Networks in processes of their own, which step when they are told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from _peer_networks import Counts
from _peer_worker import Spec

from ddpm_lmk.bench import Timings
from ddpm_lmk.system.console import say

WORKER = Path(__file__).with_name("_peer_worker.py")
TURNS_ON_GPU = 3


@dataclass
class Contender:
    """One network of a group, and what was measured of it.

    Attributes:
        function_flops: operations of a step's forward pass in the formulation the network was published in.
        failure: why there are no timings, as the process's last words.
    """

    label: str
    spec: Spec
    counts: Counts
    function_flops: int
    timings: Timings = field(default_factory=Timings)
    peak_mib: list[float] = field(default_factory=list)
    failure: str = ""


class Process:
    """A worker that is started on entering and ended on leaving."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __enter__(self) -> Process:
        threads = {"OMP_NUM_THREADS": str(self.spec.threads), "MKL_NUM_THREADS": str(self.spec.threads)}
        self._words = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), self.spec.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=os.environ | threads,
            text=True,
        )
        try:
            self._answer()
        except ChildProcessError:
            self.__exit__(None, None, None)
            raise
        return self

    def step(self) -> dict[str, Any]:
        """Have it do one step; raises ChildProcessError with its last words when it died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words come with the answer that does not
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        self._words.seek(0)
        said = [text for text in self._words.read().splitlines() if text.strip()]
        raise ChildProcessError(f"{said[-1] if said else 'it said nothing'} (exit code {code})")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.close()


def run_together(contenders: Sequence[Contender], *, warm_up: int, rounds: int) -> None:
    """All processes alive, one step each in turn; the order turns round every round."""
    with ExitStack() as stack:
        processes = {}
        for contender in contenders:
            process = _started(contender, stack)
            if process is not None:
                processes[contender.label] = process
        for number in range(warm_up + rounds):
            for contender in contenders[:: 1 if number % 2 == 0 else -1]:
                if not contender.failure:
                    _step(contender, processes[contender.label], is_kept=number >= warm_up)
            say(f"round {number + 1} of {warm_up + rounds}, of which {warm_up} to warm up")


def run_by_turns(contenders: Sequence[Contender], *, warm_up: int, rounds: int) -> None:
    """One process at a time, started anew in every turn; the order turns round every turn."""
    steps = max(1, -(-rounds // TURNS_ON_GPU))
    for turn in range(TURNS_ON_GPU):
        for contender in contenders[:: 1 if turn % 2 == 0 else -1]:
            if contender.failure:
                continue
            with ExitStack() as stack:
                process = _started(contender, stack)
                for number in range(warm_up + steps):
                    if process is not None and not contender.failure:
                        _step(contender, process, is_kept=number >= warm_up)
        say(f"turn {turn + 1} of {TURNS_ON_GPU}, {steps} rounds each")


def _started(contender: Contender, stack: ExitStack) -> Process | None:
    try:
        return stack.enter_context(Process(contender.spec))
    except ChildProcessError as error:
        _fail(contender, error)
        return None


def _step(contender: Contender, process: Process, *, is_kept: bool) -> None:
    try:
        measured = process.step()
    except ChildProcessError as error:
        _fail(contender, error)
        return
    if not is_kept:
        contender.timings.warm_up += 1
        return
    contender.timings.wall_s.append(measured["wall_s"])
    contender.timings.cpu_s.append(measured["cpu_s"])
    if measured["device_s"] is not None:
        contender.timings.device_s.append(measured["device_s"])
    contender.peak_mib.append(measured["peak_mib"])


def _fail(contender: Contender, error: ChildProcessError) -> None:
    contender.failure = str(error)
    say(f"{contender.label}: left out, {error}")
