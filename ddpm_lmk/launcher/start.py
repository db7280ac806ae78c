"""Starting the processes of a run on this node, and waiting for them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import LaunchError, NoProgressError, StoppedError
from ddpm_lmk.launcher import supervise
from ddpm_lmk.launcher.placement import Placement, check_placement, is_loopback, split_address
from ddpm_lmk.rundir import lock
from ddpm_lmk.system import environment, heartbeat, machine, signals

if TYPE_CHECKING:
    from ddpm_lmk.launcher.restarts import Agent


def launch(job: dict[str, Any], placement: Placement) -> int:
    """Run a job ({"config": resolved run, "out": directory, ...}) and return its exit code.

    In one process errors are raised here; of several, the first rank that failed gives the code.

    Raises:
        RunConflictError, ResourceError: the directory is in use, another run, or cannot be written.
        NoProgressError: ranks were lost too often without a new checkpoint in between.
    """
    check_placement(placement)
    job = {**job, "device": placement.device, "zero": placement.zero}
    out = Path(job["out"])
    with signals.leaving_at_once(), _environment({signals.GRACE: str(placement.grace_s)}):
        if placement.processes == 1 and placement.nodes == 1:
            with supervise.supervised(out, placement.stall_s):
                from ddpm_lmk import run  # imports torch, which ranks do in processes of their own

                return run.run_job(job)
        if placement.node_rank != 0:
            return _run_apart(job, placement, out)
        # Taken for the whole launch: between two starts of the ranks nobody else may take the directory.
        cfg, is_fork = RunConfig.model_validate(job["config"]), bool(job.get("fork"))
        with lock.locked_for_launcher(out, cfg, name=lock.LAUNCHER_LOCK, is_fork=is_fork):
            return _run_apart(job, placement, out)


def _run_apart(job: dict[str, Any], placement: Placement, out: Path) -> int:
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        return run_ranks(["-m", "ddpm_lmk.launcher.rank", str(path)], placement, out=out, room=Path(folder))


def run_ranks(arguments: list[str], placement: Placement, *, out: Path | None = None, room: Path | None = None) -> int:
    """Start `python ARGUMENTS` once per rank of this node through torchelastic and wait; returns the exit code.

    A rank that dies takes the others with it, and all are started again, unless it ended with a code of ours. Ctrl-C
    gives 130, SIGTERM, SIGUSR1 and SIGHUP give 75, after the ranks were asked to stop and had time to save.

    Args:
        room: folder for what launcher and ranks tell one another; gone at the end, however it comes.

    Raises:
        NoProgressError: `placement.restarts` restarts in a row brought no new checkpoint in `out`.
        LaunchError: the nodes do not find one another. StoppedError: they have lost one another.
    """
    for line in environment.stand_alone():
        signals.print_status(f"note: {line}")
    agents: list[Agent] = []  # one, as soon as it is there: signals may come before
    folder = room or Path(tempfile.mkdtemp(prefix="ddpm-lmk-"))

    def kill_ranks() -> None:
        supervise.kill([pid for agent in agents for pid in agent.pids()])
        shutil.rmtree(folder, ignore_errors=True)

    def ask_to_stop(number: int) -> None:
        if agents and agents[0].is_running:
            agents[0].stop_signal = number
            signals.print_status(f"launcher: {signal.Signals(number).name}, the ranks save and leave")
            return
        kill_ranks()  # nothing is trained between two starts, so there is nothing to save
        signals.leave_at_once(number)

    limits: dict[str, Any] = {"before_leaving": kill_ranks, "within_s": placement.grace_s, "raises": False}
    try:
        with (
            signals.StopRequest(on_first=ask_to_stop, **limits),
            _environment(_rank_environment(placement, folder)),
            _silent_torchelastic(),
        ):
            return _run_agent(arguments, placement, folder, out, agents)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_agent(arguments: list[str], placement: Placement, folder: Path, out: Path | None, agents: list[Agent]) -> int:
    """From the rendezvous to the end; the agent is put into `agents` as soon as there is one."""
    from torch.distributed.elastic import rendezvous
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from ddpm_lmk.launcher.restarts import Agent

    handler = None
    try:
        handler = _rendezvous(placement)
        spec = WorkerSpec(
            role="ddpm-lmk",
            local_world_size=placement.processes,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=tuple(arguments),
            max_restarts=placement.restarts,
            monitor_interval=0.1,
            local_addr=_local_address(placement),
        )
        agent = Agent(spec, placement, folder, supervise.LaunchLog(out, node_rank=placement.node_rank))
        agents.append(agent)
        agent.run()
    except rendezvous.RendezvousClosedError:
        raise StoppedError("another node has ended this run and says why; the same command continues") from None
    except rendezvous.RendezvousError as error:
        kind = StoppedError if agents else LaunchError
        raise kind(
            f"no contact with {placement.nodes} nodes at {placement.rdzv} within {placement.rendezvous_s} s "
            f"({type(error).__name__}); start the same command on every node, the run continues"
        ) from None
    finally:
        if handler is not None:
            handler.shutdown()
    if agent.code is None:
        raise NoProgressError(
            f"{placement.restarts} restarts brought no new checkpoint; see the lines above, and do not start it again "
            "before the cause is found"
        )
    return agent.code


def _rendezvous(placement: Placement) -> Any:
    """The meeting of all nodes; the first one hosts it."""
    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    if placement.rdzv is not None and placement.node_rank == 0:
        check_port(placement.rdzv)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=placement.rdzv or "127.0.0.1:0",
        run_id=uuid.uuid4().hex if placement.rdzv is None else f"ddpm-lmk-{placement.rdzv}",
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        local_addr=_local_address(placement),
        is_host=placement.node_rank == 0,
        join_timeout=placement.rendezvous_s,
        read_timeout=placement.rendezvous_s,
    )
    return registry.get_rendezvous_handler(parameters)


def check_port(rdzv: str) -> None:
    """The first node listens on the port of `--rdzv`, so it must be free; raises `LaunchError`."""
    _, port = split_address(rdzv)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(f"port {port} of --rdzv {rdzv} cannot be used ({error.strerror}); take another") from None


def _local_address(placement: Placement) -> str | None:
    """Loopback where all nodes are this machine, whose own name need then not be known to anybody."""
    is_alone = placement.rdzv is None or is_loopback(split_address(placement.rdzv)[0])
    return "127.0.0.1" if is_alone else None


def _rank_environment(placement: Placement, folder: Path) -> dict[str, str]:
    """Variables of the ranks: ours whatever the user's say, those of torch where the user says nothing."""
    ours = {environment.PARENT: str(os.getpid()), heartbeat.FOLDER: str(folder), signals.GRACE: str(placement.grace_s)}
    ours[machine.THREADS] = str(machine.threads_per_process(placement.processes))
    defaults = {
        # Restarted ranks would read the addresses of the dead ones from the shared store (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # `StopRequest` handles them
    }
    return ours | {name: value for name, value in defaults.items() if name not in os.environ}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the time of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _silent_torchelastic() -> Iterator[None]:
    """Keep torchelastic's log from the user: the ranks and the agent say what went wrong."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
