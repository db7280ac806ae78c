"""A process that trains the toy, alone or as a rank, forked by `tests.faults.forge`.

It runs the jobs of the file one after the other and writes what it saw and ended with beside each run directory. A job
can be told to die (`kill_at`: SIGKILL to itself), and to work under a limit on file sizes that is lifted later.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import GlobalBatch
from ddpm_lmk.engine import bucket_reduce
from ddpm_lmk.engine.loop import fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.rank_checks import check_devices, check_same_facts, check_same_weights
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import DataError, DivergedError, LaunchError, LmkError, StoppedError
from ddpm_lmk.system.machine import cpu_name
from ddpm_lmk.system.signals import STOP_SIGNALS
from tests.engine.toy import FailingTask, ToyTask, everything, start
from tests.faults import breaking


def digest(state: TrainState) -> str:
    """One hash over names and bits of all weights, averages and moments."""
    total = hashlib.sha256()
    for name, value in sorted(everything(state).items()):
        total.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def signals_that_arrive() -> list[int]:
    """A list that grows with every signal, which otherwise does what it did."""
    arrived: list[int] = []
    for number in STOP_SIGNALS:
        before = signal.getsignal(number)
        assert callable(before)
        signal.signal(number, lambda number, frame, before=before: (arrived.append(number), before(number, frame)))
    return arrived


def work(job: dict[str, Any], parallel: Parallel) -> None:
    cfg, out = RunConfig.model_validate(job["config"]), Path(job["out"])
    task = ToyTask(cfg.seed, frozenset(job.get("bad_positions", ())))
    if "fails_at" in job and parallel.rank == 1:
        task = FailingTask(cfg.seed, {job["fails_at"]: ValueError("only here")})
    largest_file = job.get("largest_file")
    breaking.arm(job.get("breaks", ()))

    def after_step(model: torch.nn.Module, step: int) -> None:
        if step == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == job.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if step == job.get("corrupt_at") and parallel.rank == 1:
            flip_a_bit(model)
        if step == job.get("announce_at"):
            arrived = signals_that_arrive()
            sys.stdout.write("there\n")
            sys.stdout.flush()
            while not arrived or job.get("hold"):
                time.sleep(0.01)
        if largest_file:
            limit = largest_file if step < job["room_from"] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    task.after_step = after_step
    sizes = {"num_images": job.get("num_images", 6), "ballast": job.get("ballast", 0)}
    state, loaders, run = start(cfg, out, parallel, is_standardised=job.get("is_standardised", False), **sizes)
    if "dry_at" in job and parallel.rank == 1:
        loaders.train.global_batches = dry(loaders.train.global_batches, job["dry_at"])
    with run:
        fit(cfg, task, state, loaders, parallel, run, is_strict=job.get("strict", False))
    unused = [p.grad for n, p in state.model.named_parameters() if "unreached" in n]
    facts = {"digest": digest(state), "seen": task.seen, "step": state.step, "unused_is_none": unused == [None, None]}
    out.with_name(f"{out.name}-rank{parallel.rank}.json").write_text(json.dumps(facts))


def dry(groups: Callable[[int], Iterator[GlobalBatch]], last: int) -> Callable[[int], Iterator[GlobalBatch]]:
    """The stream of a rank whose file system goes away when the group of step `last` is wanted."""

    def ending(start: int) -> Iterator[GlobalBatch]:
        yield from itertools.islice(groups(start), last - start)
        raise StoppedError("the file system does not answer")

    return ending


def flip_a_bit(model: torch.nn.Module) -> None:
    """What a fault of memory does: the lowest bit of one weight changes."""
    weight = next(iter(model.parameters())).detach()
    weight.view(torch.int32)[(0,) * weight.ndim] ^= 1


def check_comparisons(parallel: Parallel) -> None:
    """The last rank has other data, or another bit in its weights: all ranks say so."""
    last = parallel.world - 1
    with pytest.raises(LaunchError, match=f"rank {last} has another data than most: theirs, wanted ours"):
        check_same_facts({"code": "1", "data": "theirs" if parallel.rank == last else "ours"}, parallel)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    check_same_weights(model, parallel, step=1)
    if parallel.rank == last:
        flip_a_bit(model)
    said = f"of rank {last} differ from the others" if parallel.world > 2 else "of all ranks differ from each other"
    with pytest.raises(DivergedError, match=said):
        check_same_weights(model, parallel, step=1)


class Uneven(torch.nn.Module):
    """Four parameters, of which a pass reaches some, in the order of their use."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.factors = torch.nn.ParameterList(torch.full((3,), float(rank)) for _ in range(4))

    def forward(self, used: list[int]) -> torch.Tensor:
        return torch.stack([self.factors[number].sum() * 10**number for number in used]).sum()


