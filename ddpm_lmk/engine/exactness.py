"""The exactness classes: what of a run is promised to be the same, and what torch has to be told for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.rundir import RunDir

Exactness = Literal["exact", "ordered", "none"]

MEANING: dict[Exactness, str] = {
    "exact": "same bits at any number of processes, on one kind of device",
    "ordered": "same samples and noise at any number of processes, bits up to the order of sums",
    "none": "as ordered, and kernels are chosen by speed, so that a repeated run may differ too",
}


def say_class(exactness: Exactness, *, step: int, parallel: Parallel, run: RunDir) -> None:
    """Tell the class of a run at its start, on the terminal and in its events."""
    run.event("train.started", step=step, exactness=exactness, processes=parallel.world, zero=parallel.zero)
    if parallel.is_main:
        sys.stderr.write(f"exactness={exactness} ({MEANING[exactness]})\n")


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
        cudnn.benchmark, matmul.allow_tf32 = True, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(was_strict)
        memory.fill_uninitialized_memory = did_fill
        torch.set_num_threads(threads)
