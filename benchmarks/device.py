"""What this device can do: matrix products, convolutions in the network's own shapes, memory, and the way to the host.

    ddpm-lmk bench device [--model PRESET | --run RUN.yaml] [--device auto] [--out DIR]

Rates are per second that the device worked: events on a GPU, on a CPU processor seconds divided by threads, so that
other programs hardly matter. Nothing comes from a data sheet. On a CPU everything is done with one thread and with one
per core: how little a second core adds is what several processes will feel (`bench scaling`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from _subject import RESULTS, Subject, budget_of, carried_out, device_of, option_parser, run_config
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.bench import Result, Timings
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.models.blocks import DoubleSizeConv2d
from ddpm_lmk.system.console import progress
from ddpm_lmk.system.machine import granted_cores

PRODUCT_SIDES = {"cpu": (1024,), "cuda": (4096, 8192)}
CONVOLUTIONS = 3  # parts that these are worth, beside the one they are
ARRAY_MIB = {"cpu": 64, "cuda": 512}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure and write the result file."""
    options = option_parser(__doc__).parse_intermixed_args()
    device, budget = device_of(options), budget_of(options)
    settings = run_config(options).model_dump(mode="json")
    result = Result("device", settings=settings, device=device, budget=budget)
    parts: list[tuple[str, Callable[[], object]]] = []
    for count in thread_counts(device):
        threads = f"with {count} thread{'' if count == 1 else 's'}"
        parts.append((f"products {threads}", partial(measure_products, result, device, count, options)))
        parts.append((f"memory {threads}", partial(measure_memory, result, device, count, options)))
    if device == "cuda":
        parts.append(("transfers", partial(measure_transfers, result, device, options)))
    parts.append(("convolutions", partial(measure_convolutions, result, options)))
    try:
        with progress("bench device", lines=False) as tell:
            for done, (name, measure) in enumerate(parts):
                tell(done, len(parts))
                # convolutions come last and are many
                is_last = done == len(parts) - 1
                budget.run(name, measure, parts=1 if is_last else len(parts) - done + CONVOLUTIONS)
            tell(len(parts), len(parts))
    finally:  # what fails takes nothing with it that was measured
        conclude(result, options.out, run_config(options).name, earlier=[RESULTS])


def thread_counts(device: str) -> list[int]:
    """One, and one per core; on a GPU the host's threads do not matter."""
    return sorted({1, granted_cores()}) if device == "cpu" else [torch.get_num_threads()]


def measure_products(result: Result, device: str, threads: int, options: argparse.Namespace) -> None:
    """Square matrix products in every precision the device has."""
    calls: dict[str, Callable[[], object]] = {}
    sides: dict[str, int] = {}
    for precision in precisions(device):
        for side in PRODUCT_SIDES[device]:
            name = f"{precision} {side}"
            a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
            calls[name], sides[name] = _product(a, b, is_tf32=precision == "tf32"), side
    for name, timings in _alternate(calls, device, result, options, threads).items():
        conditions = {"precision": name.split()[0], "side": sides[name], "threads": threads}
        _add(result, "matrix product", timings, conditions, gflop=2 * sides[name] ** 3 / 1e9)


def precisions(device: str) -> list[str]:
    """Precisions worth measuring here; a CPU takes minutes for products in fp16."""
    if device == "cpu":
        return ["fp32", "bf16"]
    has_bf16, has_tf32 = torch.cuda.is_bf16_supported(), torch.cuda.get_device_capability()[0] >= 8
    return ["fp32", *(["tf32"] if has_tf32 else []), *(["bf16"] if has_bf16 else []), "fp16"]


def _product(a: Tensor, b: Tensor, *, is_tf32: bool) -> Callable[[], object]:
    def call() -> None:
        torch.backends.cuda.matmul.allow_tf32 = is_tf32
        torch.mm(a, b)
        torch.backends.cuda.matmul.allow_tf32 = False

    return call


def measure_memory(result: Result, device: str, threads: int, options: argparse.Namespace) -> None:
    """Reading, writing, copying, and a + s b (triad), of arrays that no cache holds."""
    mib = ARRAY_MIB[device]
    a, b, c = (torch.ones(mib * 2**18, device=device) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "read": a.sum,
        "write": lambda: a.fill_(1.0),
        "copy": lambda: b.copy_(a),
        "triad": lambda: torch.add(a, b, alpha=0.5, out=c),
    }
    moved = {"read": 1, "write": 1, "copy": 2, "triad": 3}
    for name, timings in _alternate(calls, device, result, options, threads).items():
        _add(result, name, timings, {"mib": mib, "threads": threads}, gbyte=moved[name] * mib * 2**20 / 1e9)


