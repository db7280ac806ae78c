"""Do all ranks mean the same run, and have the same weights? And what the exactness class of a run promises.

At the start ranks compare what they were given (docs/faults.md, A16), on the way their weights (C11), bit by bit,
whatever the exactness class.

Why `ordered` is the default although the tree of `exact` costs a few percent on a CPU (benchmarks/README.md): `exact`
needs a micro-batch, which a user has to choose for the device and which is most of its price where it is small; it
computes with one thread per process on a CPU, so one process of many cores would idle; and its reduction begins after
the last backward pass, which no GPU has measured yet. Whoever is interrupted and comes back on other machines, and
wants the weights an undisturbed run would have had, asks for it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DivergedError, LaunchError, LmkError
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.console import print_status

log = logging.getLogger(__name__)

Exactness = Literal["exact", "ordered", "none"]

MEANING: dict[Exactness | Literal["per_world"], str] = {
    "exact": "same bits at any number of processes, on one kind of device",
    "ordered": "same samples and noise at any number of processes, bits up to the order of sums",
    "none": "as ordered, and kernels are chosen by speed, so that a repeated run may differ too",
    "per_world": "images computed together influence one another, so another number of processes is another run",
}


@torch.no_grad()
def checksum(model: nn.Module) -> Tensor:
    """64 bits over the bits of all parameters, int64 on their device; a single flipped bit changes them.

    Element i of the list of parameters is added with the odd factor 2 i + 1, so that exchanged parameters differ too.
    """
    # Integer sums: exact in any order, and a not-a-number is a pattern like any other.
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()]
    factors = torch.arange(len(sums), device=sums[0].device) * 2 + 1
    return (torch.stack(sums) * factors).sum()


def check_same_facts(mine: Mapping[str, str], parallel: Parallel) -> None:
    """Raise `LaunchError` on all ranks, naming the first odd one and what it has, unless all have the same facts."""
    everybody = parallel.gather(dict(mine))
    for key in mine:
        values = [facts[key] for facts in everybody]
        # The majority is taken for right; of two that differ, the first.
        common = max(values, key=values.count)
        odd = next((rank for rank, value in enumerate(values) if value != common), None)
        if odd is not None:
            raise _shared(
                LaunchError(
                    f"rank {odd} has another {key} than most: {values[odd]}, wanted {common}; "
                    "give all nodes the same installation, run file, data and checkpoints, and start again"
                )
            )


def check_same_weights(model: nn.Module, parallel: Parallel, *, step: int) -> None:
    """Raise `DivergedError` on all ranks, naming the odd ones, unless all have the same weights, bit by bit."""
    if parallel.world == 1:
        return
    sums = parallel.gather(checksum(model).item())
    common = max(sums, key=sums.count)
    odd = [rank for rank, value in enumerate(sums) if value != common]
    if not odd:
        return
    names = ", ".join(map(str, odd))
    who = f"rank {names} differ from the others" if sums.count(common) > 1 else "all ranks differ from each other"
    raise _shared(
        DivergedError(
            f"the weights of {who} after step {step}, though all made the same updates; "
            "nothing of it is saved; suspect the memory or the GPU of that rank, the same command continues from the "
            "last checkpoint"
        )
    )


def _shared(error: LmkError) -> LmkError:
    """An error that all ranks raise: one of them is enough to tell it."""
    error.is_shared = True
    return error


def class_kept(cfg: RunConfig, devices: Sequence[str]) -> Exactness | Literal["per_world"]:
    """The class that this run can keep on these kinds of devices: two add in different orders (docs/faults.md, A13)."""
    exactness = cfg.train.exactness
    if cfg.model.couples_images and exactness != "none":
        return "per_world"
    return "ordered" if exactness == "exact" and len(set(devices)) > 1 else exactness


def check_devices(parallel: Parallel, before: Sequence[str], *, is_strict: bool = False) -> list[str]:
    """The kinds of devices of this run: those of its sessions `before`, and of all ranks now; the same on all ranks.

    Raises:
        LaunchError: on all ranks, where they are several and `is_strict`.
    """
    now = parallel.gather(parallel.device_name)
    kinds = sorted({*before, *now})
    if len(kinds) == 1:
        return kinds
    odd = next((rank for rank, name in enumerate(now) if name != now[0]), None)
    where = f"rank {odd} has {now[odd]}, rank 0 {now[0]}" if odd is not None else f"now {now[0]}"
    mixture = f"several kinds of devices in one run ({', '.join(kinds)}; {where})"
    if is_strict:
        raise _shared(LaunchError(f"{mixture}, and --strict wants one; use nodes of one kind, or leave --strict out"))
    if parallel.is_main:
        log.warning("%s: the same bits are promised on one kind only", mixture)
    return kinds


def announce_class(cfg: RunConfig, *, step: int, parallel: Parallel, run: RunDir) -> None:
    """Tell the class of a run at its start, on the terminal and in its events; a mixture of devices weakens it."""
    if not parallel.is_main:
        return
    # A toy run, or one begun by an older version, has noted none.
    devices = run.facts().get("devices") or [parallel.device_name]
    kept = class_kept(cfg, devices)
    run.event("train.started", step=step, exactness=kept, processes=parallel.world, zero=parallel.zero, devices=devices)
    print_status(f"exactness={kept} ({MEANING[kept]})")


@contextmanager
def kernels(exactness: Exactness, device: torch.device) -> Iterator[None]:
    """Choose kernels as the class demands while the block lasts.

    `exact`: deterministic ones, full fp32, and on the CPU one thread per process, because the launcher gives a process
    more threads where there are fewer processes, and a convolution adds in another order on another number of threads.
    `none`: the fastest convolution is tried out (cudnn.benchmark), and matrix products may round to TF32.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    was_strict, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    memory: Any = torch.utils.deterministic
    did_fill = memory.fill_uninitialized_memory
    if exactness == "exact":
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing here reads memory it did not write
        if device.type == "cpu":
            torch.set_num_threads(1)
    elif exactness == "none":
        # cudnn.allow_tf32 is PyTorch's default already.
        cudnn.benchmark, matmul.allow_tf32 = True, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(was_strict)
        memory.fill_uninitialized_memory = did_fill
        torch.set_num_threads(threads)
