"""Environment variables of other launchers, which must not steer a run.

A scheduler, an outer torchrun or mpirun, or an `accelerate launch` leave variables behind that torch, Accelerate and
DeepSpeed obey: a single process waits for a process group that nobody else joins, or takes settings of another program.
The command alone says how many processes a run has. So these variables are taken out where a process begins
(`stand_alone`), and one of several copies of a command refuses to train (`check_copies`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system import machine

PARENT = "DDPM_LMK_PARENT"  # process number of our launcher, in the environment of its ranks
NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "FORK_LAUNCHED", "DS_ACCELERATOR"),
}
PREFIXES = (
    *("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_COMM_"),
    *("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
)
# Who starts copies of a command, the number of copies, and which of them this one is.
STARTERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
)
_inherited: dict[str, str] = {}  # what was taken out of the environment of this process


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Was this process started by our launcher as one of several?"""
    return environment.get(PARENT) == str(os.getppid())


def stand_alone() -> list[str]:
    """Take the variables of other launchers out of the environment; returns remarks for the user, a line each."""
    if is_rank():
        return []  # its variables are ours: the launcher has been through this before it started its ranks
    foreign = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith(PREFIXES)}
    remarks = []
    wish, granted = os.environ.get(machine.THREADS), machine.granted_cores()
    if wish is not None and not 1 <= (machine.wished_threads() or 0) <= granted:
        foreign[machine.THREADS] = wish
        remarks.append(f"{machine.THREADS}={wish!r} is not used: this process was granted {granted} cores")
    os.environ.pop(PARENT, None)
    for name in foreign:
        del os.environ[name]
    _inherited.clear()
    _inherited.update(foreign)
    steering = [f"{name}={foreign[name]}" for _, name, _ in STARTERS if _count(foreign, name) > 1]
    steering += [f"{name}={value}" for name, value in sorted(foreign.items()) if name.startswith("ACCELERATE_USE_")]
    if steering:
        names = ", ".join(steering)
        remarks.append(f"{names} of another launcher is not used: the command line says how many processes")
    return remarks


def check_copies(nodes: int) -> None:
    """Raise `LaunchError` where this process is one of more copies of the command than its run has nodes."""
    whole = {**os.environ, **_inherited}
    for starter, size, rank in STARTERS:
        copies, number = _count(whole, size), whole.get(rank, "?")
        is_torchrun = size == "WORLD_SIZE" and "TORCHELASTIC_RUN_ID" in whole
        # Number 0 may be the only one: a shell of a scheduler carries the same variables. Not under torchrun.
        if copies > nodes and (is_torchrun or _count(whole, rank) > 0):
            name = starter if size != "WORLD_SIZE" or is_torchrun else "another launcher"
            raise LaunchError(
                f"this is one of {copies} copies that {name} started ({size}={whole[size]}, {rank}={number}); start "
                "ddpm-lmk once: it starts its own processes (--gpus N, --cpu N; --nodes M for one copy per node); "
                f"where these variables are left over, unset {size} and {rank}"
            )


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "").strip()
    return int(value) if value.isascii() and value.isdigit() else 0
