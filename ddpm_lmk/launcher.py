"""How many processes a run uses, on which device, and starting them.

One process runs here, in this interpreter. Several are started by torchelastic, each `python -m ddpm_lmk.runs
JOB.json` with RANK and WORLD_SIZE in its environment; `accelerate launch --cpu` is not used, since it starts one
process, silently. What a run learns is in its run file; the two share no key. Torch is imported when it is needed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ddpm_lmk.config import Section
from ddpm_lmk.errors import ConfigError, LaunchError, StoppedError
from ddpm_lmk.runfile import load_yaml, validate

Device = Literal["cpu", "cuda"]
INTERRUPTED = 130
ELASTIC_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class LaunchFile(Section):
    """A launch file: where a run happens, never what it does."""

    device: Device = Field(description="cpu (gloo) or cuda (NCCL)")
    processes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="processes on each node")
    nodes: Annotated[int, Field(ge=1)] = Field(1, description="nodes; more than one needs --node-rank and --rdzv")


@dataclass(frozen=True)
class Placement:
    """Processes per node, nodes and device of one launch."""

    device: Device
    processes: int
    nodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None

    def __str__(self) -> str:
        where = "GPU" if self.device == "cuda" else "CPU process"
        count = f"{self.processes} {where}" + ("es" if where.endswith("s") else "s") * (self.processes > 1)
        return count if self.nodes == 1 else f"{count} on each of {self.nodes} nodes"


def place(
    *,
    gpus: int | None = None,
    cpu: int | None = None,
    nodes: int | None = None,
    node_rank: int = 0,
    rdzv: str | None = None,
    launch_file: Path | None = None,
) -> Placement:
    """Decide the placement: command line, else launch file, else one GPU if there is one, else one CPU process.

    Raises:
        ConfigError: settings that contradict one another.
        LaunchError: fewer GPUs are visible than asked for.
    """
    if gpus is not None and cpu is not None:
        raise ConfigError("--gpus and --cpu contradict one another; give one of them")
    file = None
    if launch_file is not None:
        file = validate(LaunchFile, load_yaml(launch_file), source=str(launch_file))
    if gpus is not None or cpu is not None:
        device: Device = "cpu" if gpus is None else "cuda"
        processes = (gpus if gpus is not None else cpu) or 0
    elif file is not None:
        device, processes = file.device, file.processes
    else:
        device, processes = ("cuda" if visible_gpus() else "cpu"), 1
    placement = Placement(device, processes, nodes or (file.nodes if file else 1), node_rank, rdzv)
    _check(placement)
    return placement


def visible_gpus() -> int:
    """CUDA devices this process may use."""
    import torch

    return torch.cuda.device_count()


def launch(
    job: dict[str, Any],
    *,
    processes: int,
    device: Device,
    nodes: int = 1,
    node_rank: int = 0,
    rdzv: str | None = None,
) -> int:
    """Run a job ({"config": resolved run, "out": directory, ...}) and return its exit code.

    In one process errors are raised here; of several, the first rank that failed gives the code.
    """
    placement = Placement(device, processes, nodes, node_rank, rdzv)
    _check(placement)
    if processes == 1 and nodes == 1:
        return _run_here({**job, "device": device})
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({**job, "device": device}))
        return run_ranks(["-m", "ddpm_lmk.runs", str(path)], placement)


def run_ranks(arguments: list[str], placement: Placement) -> int:
    """Start `python ARGUMENTS` once per rank of this node through torchelastic and wait; returns the exit code.

    A rank that dies takes the others with it. Ctrl-C gives 130 and SIGTERM 75, after the ranks were told and had time
    to save.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with _environment(placement):
        try:
            elastic_launch(_launch_config(placement), sys.executable)(*arguments)
        except ChildFailedError as error:
            return _exit_code([failure.exitcode for failure in error.failures.values()])
        except SignalException as stop:
            return INTERRUPTED if stop.sigval == signal.SIGINT else StoppedError.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


def _check(placement: Placement) -> None:
    if placement.processes < 1 or placement.nodes < 1:
        raise ConfigError(f"wanted at least 1 process on 1 node, found {placement.processes} on {placement.nodes}")
    if placement.nodes > 1 and placement.rdzv is None:
        raise ConfigError(f"--nodes {placement.nodes} needs --rdzv HOST:PORT of the first node, the same on every node")
    if not 0 <= placement.node_rank < placement.nodes:
        raise ConfigError(
            f"--node-rank {placement.node_rank} must be in 0..{placement.nodes - 1} for {placement.nodes} nodes"
        )
    if placement.device == "cuda" and visible_gpus() < placement.processes:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise LaunchError(
            f"asked for {placement.processes} GPUs, visible {visible_gpus()} (CUDA_VISIBLE_DEVICES: {visible}); "
            f"ask for fewer, use --cpu N to run on the CPU, or see `ddpm-lmk doctor`"
        )


def _run_here(job: dict[str, Any]) -> int:
    from ddpm_lmk import runs

    return runs.run_job(job)


def _launch_config(placement: Placement) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    shared = placement.rdzv is not None
    if placement.rdzv is not None and placement.node_rank == 0:
        _check_port(placement.rdzv)
    return LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.processes,
        run_id=f"ddpm-lmk-{placement.rdzv}" if shared else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=placement.rdzv or "127.0.0.1:0",
        rdzv_configs={"is_host": placement.node_rank == 0, "timeout": 300},
        local_addr=None if shared else "127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )


def _check_port(rdzv: str) -> None:
    """The first node listens on the port of `--rdzv`, so it must be free."""
    host, _, port = rdzv.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv {rdzv!r}; wanted HOST:PORT of the first node, e.g. node0:29400")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise LaunchError(f"port {port} of --rdzv {rdzv} cannot be used ({error.strerror}); take another") from None


@contextmanager
def _environment(placement: Placement) -> Iterator[None]:
    """Environment of the ranks; torchelastic's log is kept to itself (the ranks say what went wrong), and the signal
    handlers it leaves behind are taken down again.
    """
    wanted = {
        # Restarted ranks would read the addresses of the dead ones from the shared store (pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // placement.processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else DDP remarks at every start that no parameter is unused
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    disabled = logging.root.manager.disable
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ELASTIC_SIGNALS} if is_main else {}
    os.environ.update(added)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for name in added:
            del os.environ[name]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_code(codes: list[int]) -> int:
    """One exit code of several ranks: a code of ours before a kill, since a rank that fails gets the others killed."""
    ours = [code for code in codes if code > 0]
    return ours[0] if ours else 128 - min(codes, default=-1)
