"""How many processes a run uses, on which device and nodes, and how they are looked after."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ddpm_lmk.config import Section
from ddpm_lmk.config.load import load_yaml, validate
from ddpm_lmk.errors import ConfigError, LaunchError
from ddpm_lmk.system.machine import THREADS, threads_per_process
from ddpm_lmk.system.signals import DEFAULT_GRACE_S, grace_s

Device = Literal["cpu", "cuda"]

RESTARTS = 3  # a fault that repeats is no accident
STALL_S = 60.0  # a decoder that hangs is given up within 40 s (docs/faults.md, B27)
RENDEZVOUS_S = 300


class LaunchFile(Section):
    """A launch file: where a run happens, never what it does."""

    device: Device = Field(description="cpu (gloo) or cuda (NCCL)")
    processes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="processes on each node")
    nodes: Annotated[int, Field(ge=1)] = Field(1, description="nodes; more than one needs --node-rank and --rdzv")
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="DeepSpeed ZeRO: 0 none, 1 shares out the optimizer's state, 2 its gradients too"
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        RESTARTS, description="restarts after lost or stalled processes without a new checkpoint in between"
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        STALL_S, description="seconds without a step after which processes count as stalled; at least 10 median steps"
    )
    grace_s: Annotated[float, Field(ge=5)] = Field(
        DEFAULT_GRACE_S, description="seconds from a signal to the end of the last process"
    )
    rendezvous_s: Annotated[int, Field(ge=5)] = Field(
        RENDEZVOUS_S, description="seconds that nodes wait for one another"
    )

    @field_validator("zero")
    @classmethod
    def _leaves_weights_whole(cls, stage: int) -> int:
        if stage == 3:
            raise ValueError(
                "zero: 3 leaves empty shards in place of weights, so that no moving average of them can be kept; use 2"
            )
        return stage


@dataclass(frozen=True)
class Placement:
    """Where one launch happens, and its limits: a launch file, and which of the nodes this is (see `LaunchFile`)."""

    device: Device
    processes: int
    nodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None
    restarts: int = RESTARTS
    stall_s: float = STALL_S
    grace_s: float = DEFAULT_GRACE_S
    rendezvous_s: int = RENDEZVOUS_S
    zero: int = 0

    def __str__(self) -> str:
        one, several = ("GPU", "GPUs") if self.device == "cuda" else ("CPU process", "CPU processes")
        count = f"{self.processes} {one if self.processes == 1 else several}"
        count += f", ZeRO-{self.zero}" if self.zero else ""
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
    """Decide where a run happens: command line, else launch file, else one GPU if there is one, else one CPU process.

    Raises:
        ConfigError: settings that contradict one another.
        LaunchError: fewer GPUs are visible than asked for.
    """
    if gpus is not None and cpu is not None:
        raise ConfigError("--gpus and --cpu contradict one another; give one of them")
    settings: dict[str, Any] = {"grace_s": grace_s()}
    if launch_file is not None:
        settings |= read_launch_file(launch_file).model_dump(exclude_unset=True)
    if gpus is not None:
        settings |= {"device": "cuda", "processes": gpus}
    elif cpu is not None:
        settings |= {"device": "cpu", "processes": cpu}
    elif launch_file is None:
        settings["device"] = "cuda" if visible_gpus() else "cpu"
    if nodes is not None:
        settings["nodes"] = nodes
    placement = Placement(**{"processes": 1} | settings, node_rank=node_rank, rdzv=rdzv)
    check_placement(placement)
    return placement


def read_launch_file(path: Path) -> LaunchFile:
    """Read and check a launch file; raises `ConfigError`."""
    return validate(LaunchFile, load_yaml(path), source=str(path))


def check_placement(placement: Placement) -> None:
    """Refuse what cannot be started here; raises `ConfigError` and `LaunchError` as `place` does."""
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


def visible_gpus() -> int:
    """CUDA devices this process may use."""
    from ddpm_lmk.system import accelerator

    return len(accelerator.devices())


def split_address(rdzv: str) -> tuple[str, int]:
    """Host and port of `--rdzv`; raises `ConfigError`."""
    host, _, port = rdzv.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv {rdzv!r}; wanted HOST:PORT of the first node, e.g. node0:29400")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Does this name stand for the machine itself?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def worker_environment(device: Device, slot: int, count: int, *, devices: int) -> dict[str, str]:
    """Environment of the worker `slot` of `count`: a share of the cores, and one of `devices` visible GPUs in turn."""
    environment = os.environ | {THREADS: str(threads_per_process(count))}
    if device == "cuda":
        visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % devices % len(visible)] if visible else str(slot % devices)
    return environment
