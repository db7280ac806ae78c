"""What an environment says of processes; only what our own launcher wrote there counts.

A scheduler, an outer torchrun or mpirun, or an `accelerate launch` leave variables behind that torch, Accelerate and
DeepSpeed obey: a single process waits for a group that nobody else joins, or takes settings of another program. How
many processes a run has is said by its command. So these variables are taken out where a process begins
(`stand_alone`), and one that was started as a copy among several refuses to train (`check_copies`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ddpm_lmk.errors import LaunchError
from ddpm_lmk.system import cores

PARENT = "DDPM_LMK_PARENT"  # process number of our launcher, for the ranks that it starts
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
    """Take out of the environment what other launchers say; returns what the user should know, a line each.

    Ranks of our launcher keep theirs. Their launcher has been through this before it started them.
    """
    if is_rank():
        return []
    found = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith(PREFIXES)}
    told = []
    wish, granted = os.environ.get(cores.THREADS), cores.granted_cores()
    if wish is not None and not 1 <= (cores.wished_threads() or 0) <= granted:
        found[cores.THREADS] = wish
        told.append(f"{cores.THREADS}={wish!r} is not used: this process was granted {granted} cores")
    os.environ.pop(PARENT, None)
    for name in found:
        del os.environ[name]
    _inherited.clear()
    _inherited.update(found)
    steering = [f"{name}={found[name]}" for _, name, _ in STARTERS if _count(found, name) > 1]
    steering += [f"{name}={value}" for name, value in sorted(found.items()) if name.startswith("ACCELERATE_USE_")]
    if steering:
        told.append(f"{', '.join(steering)} of another launcher is not used: the command line says how many processes")
    return told


def check_copies(nodes: int) -> None:
    """Raise `LaunchError` where this process is one of several copies of the command, and not one per node of its run.

    The first copy may be the only one: a shell of a scheduler carries the same variables. Under torchrun there are
    always several.
    """
    whole = {**os.environ, **_inherited}
    for starter, size, rank in STARTERS:
        copies, number = _count(whole, size), whole.get(rank, "?")
        is_torchrun = size == "WORLD_SIZE" and "TORCHELASTIC_RUN_ID" in whole
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
