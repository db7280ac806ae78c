"""Networks in processes of their own, which step when they are told to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from _peer_networks import Counts
from _peer_worker import Spec, serve

from ddpm_lmk.bench import Budget, Timings
from ddpm_lmk.system.console import print_status


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
        context = multiprocessing.get_context("spawn")  # a fork would begin with the memory of this process
        self._pipe, self._other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(spec, self._other_end), daemon=True)

    def __enter__(self) -> Process:
        self._process.start()
        self._other_end.close()  # so that the pipe ends with the process
        return self

    def ready(self) -> None:
        """Wait until it can step; raises ChildProcessError with its last words when it died."""
        self._answer()

    def step(self) -> dict[str, Any]:
        """Have it do one step; raises ChildProcessError with its last words when it died."""
        with suppress(BrokenPipeError):  # its last words come with the answer that does not
            self._pipe.send("step")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = f"it said nothing (exit code {self._process.exitcode})"
        if isinstance(answer, str):
            raise ChildProcessError(answer)
        return dict(answer)

    def __exit__(self, failure: object, *_: object) -> None:
        self._pipe.close()
        if failure is None:
            self._process.join(timeout=60)
        self._process.kill()
        self._process.join()


def run_together(contenders: Sequence[Contender], *, warm_up: int, rounds: int, budget: Budget) -> None:
    """All processes alive, started at once, then one step each in turn; the order turns round every round.

    No round begins that would end after the share of `budget`; of one that is cut off nothing is kept.
    """
    try:
        _take_turns(contenders, warm_up, rounds, budget)
    finally:
        count = min((len(each.peak_mib) for each in contenders if not each.failure), default=0)
        for each in contenders:
            each.timings.keep(count)
            del each.peak_mib[count:]


def _take_turns(contenders: Sequence[Contender], warm_up: int, rounds: int, budget: Budget) -> None:
    with ExitStack() as stack:
        processes = {contender.label: stack.enter_context(Process(contender.spec)) for contender in contenders}
        for contender in contenders:
            try:
                processes[contender.label].ready()
            except ChildProcessError as error:
                _fail(contender, error)
        last_s = 0.0
        for number in range(warm_up + rounds):
            if number > warm_up and budget.share_s < last_s:
                budget.leave_out(f"{warm_up + rounds - number} of {rounds} rounds")
                break
            begin_s = budget.share_s
            for contender in contenders[:: 1 if number % 2 == 0 else -1]:
                if not contender.failure:
                    _step(contender, processes[contender.label], is_kept=number >= warm_up)
            last_s = begin_s - budget.share_s
            print_status(f"round {number + 1} of {warm_up + rounds}, of which {warm_up} to warm up")


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
    print_status(f"{contender.label}: left out, {error}")
