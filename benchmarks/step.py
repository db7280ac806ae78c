"""One optimizer step in its parts: forward, backward, update, and every level; its memory; its share of the peak.

    ddpm-lmk bench step [--model PRESET | --run RUN.yaml] [--size S] [--batch B] [--precision P] [--out DIR]

Pixels are random and on the device: no loader, no logging (those are in `bench train`). The parts take turns with a
large matrix product and a convolution, so the share of the peak is measured in the same minutes on the same device, and
never against a data sheet. It counts the operations our code executes; `model_gflop_per_s` counts those of the
published algorithm. By level, each group of operations stands beside the least it can take here (`_roofline.py`).
Memory is that of a new process, beside the estimate `pretrain --dry-run` gives.
`--sustained-s` trains without a pause before all that: a device is faster while it is cold.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]
import torch
from _roofline import measure_levels, peak_calls, peak_flops
from _subject import RESULTS, Subject, budget_of, carried_out, command_words, device_of, option_parser, run_config

from ddpm_lmk.bench import Result, Timings, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.engine.device_fit import is_out_of_memory, memory_gib
from ddpm_lmk.errors import ResourceError
from ddpm_lmk.system.console import print_status, progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("forward", "forward and backward", "update", "train step")
SLICES = 20  # of the time at `--sustained-s`, fewer of long steps; the first is cold, the second half is steady


def main() -> None:
    """Measure and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--halve", action="store_true", help="halve --batch until it fits the device")
    parser.add_argument("--sustained-s", type=float, default=0.0, help="seconds of training without a pause, first")
    parser.add_argument("--only-sustained", action="store_true", help="no parts and levels")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.memory_only:
        sys.stdout.write(json.dumps(memory_of_training(options)[1]) + "\n")
        return
    run_config(options)  # what is wrong with it is said before anything starts
    budget = budget_of(options)
    subjects: list[Subject] = []
    memory: dict[str, float] = {}

    def prepare() -> None:
        subject, found = halve_until_it_fits(options) if options.halve else measure_memory(options)
        subjects.append(subject)
        memory.update(found)

    # the batch that fits is needed for all that follows
    budget.run("memory", prepare, parts=3, ends_with_share=not options.halve)
    if not subjects and not budget.run("the network", lambda: subjects.append(Subject(options))):
        return
    [subject] = subjects
    result = Result("step", settings=subject.cfg.model_dump(mode="json"), device=subject.device, budget=budget)
    try:
        if options.sustained_s:
            budget.run("sustained training", lambda: measure_sustained(result, subject, options, memory))
        if not options.only_sustained:
            budget.run("parts", lambda: measure_parts(result, subject, options, memory), parts=2)
            budget.run("levels", lambda: measure_levels(result, subject, options))
    finally:  # levels keep the input of every block, for which a device may have no room
        conclude(result, options.out, f"{subject.label}-{subject.precision}", earlier=[RESULTS])


