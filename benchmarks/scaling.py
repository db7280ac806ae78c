"""One to N processes, weak and strong, and where the rest of the time goes.

    ddpm-lmk bench scaling [--processes N] [--model PRESET | --run RUN.yaml] [--device auto] [--out DIR]

gloo on a CPU, with one thread per process; NCCL on GPUs. In one run, in turn: a step on one process alone; the same
step on all of them side by side, each keeping its gradient; the same with the gradient reduced (weak scaling: every
process has a whole batch); and a step whose batch they share (strong scaling). Side by side against alone is what
processes take from one another (memory bandwidth, caches, half a physical core); weak against side by side is the
reduction and waiting for it. What a triad (memory only) and a matrix product (arithmetic only) lose side by side says
which of these it is. Efficiency by the wall clock suffers from other programs, that by processor time does not, but
does not see waiting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _subject import RESULTS, budget_of, carried_out, command_words, device_of, option_parser, run_config

from ddpm_lmk.bench import Comparison, Result, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.launcher.placement import Placement
from ddpm_lmk.launcher.start import run_ranks
from ddpm_lmk.system.console import print_status
from ddpm_lmk.system.machine import granted_cores
from ddpm_lmk.system.processes import end_children

MOST_CPU_PROCESSES = 8
PATIENCE_S = 600.0  # between two signs of life, of which a benchmark gives none

PAIRS = {
    "weak scaling efficiency": ("alone", "weak"),
    "kept side by side": ("alone", "side by side"),
    "kept while reducing": ("side by side", "weak"),
    "kept by memory": ("triad alone", "triad side by side"),
    "kept by arithmetic": ("product alone", "product side by side"),
    "reduction alone over a step": ("reduction", "weak"),
}


def main() -> None:
    """Launch each number of processes and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--processes", type=int, help="the most (default: cores, or GPUs)")
    options = parser.parse_intermixed_args()
    cfg, device = run_config(options), device_of(options)
    if options.processes is None and available(device) < 2:
        print_status(f"bench scaling: one {'GPU' if device == 'cuda' else 'core'} here, so there is nothing to measure")
        return
    budget = budget_of(options)
    result = Result("scaling", settings=cfg.model_dump(mode="json"), device=device, budget=budget)
    batch = options.batch or cfg.train.given_micro_batch or cfg.train.global_batch_size
    counts = process_counts(options.processes or available(device), batch)
    found: dict[str, Any] = {"start_s": 0.0, "round_s": 0.0}
    for number, count in enumerate(counts):

        def measure(count: int = count) -> None:
            found.update(run_on(count, options, device, budget_s=budget.share_s))
            add_rows(result, found, count, cfg_facts(cfg, batch, device))
            for what in found["left_out"]:
                budget.leave_out(f"{count} processes: {what}")

        # twice as many start in at most twice the time
        needs_s = 2 * (found["start_s"] + found["round_s"])
        if not budget.run(f"{count} processes", measure, parts=len(counts) - number, needs_s=needs_s):
            end_children()  # ranks of those that were cut off
    conclude(result, options.out, cfg.name, earlier=[RESULTS])


def available(device: str) -> int:
    """GPUs, or cores this process may use."""
    if device == "cuda":
        return torch.cuda.device_count()
    return min(MOST_CPU_PROCESSES, granted_cores())


def process_counts(most: int, batch: int) -> list[int]:
    """2, 4, 8, ... up to `most`, that share a batch evenly; one process is in every run, as `alone`."""
    counts = [2**k for k in range(1, 11) if 2**k <= most and batch % 2**k == 0]
    if not counts:
        raise LaunchError(f"scaling needs two processes that share a batch of {batch}, found {most}; see --processes")
    return counts


def run_on(
    count: int, options: argparse.Namespace, device: str, *, budget_s: float, ways: Sequence[str] | None = None
) -> dict[str, Any]:
    """What `count` ranks found, for all ways or some."""
    print_status(f"bench scaling: {count} processes")
    placed = ("cpu" if device == "cpu" else "cuda", count)
    with tempfile.TemporaryDirectory() as folder:
        file, job = Path(folder) / "found.json", Path(folder) / "job.json"
        wanted: dict[str, Any] = {} if ways is None else {"ways": list(ways)}
        wanted |= {"words": command_words(options), "file": str(file), "budget_s": budget_s, "began": time.monotonic()}
        job.write_text(json.dumps(wanted))
        placement = Placement(*placed, restarts=0, stall_s=PATIENCE_S)  # type: ignore[arg-type] # a literal
        code = run_ranks([str(Path(__file__).with_name("_ranks.py")), str(job)], placement)
        if code or not file.is_file():
            raise LaunchError(f"{count} processes ended with exit code {code} and no figures; see the lines above")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def cfg_facts(cfg: Any, batch: int, device: str) -> dict[str, Any]:
    """What the rows have in common."""
    precision = cfg.train.precision
    resolved = ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision
    return {"image_size_px": cfg.data.image_size, "batch_images": batch, "precision": resolved, "network": cfg.name}


def add_rows(result: Result, found: dict[str, Any], count: int, conditions: dict[str, Any]) -> None:
    """A row per way, and the ratios that explain one another."""
    ways = found["ways"]
    for name, samples in ways.items():
        images = conditions["batch_images"] * (count if name in ("weak", "side by side") else 1)
        row = result.add(name, samples, conditions={**conditions, "processes": count})
        row.warm_up = found["warm_up"]
        if name in ("alone", "weak", "strong"):
            row.samples["images_per_s"] = [images / seconds for seconds in row.samples["wall_s"]]
    for clock in ("wall_s", "cpu_s"):
        for what, (first, second) in PAIRS.items():
            if first in ways and second in ways:
                _note(result, what, count, clock, compare_paired(ways[first][clock], ways[second][clock]))
        if "strong" in ways:
            strong = compare_paired(ways["alone"][clock], [count * s for s in ways["strong"][clock]])
            _note(result, "strong scaling efficiency", count, clock, strong)
    result.add("gradient", conditions={"processes": count}, figures={"gradient_mib": found["gradient_bytes"] / 2**20})


def _note(result: Result, what: str, count: int, clock: str, found: Comparison) -> None:
    result.ratios.append({"what": what, "processes": count, "clock": clock, **found.facts()})


if __name__ == "__main__":
    carried_out(main)