def measure_transfers(result: Result, device: str, options: argparse.Namespace) -> None:
    """Between host and device, from pinned and from ordinary memory."""
    mib = ARRAY_MIB["cpu"]
    there = torch.ones(mib * 2**18, device=device)
    pinned, ordinary = torch.ones(mib * 2**18).pin_memory(), torch.ones(mib * 2**18)
    calls: dict[str, Callable[[], object]] = {
        "to device pinned": lambda: there.copy_(pinned, non_blocking=True),
        "to device ordinary": lambda: there.copy_(ordinary),
        "to host pinned": lambda: pinned.copy_(there, non_blocking=True),
        "to host ordinary": lambda: ordinary.copy_(there),
    }
    for name, timings in _alternate(calls, device, result, options).items():
        way, memory = name.rsplit(" ", 1)
        _add(result, way, timings, {"mib": mib, "memory": memory}, gbyte=mib * 2**20 / 1e9)


def measure_convolutions(result: Result, options: argparse.Namespace) -> None:
    """The 3x3 convolutions of the network as it calls them, forward and with the backward pass."""
    subject = Subject(options)
    shapes = convolution_shapes(subject)
    calls: dict[str, Callable[[], object]] = {}
    for shape in shapes:
        calls[f"{shape} forward"], calls[f"{shape} both"] = _convolution(shape, subject)
    found = _alternate(calls, subject.device, result, options, needs_all=False)
    threads, total = torch.get_num_threads(), {"forward": [0.0, 0.0], "both": [0.0, 0.0]}
    for (channels_in, channels_out, side), count in shapes.items():
        for way, passes in (("forward", 1), ("both", 3)):
            timings = found.get(f"{(channels_in, channels_out, side)} {way}")
            if timings is None:
                continue
            gflop = passes * 18 * channels_in * channels_out * side**2 * subject.batch_images / 1e9
            conditions: dict[str, Any] = {"shape": f"{channels_in} to {channels_out} at {side} px"}
            conditions |= {"batch_images": subject.batch_images, "precision": subject.precision, "threads": threads}
            what = "convolution forward" if way == "forward" else "convolution forward and backward"
            _add(result, what, timings, conditions, gflop=gflop, figures={"times_in_network": count})
            total[way][0] += count * gflop
            total[way][1] += count * median(timings.busy_s) / (threads if subject.device == "cpu" else 1)
    if len(found) == len(calls):
        figures = {f"{way}_gflop_per_s": gflop / seconds for way, (gflop, seconds) in total.items()}
        result.add("all convolutions of the network", conditions=subject.conditions(), figures=figures)


def _convolution(shape: tuple[int, int, int], subject: Subject) -> tuple[Callable[[], object], Callable[[], object]]:
    """A convolution of one shape: its forward pass, and both passes."""
    channels_in, channels_out, side = shape
    x, w = (
        torch.randn(size, device=subject.device)
        .to(DTYPES[subject.precision])
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for size in ((subject.batch_images, channels_in, side, side), (channels_out, channels_in, 3, 3))
    )

    def both() -> None:
        out = F.conv2d(x, w, padding=1)
        torch.autograd.grad(out, (x, w), grad_outputs=out.detach())

    return lambda: F.conv2d(x.detach(), w.detach(), padding=1), both


def convolution_shapes(subject: Subject) -> dict[tuple[int, int, int], int]:
    """(channels in, out, side) of each 3x3 convolution of one forward pass, and how often it comes."""
    seen: dict[tuple[int, int, int], int] = {}

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        shape = (module.in_channels, module.out_channels, inputs[0].shape[-1])
        seen[shape] = seen.get(shape, 0) + 1

    hooks = [
        module.register_forward_pre_hook(note)
        for module in subject.model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and not isinstance(module, DoubleSizeConv2d)
    ]
    subject.forward()
    for hook in hooks:
        hook.remove()
    return seen


def _alternate(
    calls: dict[str, Callable[[], object]],
    device: str,
    result: Result,
    options: argparse.Namespace,
    threads: int | None = None,
    *,
    needs_all: bool = True,
) -> dict[str, Timings]:
    """Calls in turn, with as many threads as said, within the share of the part."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return result.budget.alternate(calls, rounds=options.rounds, device=device, needs_all=needs_all)
    finally:
        torch.set_num_threads(before)


def _add(
    result: Result,
    what: str,
    timings: Timings,
    conditions: dict[str, Any],
    *,
    gflop: float = 0.0,
    gbyte: float = 0.0,
    figures: dict[str, Any] | None = None,
) -> None:
    """A row with its rate of every round."""
    row = result.add(what, timings, conditions=conditions, figures=figures)
    share = conditions.get("threads", 1) if not timings.device_s else 1
    amount, unit = (gflop, "gflop_per_s") if gflop else (gbyte, "gbyte_per_s")
    row.samples[unit] = [amount * share / seconds for seconds in timings.busy_s]


if __name__ == "__main__":
    carried_out(main)
