"""One process of `bench scaling`: does the same step alone, beside the others, and with them.

Started by the launcher of the package, once per rank. Every round goes through all ways in turn; a barrier stands
before each, and what a way took is the wall clock of its slowest rank and the mean processor time of those that worked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from _subject import Subject, option_parser
from torch import Tensor, distributed

from ddpm_lmk.bench.ratio import FEWEST_PAIRS
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.engine.gradients import Updater
from ddpm_lmk.engine.loop import build_updater
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.system import environment
from ddpm_lmk.system.processes import die_with_parent

ARRAY_MIB, PRODUCT_SIDE = {"cpu": 64, "cuda": 512}, {"cpu": 1024, "cuda": 8192}
WARM_UP = 2
MAIN_WAYS = ("alone", "side by side", "weak")  # where there is no time for all


def main(job: dict[str, Any]) -> None:
    """Time every way, and write what all ranks found to the file of the job."""
    die_with_parent(int(os.environ[environment.PARENT]))
    options = option_parser(None).parse_intermixed_args(job["words"])
    subject = Subject(options)
    ways = {name: way for name, way in make_ways(subject).items() if name in job.get("ways", [name])}
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    until, started = job["began"] + job["budget_s"], time.monotonic()
    warm_up, done, last_s = WARM_UP, -WARM_UP, 0.0
    left_out: list[str] = []
    while done < options.rounds:
        begin = time.monotonic()
        if done > -WARM_UP:  # what one round takes is known; rank 0 decides for all
            fits = subject.parallel.broadcast((until - begin) / last_s)
            if fits < 1 and done >= 1:
                break
            if (
                fits < FEWEST_PAIRS - done and done < 0
            ):  # too little for bounds: warm enough, and only what matters most
                warm_up, done = warm_up + done, 0
                left_out += [name for name in ways if name not in MAIN_WAYS]
                ways = {name: way for name, way in ways.items() if name in MAIN_WAYS}
        for name in list(ways)[:: 1 if done % 2 == 0 else -1]:
            works, call = ways[name]
            spent = _time(call if works(subject.parallel.rank) else _nothing, subject)
            if done >= 0:
                kept[name].append(spent)
        done, last_s = done + 1, time.monotonic() - begin
    if done < options.rounds:
        left_out.append(f"{options.rounds - done} of {options.rounds} rounds")
    found = subject.parallel.gather(kept)
    if subject.parallel.is_main:
        facts = {
            name: _of_all(found, name, [works(rank) for rank in range(len(found))]) for name, (works, _) in ways.items()
        }
        whole = {
            "ways": facts,
            "left_out": left_out,
            "warm_up": warm_up,
            "gradient_bytes": _gradient(subject).numel() * 4,
        }
        whole |= {"start_s": started - job["began"], "round_s": last_s}
        Path(job["file"]).write_text(json.dumps(whole))
    subject.parallel.close()


def make_ways(subject: Subject) -> dict[str, tuple[Callable[[int], bool], Callable[[], object]]]:
    """By name: which ranks work, and what they do."""
    whole, part = subject.batch, share_of(subject.batch, subject.parallel.world)
    shared, parallel = subject.updater, subject.parallel
    with as_if_alone(parallel):
        own = build_updater(subject.cfg, subject.state, parallel)

    def step_alone() -> None:
        with as_if_alone(parallel):
            step(subject, own, whole)

    flat = _gradient(subject)
    a, b, c = (torch.ones(ARRAY_MIB[subject.device] * 2**18, device=subject.device) for _ in range(3))
    side = PRODUCT_SIDE[subject.device]
    square = torch.ones(side, side, device=subject.device)

    def triad() -> None:
        torch.add(a, b, alpha=0.5, out=c)

    def product() -> None:
        torch.mm(square, square)

    def first(rank: int) -> bool:
        return rank == 0

    def every(rank: int) -> bool:
        return True

    return {
        "alone": (first, step_alone),
        "side by side": (every, step_alone),
        "weak": (every, lambda: step(subject, shared, whole)),
        "strong": (every, lambda: step(subject, shared, part)),
        "reduction": (every, lambda: distributed.all_reduce(flat)),
        "triad alone": (first, triad),
        "triad side by side": (every, triad),
        "product alone": (first, product),
        "product side by side": (every, product),
    }


@contextmanager
def as_if_alone(parallel: Parallel) -> Iterator[None]:
    """Every rank keeps to itself what it computes while the block lasts."""
    world, parallel.world = parallel.world, 1
    try:
        yield
    finally:
        parallel.world = world


def step(subject: Subject, updater: Updater, batch: Batch) -> None:
    """A step of the engine."""
    with updater.micro_batch(0, of=1):
        with subject.parallel.autocast(subject.cfg.train.precision):
            total = subject.task.loss(updater.net, batch).float().sum()
        updater.add(total, len(batch))
    updater.finish(0.0)
    subject.state.step += 1
    updater.apply(None)
    subject.state.ema.update(subject.state.step)
    updater.clear()


def share_of(batch: Batch, world: int) -> Batch:
    """The first images of a batch, as many as a rank gets of it."""
    count = len(batch) // world
    whole: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    part: dict[str, Any] = {name: None if value is None else value[:count] for name, value in whole.items()}
    return replace(batch, **part)


def _gradient(subject: Subject) -> Tensor:
    """A tensor of the size of the gradient."""
    return torch.zeros(sum(p.numel() for p in subject.model.parameters()), device=subject.parallel.device)


def _time(call: Callable[[], object], subject: Subject) -> tuple[float, float]:
    """Wall clock and processor seconds of this rank, from when all are ready."""
    if subject.device == "cuda":
        torch.cuda.synchronize()
    distributed.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if subject.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _nothing() -> None:
    """The rank waits at the next barrier, where it sleeps."""


def _of_all(found: list[dict[str, list[tuple[float, float]]]], name: str, works: list[bool]) -> dict[str, list[float]]:
    """Round by round: the slowest rank's wall clock, and the mean processor time, of those that worked."""
    rounds = list(zip(*(ranks[name] for ranks, is_working in zip(found, works) if is_working)))
    return {
        "wall_s": [max(wall for wall, _ in spent) for spent in rounds],
        "cpu_s": [sum(cpu for _, cpu in spent) / len(spent) for spent in rounds],
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