def measure_sustained(result: Result, subject: Subject, options: argparse.Namespace, memory: dict[str, float]) -> None:
    """Images per second of steps that follow one another, slice by slice; the device is waited for between slices."""

    def seconds(steps: int) -> tuple[float, float]:
        begin = time.perf_counter(), time.process_time()
        for _ in range(steps):
            subject.step()
        if subject.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    seconds(1)  # compiles, where the run does
    step_s = seconds(1)[0]
    count = max(1, min(SLICES, round(options.sustained_s / step_s)))
    steps = max(1, round(options.sustained_s / count / step_s))
    images = steps * subject.batch_images
    slices = [seconds(steps)]
    while len(slices) < count and result.budget.left_s > slices[-1][0]:
        slices.append(seconds(steps))
    if len(slices) < count:
        result.budget.leave_out(f"sustained training: {count - len(slices)} of {count} slices")
    rates = [images / wall_s for wall_s, _ in slices]
    samples = {"images_per_s": rates, "images_per_cpu_s": [images / cpu_s for _, cpu_s in slices]}
    figures = {"cold_images_per_s": rates[0], "steady_images_per_s": median(rates[len(rates) // 2 :]), **memory}
    figures |= {"slice_s": median(wall_s for wall_s, _ in slices), **operations(subject)}
    result.add("sustained training", samples, conditions=subject.conditions(), figures=figures)


def operations(subject: Subject) -> dict[str, float]:
    """Of a training step per image: as our code runs them, and those of the published algorithm."""
    executed, published = subject.cost.flops_train, 3 * subject.cost.flops_forward
    if subject.cfg.model.kind != "ddpm_unet":
        published = executed  # nothing is rewritten there, and not every pass has a way back
    return {"executed_gflop_per_image": executed / 1e9, "model_gflop_per_image": published / 1e9}


def measure_parts(result: Result, subject: Subject, options: argparse.Namespace, memory: dict[str, float]) -> None:
    """The whole step and its parts, in turn with what gives the peak."""
    calls: dict[str, Callable[[], object]] = {
        "forward": subject.forward,
        "forward and backward": subject.forward_backward,
        "train step": subject.step,
        "update": subject.update,  # with the gradient of the call before
        **peak_calls(DTYPES[subject.precision], subject.device),
    }
    subject.step()
    with progress("bench step, parts", lines=False) as tell:
        found = result.budget.alternate(calls, rounds=options.rounds, device=subject.device, tell=tell)
    threads = torch.get_num_threads() if subject.device == "cpu" else 1
    flops = peak_flops(subject.device)
    peaks = [[work * threads / s / 1e9 for s in found[name].busy_s] for name, work in flops.items()]
    peak = max(peaks, key=median)
    for name, rates in zip(flops, peaks):
        conditions = {"precision": subject.precision, "threads": torch.get_num_threads()}
        result.add(name, found[name], conditions=conditions, figures={"gflop_per_s": median(rates)})
    for name in PARTS:
        figures = rates_of(name, found[name], subject, peak)
        outputs = {"out_channels": subject.task.out_channels, "full_size": subject.task.full_size}
        extra = {**memory, **outputs} if name == "train step" else {}
        row = result.add(name, found[name], conditions=subject.conditions(), figures={**figures, **extra})
        row.samples["images_per_s"] = [subject.batch_images / s for s in found[name].wall_s]
    backward = [b - f for b, f in zip(found["forward and backward"].busy_s, found["forward"].busy_s)]
    result.add(
        "backward", {"device_s" if subject.device == "cuda" else "cpu_s": backward}, conditions=subject.conditions()
    )
    share = compare_paired(found["update"].busy_s, found["train step"].busy_s)
    result.ratios.append({"what": "update over train step", "clock": "busy_s", **share.facts()})


def rates_of(name: str, timings: Timings, subject: Subject, peak: list[float]) -> dict[str, float]:
    """Operations per second, and the share of the measured peak, round by round."""
    cost, batch = subject.cost, subject.batch_images
    if name == "update":
        return {"parameters": cost.params}
    executed, published = (batch * gflop for gflop in operations(subject).values())
    if name == "forward":
        executed, published = (batch * flops / 1e9 for flops in (cost.flops_executed, cost.flops_forward))
    busy = timings.busy_s
    threads = torch.get_num_threads() if subject.device == "cpu" else 1
    shares = [100 * executed * threads / s / p for s, p in zip(busy, peak)]
    return {
        "executed_gflop": executed,
        "executed_gflop_per_s": executed * threads / median(busy),
        "model_gflop_per_s": published * threads / median(busy),
        "share_of_measured_peak_pct": median(shares),
    }


def halve_until_it_fits(options: argparse.Namespace) -> tuple[Subject, dict[str, float]]:
    """The network with the largest batch that fits, which the options have from then on, and its memory."""
    while True:
        try:
            return measure_memory(options)
        except ResourceError:
            if not options.batch or options.batch < 2:
                raise
        options.batch //= 2
        print_status(f"does not fit; trying {options.batch} images")
        gc.collect()  # what did not fit


def measure_memory(options: argparse.Namespace) -> tuple[Subject, dict[str, float]]:
    """The network, and the most that a few of its steps hold; ResourceError: no room.

    On a CPU they are those of a process of its own, so that nothing else counts.
    """
    if device_of(options) == "cuda":
        return memory_of_training(options)
    command = [sys.executable, str(Path(__file__).resolve()), *command_words(options), "--memory-only"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == ResourceError.exit_code:
        raise ResourceError(f"{done.stderr.strip().splitlines()[-1].partition(': ')[2]}; use a smaller --batch")
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return Subject(options), found


def memory_of_training(options: argparse.Namespace) -> tuple[Subject, dict[str, float]]:
    """The network, and the memory that training it added to this process, at most, beside the estimate.

    The process has trained a small network before, so that what PyTorch loads for any does not count.
    """
    cfg = run_config(options)
    load_libraries(options.device, cfg.train.precision)
    before = psutil.Process().memory_info().rss / 2**30
    if device_of(options) == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of a larger batch, which did not fit
    try:
        subject = Subject(options, cfg=cfg)
        for _ in range(3):
            subject.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"a step of {options.batch or cfg.train.global_batch_size} images does not fit") from None
    estimate = memory_gib(cfg, subject.task, device=subject.device, micro_batch=subject.batch_images)
    is_cuda = subject.device == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else _highest_rss_gib() - before
    return subject, {
        "peak_memory_gib": peak,
        "estimated_memory_gib": estimate,
        "estimate_over_measured": estimate / peak,
    }


def load_libraries(device: str, precision: str) -> None:
    """Train a small network, for what PyTorch loads then and never again."""
    for each in ("fp32", precision):
        words = ["--model", "small", "--size", "32", "--batch", "1", "--precision", each, "--device", device]
        Subject(option_parser(None).parse_intermixed_args(words)).step()


def _highest_rss_gib() -> float:
    """Of this process alone: `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    carried_out(main)
