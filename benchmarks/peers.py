"""Our network beside others, step by step in turn: time, processor time, memory, operations; and the paper's way.

    python benchmarks/peers.py [--width 32] [--multipliers 1 2 4] [--size 64] [--batch 4] [--precision fp32]
                               [--groups width matched way] [--rounds 11] [--device auto] [--save] [--out DIR]

A step is forward, backward and AdamW's update on the same random images, with the same precision, threads and
optimizer for all. Every network lives in a process of its own, started fresh, so that its memory is its own; all
processes of a group are alive and step in turn (A B C, C B A, ...), so that a busy machine is busy for all of them.
A GPU has to hold them all at once.

Groups: `width` has networks of equal width, as in the paper's code and those packages' examples (they differ in depth,
so look at time per operation); `matched` has channels chosen so that parameters and operations are nearly ours; `way`
compares a whole step of the paper's released loop with ours. Packages that are missing are named and left out
(`pip install -c constraints.txt -e '.[bench]'`). Others run in both memory layouts; ours is channels-last. On a CPU
ours keeps freed memory, as its runs do, and the others return it, as theirs do; with `--keep-memory` all keep it.

Operations are counted by torch's flop counter for all alike. Ours needs fewer than the released network for the same
function, so there are two rates: per operation of the function (as released) and per operation run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _peer_networks import PACKAGES, PEERS, Shape, count, is_installed, matched
from _peer_process import Contender, run_together
from _peer_worker import Spec
from _subject import add_budget, budget_of

from ddpm_lmk.bench import Comparison, Result, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.system.console import print_status, print_table
from ddpm_lmk.system.machine import versions

LAYOUTS = ("nchw", "channels-last")
GROUPS = ("width", "matched", "way")
WARM_UP = 2
RESULTS = Path(__file__).resolve().parent / "results"
OURS, PLAIN = "ours", "released"


def main() -> None:
    """Measure the groups, compare, and write the result file."""
    options = _options()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    torch.set_num_threads(options.threads)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}  # for the workers
    given = {key: value for key, value in vars(options).items() if key != "until"}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    settings["packages"] = versions(*(distribution for _, distribution in PACKAGES.values()))
    budget = budget_of(options)
    result = Result("peers", settings=settings, device=device, budget=budget)
    for number, group in enumerate(options.groups):
        contenders = list(_contenders(group, options, device))
        print_status(f"group {group}: {', '.join(contender.label for contender in contenders)}")
        measure = partial(run_together, contenders, warm_up=WARM_UP, rounds=options.rounds, budget=budget)
        budget.run(f"group {group}", measure, parts=len(options.groups) - number)
        _note(result, group, contenders)
    kept = "-keep" if options.keep_memory else ""
    label = f"width{options.width}-{options.size}px-{options.precision}{kept}"
    conclude(result, options.out, label, earlier=[RESULTS])


def _contenders(group: str, options: argparse.Namespace, device: str) -> Iterator[Contender]:
    """The networks of a group, those that are here."""
    shape = Shape((options.width, *(options.width * m for m in options.multipliers))[1:], options.size, options.batch)
    released = count(PLAIN, shape)

    def contender(network: str, layout: str, shape: Shape = shape, way: str = "plain", save: bool = False) -> Contender:
        micro_batches = options.micro_batches if way != "plain" else 1
        precision = "fp32" if way == "released" else options.precision
        keeps = device == "cpu" and (options.keep_memory or network.startswith("ours"))
        spec = Spec(network, shape, layout, precision, device, options.threads, way, micro_batches, save, keeps)
        counts = count(network, shape)
        function = released.forward_flops if network not in PEERS else counts.forward_flops
        return Contender(_label(spec), spec, counts, function * micro_batches)

    yield contender(OURS, "channels-last", way="ours" if group == "way" else "plain")
    if group == "way":
        yield contender("released, checkpointing", "nchw", way="released")
        if options.save:
            yield contender("released, checkpointing", "nchw", way="released", save=True)
        return
    if group == "width":
        yield contender("ours, checkpointing", "channels-last")
        yield from (contender(PLAIN, layout) for layout in options.layouts)
        yield contender("released, checkpointing", "nchw")
    for peer in PEERS:
        if not is_installed(peer):
            print_status(
                f"{PACKAGES[peer][1]} is not installed: left out (pip install -c constraints.txt -e '.[bench]')"
            )
            continue
        chosen = matched(peer, shape, released) if group == "matched" else shape
        yield from (contender(peer, layout, chosen) for layout in options.layouts)


def _label(spec: Spec) -> str:
    way = {"plain": "", "ours": ", our step", "released": ", the released step"}[spec.way]
    return f"{spec.network}{way}{', saving' if spec.save else ''} ({spec.layout})"


def _note(result: Result, group: str, contenders: Sequence[Contender]) -> None:
    """Rows and ratios of a group, kept and printed."""
    there = [contender for contender in contenders if contender.peak_mib and not contender.failure]
    for contender in there:
        samples = contender.timings.samples() | {"peak_mib": contender.peak_mib}
        row = result.add("step beside others", samples, conditions=_conditions(contender, group))
        row.warm_up, row.figures = contender.timings.warm_up, _figures(contender)
    heads = ("network", "channels", "busy ms", "images/s", "peak MiB", "µs/MFLOP of the function", "as run")
    print_table(heads, [_cells(contender) for contender in there])
    ratios = list(_ratios(group, there))
    result.ratios += [{"group": group, **names, **found.facts()} for names, found in ratios]
    result.ratios += [{"group": group, "first": c.label, "failure": c.failure} for c in contenders if c.failure]
    print_table(
        ("first", "second", "of", "first over second"),
        [(names["first"], names["second"], names["of"], str(found)) for names, found in ratios],
    )


def _conditions(contender: Contender, group: str) -> dict[str, Any]:
    spec = contender.spec
    return {
        "group": group,
        "network": spec.network,
        "layout": spec.layout,
        "way": spec.way,
        "saves": spec.save,
        "channels": list(spec.shape.channels),
        "image_size_px": spec.shape.size_px,
        "batch_images": spec.shape.batch,
        "micro_batches": spec.micro_batches,
        "precision": spec.precision,
        "threads": spec.threads,
    }


def _figures(contender: Contender) -> dict[str, Any]:
    counts, images = contender.counts, contender.spec.shape.batch * contender.spec.micro_batches
    return {
        "params": counts.params,
        "forward_gflop_per_image_of_the_function": contender.function_flops / images / 1e9,
        "forward_gflop_per_image_as_run": counts.forward_flops / contender.spec.shape.batch / 1e9,
        "train_gflop_per_image_as_run": counts.train_flops / contender.spec.shape.batch / 1e9,
        "images_per_s": images / median(contender.timings.wall_s),
        "peak_mib": median(contender.peak_mib),
        "busy_us_per_forward_mflop_of_the_function": median(_per(contender, OF_FUNCTION)) * 1e12,
        "busy_us_per_forward_mflop_as_run": median(_per(contender, AS_RUN)) * 1e12,
    }


def _cells(contender: Contender) -> tuple[str, ...]:
    figures = _figures(contender)
    return (
        contender.label,
        "-".join(map(str, contender.spec.shape.channels)),
        f"{1e3 * median(contender.timings.busy_s):.1f}",
        f"{figures['images_per_s']:.1f}",
        f"{figures['peak_mib']:.0f}",
        f"{figures['busy_us_per_forward_mflop_of_the_function']:.1f}",
        f"{figures['busy_us_per_forward_mflop_as_run']:.1f}",
    )


A_STEP, OF_FUNCTION, AS_RUN, PEAK = "a step", "an operation of the function", "an operation run", "highest memory"


def _per(contender: Contender, of: str) -> list[float]:
    """Busy seconds, round by round, of a step or of one floating-point operation; or the highest memory."""
    images = contender.spec.micro_batches
    per = {
        A_STEP: lambda: contender.timings.busy_s,
        OF_FUNCTION: lambda: [s / contender.function_flops for s in contender.timings.busy_s],
        AS_RUN: lambda: [s / contender.counts.forward_flops / images for s in contender.timings.busy_s],
        PEAK: lambda: contender.peak_mib,
    }[of]
    return per()


def _ratios(group: str, there: Sequence[Contender]) -> Iterator[tuple[dict[str, str], Comparison]]:
    """Ours against each of the others: a step of what computes the same or is as large, else an operation."""
    ours = next((contender for contender in there if contender.spec.network == OURS), None)
    if ours is None:
        return
    for other in there:
        if other is ours:
            continue
        is_same = group != "width" or other.spec.network not in PEERS
        for of in (A_STEP, PEAK) if is_same else (OF_FUNCTION, AS_RUN, PEAK):
            names = {"first": ours.label, "second": other.label, "of": of}
            yield names, compare_paired(_per(ours, of), _per(other, of))
    if group == "width":
        for of in (OF_FUNCTION, AS_RUN):
            best = min((c for c in there if c.spec.network in PEERS), key=lambda c: median(_per(c, of)), default=None)
            if best is not None:
                names = {"first": ours.label, "second": f"the best peer, {best.label}", "of": of}
                yield names, compare_paired(_per(ours, of), _per(best, of))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of the others' memory")
    parser.add_argument("--width", type=int, default=32, help="channels of the first level")
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4], help="channels per level, times width")
    parser.add_argument("--size", type=int, default=64, help="image side, pixels")
    parser.add_argument("--batch", type=int, default=4, help="images at once")
    parser.add_argument("--micro-batches", type=int, default=8, help="group way: micro-batches of a step (released: 8)")
    parser.add_argument("--save", action="store_true", help="group way: also with the released loop's save every step")
    parser.add_argument("--keep-memory", action="store_true", help="have the others keep freed memory too (CPU)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    add_budget(parser, 900.0)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
