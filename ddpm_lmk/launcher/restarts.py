"""The agent of one node: torchelastic's, with our rules for restarts, stalls and signals.

torchelastic brings the nodes together, starts the ranks and notices when one ends. Added here: ranks are not started
again after an error of ours or a stop, nor too often without a new checkpoint; ranks without progress are ended; ranks
whose neighbour is lost are not waited for; signals are passed on. Imports torch; import it late.
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
from ddpm_lmk.launcher.supervise import LaunchLog
from ddpm_lmk.system.heartbeat import read_heartbeats
from ddpm_lmk.system.machine import count_oom_kills
from ddpm_lmk.system.processes import exit_code
from ddpm_lmk.system.signals import STOP_SIGNALS, exit_code_of

ERRORS = (2, 3, 4, 5, 6, 7, 8)  # exit codes of `errors` that another attempt would meet again
STOPS = (75, 76, 130)
JOIN_S = 10  # for the other ranks to end by themselves after the first has


class Agent(LocalElasticAgent):
    """Looks after the ranks of this node.

    Attributes:
        code: exit code of the run, once it has ended; None where too many restarts made no progress.
        stop_signal: the signal that asked for a stop, or 0.
    """

    def __init__(self, spec: WorkerSpec, placement: Placement, heartbeats: Path, log: LaunchLog) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=str(heartbeats)), shutdown_timeout=JOIN_S)
        self.code: int | None = None
        self.stop_signal = 0
        self._placement, self._heartbeats, self._log = placement, heartbeats, log
        self._newest = log.newest_step()
        self._oom_kills = count_oom_kills() or 0
        self._lost_at = 0.0
        self._forget_ranks()

    def _forget_ranks(self) -> None:
        """Begin anew with what is known of single ranks."""
        supervise.remove_records(self._heartbeats)
        self._signalled: set[int] = set()
        self._slow: set[int] = set()
        self._failed: dict[int, int] = {}  # exit codes of the first ranks that ended with an error
        self._failed_at = 0.0
        self._is_stalled = False

    @property
    def is_running(self) -> bool:
        """Are there ranks that can be asked to stop?"""
        return self._worker_group.state == WorkerState.HEALTHY

    def pids(self) -> list[int]:
        """Process numbers of the ranks of this node."""
        return [int(worker.id) for worker in self._worker_group.workers if worker.id]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._forget_ranks()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called ten times a second."""
        self._pass_on_stop()
        failed = {rank: code for rank, code in self._exit_codes().items() if code != 0}
        if failed and not self._failed:
            self._failed, self._failed_at = failed, time.monotonic()
        if self._failed and not self._have_ended():
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            self._supervise()
        elif result.state == WorkerState.SUCCEEDED:
            self.code = 0
        else:
            # One that failed since the check above was seen by torchelastic, which then ended the others itself: only
            # the first of these codes says why.
            codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self._decide(self._failed or dict(list(codes.items())[:1]))
        return result

    def _exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, without collecting them before torchelastic does."""
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        handlers = context.subprocess_handlers
        codes = {w.global_rank: exit_code(handlers[w.local_rank].proc) for w in self._worker_group.workers}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _have_ended(self) -> bool:
        """Have all ranks ended? After an error of ours or a stop they do by themselves; after a loss they never would,
        because they wait for the rank that is gone.
        """
        if len(self._exit_codes()) == len(self._worker_group.workers):
            return True
        if _known(self._failed) is None or time.monotonic() - self._failed_at > JOIN_S:
            supervise.kill(self.pids())
        return False

    def _pass_on_stop(self) -> None:
        if not self.stop_signal:
            return
        number = signal.SIGINT if self.stop_signal == signal.SIGINT else signal.SIGTERM
        for pid in set(self.pids()) - self._signalled:
            self._signalled.add(pid)  # once: a second request means "at once"
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _supervise(self) -> None:
        """End ranks that hang, and name the slow ones."""
        if self._is_stalled:
            return  # they are being ended
        ranks = read_heartbeats(self._heartbeats)
        if self._lost_at and len(ranks) == self._placement.processes and all(last.step >= 0 for last in ranks):
            seconds = time.monotonic() - self._lost_at
            self._log.write("ranks.recovered", f"training again after {seconds:.1f} s", seconds=round(seconds, 1))
            self._lost_at = 0.0
        if stalled := supervise.find_stalled(ranks, self._placement.stall_s):
            who = "; ".join(map(supervise.describe, stalled))
            stacks = supervise.dump_stacks(self._heartbeats, ranks, self._log.stacks)
            text = f"no progress: {who}; stacks in {self._log.stacks}; ending them"
            names = [file.name for file in stacks]
            self._log.write("ranks.stalled", text, ranks=[last.rank for last in stalled], stacks=names)
            self._lost_at, self._is_stalled = time.monotonic(), True
            supervise.kill(self.pids())
        for last, times in supervise.find_stragglers(ranks):
            if last.rank not in self._slow:
                self._slow.add(last.rank)
                text = f"rank {last.rank} is slow: the others wait for it, {times:.1f} times the usual time per step"
                self._log.write("rank.slow", text, rank=last.rank, times_median=round(times, 2))

    def _decide(self, codes: dict[int, int]) -> None:
        """After the first rank has ended with an error: start again, or end with which code?"""
        known = _known(codes)
        if known is None and all(-code in STOP_SIGNALS or code - 128 in STOP_SIGNALS for code in codes.values()):
            # Asked to stop, by the launcher or past it, before Python could take the signal: nothing was trained yet.
            is_interrupted = signal.SIGINT in (self.stop_signal, *(-code for code in codes.values()))
            known = exit_code_of(signal.SIGINT if is_interrupted else signal.SIGTERM)
        if self.stop_signal and known in STOPS:
            known = exit_code_of(self.stop_signal)
        if known is not None:
            self.code, self._remaining_restarts = known, 0
            return
        self._lost_at = self._lost_at or time.monotonic()
        before, self._oom_kills = self._oom_kills, count_oom_kills() or 0
        newest = self._log.newest_step()
        if newest > self._newest:
            self._newest, self._remaining_restarts = newest, self._placement.restarts
        left, oom_kills = self._remaining_restarts, self._oom_kills - before
        causes = "; ".join(f"rank {r} {supervise.cause_of(c, oom_kills=oom_kills)}" for r, c in codes.items())
        causes = "ended for want of progress" if self._is_stalled else causes
        then = f"starting again from the last checkpoint, {left} restarts left" if left else "giving up"
        self._log.write("ranks.lost", f"{causes}; {then}", exit_codes={str(r): c for r, c in codes.items()})


def _known(codes: dict[int, int]) -> int | None:
    """The exit code among these that says that another start would not help, or was not asked for."""
    return next((code for code in codes.values() if code in ERRORS + STOPS), None)