def check_buckets(parallel: Parallel) -> None:
    """Sums over micro-batches and ranks, whatever a rank reaches and whatever it comes to first.

    The last rank has a micro-batch more, of the third parameter alone, and then goes the other way round.
    """
    model, world, is_last = Uneven(parallel.rank), parallel.world, parallel.rank == parallel.world - 1
    buckets = bucket_reduce.BucketReduce(model)
    assert all(factor.eq(0).all() for factor in model.factors), "weights are those of rank 0"
    for used, counts in (([0, 1], [world, world, 1, None]), ([0, 1, 2, 3], [world, world, world + 1, world])):
        if is_last:
            model([2]).backward()
        buckets.expect()
        model(used[::-1] if is_last else used).backward()
        buckets.finish()
        found = [None if factor.grad is None else factor.grad.tolist() for factor in model.factors]
        wanted = [None if count is None else [10.0**number * count] * 3 for number, count in enumerate(counts)]
        assert found == wanted, "what no rank reaches has no gradient"
        model.zero_grad()
    buckets.expect()
    model([0, 1, 2, 3]).backward()
    with pytest.raises(AssertionError, match="only one backward pass"):
        model([3]).backward()
    buckets.finish()
    model.zero_grad()
    buckets.close()
    model([0, 1, 2, 3]).backward()
    assert all(factor.grad.eq(10**number).all() for number, factor in enumerate(model.factors)), "a hook is left"


class OtherDevice(Parallel):
    """A process on another kind of device than the first one's."""

    @property
    def device_name(self) -> str:
        """What the last rank says it has."""
        return super().device_name if self.rank < self.world - 1 else "another processor"


def check_kinds() -> None:
    """Several kinds of devices: refused by all ranks of a strict run, named by rank; else all know them."""
    parallel = OtherDevice("cpu")
    assert check_devices(parallel, []) == sorted([cpu_name(), "another processor"])
    with pytest.raises(LaunchError, match=f"rank {parallel.world - 1} has another processor") as refused:
        check_devices(parallel, [], is_strict=True)
    assert (refused.value.exit_code, refused.value.is_shared) == (5, True)


def check_errors(parallel: Parallel) -> None:
    """An error on one rank reaches all of them, and what rank 0 makes reaches all of them."""
    assert parallel.on_main(lambda: parallel.rank) == 0
    assert parallel.gather(parallel.rank) == list(range(parallel.world))
    assert parallel.exchange(torch.tensor([1.0, parallel.rank])) == [[1.0] * parallel.world, [*range(parallel.world)]]
    caught: LmkError | None = None
    try:
        with parallel.together():
            if parallel.rank == parallel.world - 1:
                raise DataError("only the last rank saw it")
    except DataError as error:
        caught = error
    assert caught is not None
    assert str(caught) == "only the last rank saw it"


def main(file: Path) -> int:
    """Do the jobs of a file; the exit code."""
    jobs = json.loads(file.read_text())
    bucket_reduce.BUCKET = 7  # elements: the toy fills several, and the first is sent while a backward pass still runs
    parallel = Parallel("cpu", zero=jobs[0].get("zero", 0))
    try:
        check_errors(parallel)
        if parallel.world > 1:
            check_comparisons(parallel)
            check_buckets(parallel)
            check_kinds()
        for job in jobs:
            try:
                work(job, parallel)
            except LmkError as error:
                if type(error).__name__ != job.get("expected"):
                    raise
                out = Path(job["out"])
                facts = {"code": error.exit_code, "said": str(error)}
                out.with_name(f"{out.name}-rank{parallel.rank}.json").write_text(json.dumps(facts))
    except LmkError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    with contextlib.suppress(RuntimeError):
        parallel.close()
    return 0
