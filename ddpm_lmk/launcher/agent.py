"""The agent of one node: torchelastic's, with a policy of its own.

torchelastic brings the nodes together, starts the ranks and notices when one ends. What is added is when to start again
(not after an error of ours, not after a stop, and not more than so often without a new checkpoint), that ranks without
progress are ended, that ranks whose neighbour is lost are not waited for, and that signals are passed on.
Imports torch; import it late.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext

from ddpm_lmk.launcher import supervise
from ddpm_lmk.launcher.placement import Placement
from ddpm_lmk.launcher.supervise import Notes
from ddpm_lmk.system.heartbeat import read_beats
from ddpm_lmk.system.memory import count_oom_kills
from ddpm_lmk.system.processes import exit_code
from ddpm_lmk.system.signals import SIGNALS

OURS = (2, 3, 4, 5, 6, 7, 8)  # exit codes that another attempt would meet again
STOPPED = (75, 76, 130)
SETTLE_S = 10  # for ranks that end by themselves after one of them has


class Agent(LocalElasticAgent):
    """Looks after the ranks of this node.

    Attributes:
        code: exit code of the run, once it has ended; None where too many restarts made no progress.
    """

    def __init__(self, spec: WorkerSpec, placement: Placement, pulse: Path, notes: Notes) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=str(pulse)), shutdown_timeout=SETTLE_S)
        self.code: int | None = None
        self.asked = 0  # the signal that asked for a stop
        self._placement, self._pulse, self._notes = placement, pulse, notes
        self._told: set[int] = set()
        self._slow: set[int] = set()
        self._newest = notes.newest_step()
        self._oom_kills = count_oom_kills() or 0
        self._lost_at = 0.0
        self._failed: dict[int, int] = {}  # exit codes of the first ranks that ended with an error
        self._failed_at = 0.0
        self._is_stalled = False

    @property
    def is_running(self) -> bool:
        """Are there ranks that can be told to stop?"""
        return self._worker_group.state == WorkerState.HEALTHY

    def pids(self) -> list[int]:
        """Process numbers of the ranks of this node."""
        return [int(worker.id) for worker in self._worker_group.workers if worker.id]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called ten times a second."""
        self._pass_on_stop()
        failed = {rank: code for rank, code in self._ended().items() if code != 0}
        if failed and not self._failed:
            self._failed, self._failed_at = failed, time.monotonic()
        if self._failed and not self._have_settled():
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            self._look_after()
        elif result.state == WorkerState.SUCCEEDED:
            self.code = 0
        else:
            # One that failed since the look above was found by torchelastic, which then ended the others itself.
            found = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self._decide(self._failed or dict(list(found.items())[:1]))
        return result

    def _ended(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, without taking them from torchelastic."""
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        handlers = context.subprocess_handlers
        codes = {w.global_rank: exit_code(handlers[w.local_rank].proc) for w in self._worker_group.workers}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _have_settled(self) -> bool:
        """After an error of ours or a stop the others end by themselves; after a loss they would wait for ever."""
        known = next((code for code in self._failed.values() if code in OURS + STOPPED), None)
        if len(self._ended()) == len(self._worker_group.workers):
            return True
        if known is None or time.monotonic() - self._failed_at > SETTLE_S:
            supervise.kill(self.pids())
        return False

    def _pass_on_stop(self) -> None:
        if not self.asked:
            return
        number = signal.SIGINT if self.asked == signal.SIGINT else signal.SIGTERM
        for pid in self.pids():
            if pid not in self._told:
                self._told.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _look_after(self) -> None:
        """End ranks that hang, and name the slow ones."""
        if self._is_stalled:
            return  # they are being ended
        beats = read_beats(self._pulse)
        if self._lost_at and len(beats) == self._placement.processes and all(beat.step >= 0 for beat in beats):
            took = time.monotonic() - self._lost_at
            self._notes.note("ranks.recovered", f"training again after {took:.1f} s", seconds=round(took, 1))
            self._lost_at = 0.0
        stalled = supervise.find_stalled(beats, self._placement.stall_s)
        if stalled:
            who = "; ".join(map(supervise.describe, stalled))
            files = supervise.dump_stacks(self._pulse, beats, self._notes.stacks)
            text = f"no progress: {who}; stacks in {self._notes.stacks}; ending them"
            self._notes.note("ranks.stalled", text, ranks=[b.rank for b in stalled], stacks=[f.name for f in files])
            self._lost_at, self._is_stalled = time.monotonic(), True
            supervise.kill(self.pids())
        for beat, times in supervise.find_stragglers(beats):
            if beat.rank not in self._slow:
                self._slow.add(beat.rank)
                text = f"rank {beat.rank} is slow: the others wait for it, {times:.1f} times the usual time per step"
                self._notes.note("rank.slow", text, rank=beat.rank, times_median=round(times, 2))

    def _decide(self, codes: dict[int, int]) -> None:
        """After the first rank has ended with an error: start again, or end with which code?"""
        found = list(codes.values())
        known = next((code for code in found if code in OURS + STOPPED), None)
        if known is None and all(map(_is_signalled, found)):
            # Asked to stop, by the launcher or past it, before Python could take the signal: nothing was trained yet.
            known = 130 if signal.SIGINT in (self.asked, *(-code for code in found)) else 75
        if self.asked and known in STOPPED:
            known = 130 if self.asked == signal.SIGINT else 75
        if known is not None:
            self.code, self._remaining_restarts = known, 0
            return
        self._lost_at = self._lost_at or time.monotonic()
        oom_kills, before = count_oom_kills() or 0, self._oom_kills
        self._oom_kills = oom_kills
        newest = self._notes.newest_step()
        if newest > self._newest:
            self._newest, self._remaining_restarts = newest, self._placement.restarts
        left = self._remaining_restarts
        causes = "; ".join(f"rank {r} {supervise.cause_of(c, oom_kills=oom_kills - before)}" for r, c in codes.items())
        causes = "ended for want of progress" if self._is_stalled else causes
        then = f"starting again from the last checkpoint, {left} restarts left" if left else "giving up"
        self._notes.note("ranks.lost", f"{causes}; {then}", exit_codes={str(r): c for r, c in codes.items()})

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        supervise.forget(self._pulse)
        self._told.clear()
        self._failed = {}
        self._is_stalled = False
        self._slow.clear()
        return super()._start_workers(worker_group)


def _is_signalled(code: int) -> bool:
    """Was a process ended by a signal that asks for a stop, before or after Python could take it?"""
    return -code in SIGNALS or code - 128 in SIGNALS
