"""A sweep against the same cells run one by one: wall time, processor time, images per second, and equal results.

    python benchmarks/sweep.py [--run RUN.yaml] [--steps 10] [--rounds 6] [--workers N] [--out DIR] [key=value]

A round is one seed at five numbers of shots: once as `ddpm-lmk sweep` with N workers on N cores, once as one
`ddpm-lmk finetune` after the other, each of which has all the cores; the order turns from round to round, and what both
take includes the start of every process. Results are compared with cells run alone on as many threads as a worker has
(the last bits of a sum depend on the number of threads): predictions and scores have to be equal bit by bit. Without
data.path=DIR synthetic skulls are packed first. Three rounds are the sweep of 15 cells; six support a ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _subject import RESULTS, add_budget, budget_of, carried_out, device_of

from ddpm_lmk.bench import Budget, Result, Timings, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.sweep import cell_folder
from ddpm_lmk.system.console import print_status
from ddpm_lmk.system.machine import granted_cores
from ddpm_lmk.system.processes import end_children
from ddpm_lmk.system.shipped import find

SHOTS: tuple[int, ...] = (1, 5, 10, 25, 50)
FEWEST_CELLS = 2  # with one there is nothing to share
FILMS = {"train": 60, "test": 10}
COMMAND = (sys.executable, "-m", "ddpm_lmk.cli")


class Arms:
    """The same cells, two ways; a folder for each."""

    def __init__(self, folder: Path, options: argparse.Namespace, words: list[str]) -> None:
        self.folder, self.options, self.words, self.shots = folder, options, words, SHOTS
        content = {"name": "bench", "run": str(options.run.absolute()), "shots": list(SHOTS), "seeds": [0]}
        self.file = folder / "sweep.yaml"
        self.file.write_text(json.dumps({**content, "grids": [{"start": {"scratch": None}}]}))

    def sweep(self, seed: int) -> None:
        """All shots of a seed on warm workers."""
        words = [str(self.file), *self.words, f"seeds=[{seed}]", f"shots={list(self.shots)}"]
        self._call(["sweep", *words, "--out", str(self.folder / f"sweep-{seed}")], self.workers)

    def one_by_one(self, seed: int) -> None:
        """All shots of a seed, one command after the other; each has the whole machine."""
        for shots in self.shots:
            self.alone(shots, seed, self.folder / "alone")

    def alone(self, shots: int, seed: int, out: Path, *, threads: int | None = None) -> Path:
        """One cell through `finetune`; returns its run directory."""
        place = out / f"scratch-k{shots}-s{seed}"
        cell = [f"data.shots={shots}", f"seed={seed}", f"name={place.name}"]
        words = [str(self.options.run), *self.words, *cell, "--out", str(place)]
        self._call(["finetune", *words], 1, threads=threads)
        return place

    @property
    def workers(self) -> int:
        """Of the sweep, which starts no more than it has cells."""
        return min(self.options.workers, len(self.shots))

    def check(self, shots: int) -> bool:
        """Is a cell of the sweep's first round what the same cell is alone, bit by bit?"""
        alone = self.alone(shots, 0, self.folder / "check", threads=max(1, granted_cores() // self.workers))
        swept = cell_folder(self.folder / "sweep-0", alone.name)
        scores = [json.loads((place / "results.json").read_text())["protocols"] for place in (alone, swept)]
        points = [(place / "predictions.csv").read_bytes() for place in (alone, swept)]
        return scores[0] == scores[1] and points[0] == points[1]

    def _call(self, words: list[str], processes: int, *, threads: int | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        place = ["--gpus" if self.options.device == "cuda" else "--cpu", str(processes)]
        done = subprocess.run([*COMMAND, *words, *place], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> None:
    """Measure, compare, write the result file."""
    options = _options()
    budget = budget_of(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arms: list[Arms] = []
        if not budget.run("packing phantoms", lambda: arms.append(Arms(folder, options, _words(options, folder)))):
            return
        [arm] = arms
        settings = {"run_file": options.run.name, "words": options.settings, "cores": granted_cores()}
        settings |= {"workers": options.workers, "steps": options.steps}
        result = Result("sweep", settings=settings, device=options.device, budget=budget)
        begin_s = budget.left_s
        is_tried = budget.run("a cell alone", lambda: arm.alone(SHOTS[0], 0, folder / "tried"))
        if is_tried and math.isfinite(budget.left_s):
            arm.shots, options.rounds = plan(begin_s - budget.left_s, budget, options.rounds)
        if is_tried and options.rounds:
            measure(result, arm, options)
        conclude(result, options.out, options.run.stem, earlier=[RESULTS])


def plan(cell_s: float, budget: Budget, rounds: int) -> tuple[tuple[int, ...], int]:
    """The shots and rounds that fit: as many rounds as wanted of fewer cells, then as many rounds of two as fit.

    Args:
        cell_s: seconds of a cell alone. A sweep is taken to cost as much as its cells one by one.
    """
    cells = next(
        (n for n in range(len(SHOTS), FEWEST_CELLS, -1) if 2 * n * cell_s * rounds < budget.left_s), FEWEST_CELLS
    )
    affordable = min(rounds, int(budget.left_s / (2 * cells * cell_s)))
    if cells < len(SHOTS):
        budget.leave_out(f"cells of {', '.join(map(str, SHOTS[cells:]))} labels: one takes {cell_s:.0f} s")
    if affordable < rounds:
        budget.leave_out(f"{rounds - affordable} of {rounds} rounds")
    return SHOTS[:cells], affordable


def measure(result: Result, arms: Arms, options: argparse.Namespace) -> None:
    """Both ways in turn, and cells compared; what was measured when time is over is reported."""
    budget, timings = result.budget, {"sweep": Timings(), "one by one": Timings()}
    calls: list[tuple[str, Callable[[int], None]]] = [("sweep", arms.sweep), ("one by one", arms.one_by_one)]

    def measure_round(seed: int) -> None:
        spent = {}
        for name, call in calls[:: 1 if seed % 2 == 0 else -1]:
            spent[name] = _time(call, seed)
        for name, (wall_s, cpu_s) in spent.items():
            timings[name].wall_s.append(wall_s)
            timings[name].cpu_s.append(cpu_s)
        print_status(f"round {seed + 1}: " + ", ".join(f"{name} {wall:.1f} s" for name, (wall, _) in spent.items()))

    for seed in range(options.rounds):
        last_s = timings["sweep"].wall_s[-1:] + timings["one by one"].wall_s[-1:]
        if not budget.run(f"round {seed + 1}", partial(measure_round, seed), needs_s=sum(last_s)):
            end_children()  # workers of the sweep that was cut off
    if not timings["sweep"].wall_s:
        return
    checked: dict[int, bool] = {}

    def compare(shots: int) -> None:
        checked[shots] = arms.check(shots)

    for shots in arms.shots[: options.check]:
        budget.run(f"comparing the cell of {shots} labels", partial(compare, shots))
    _report(result, timings, options, arms, checked)


def _time(call: Callable[[int], None], seed: int) -> tuple[float, float]:
    """Seconds on the wall, and of all processes that were started."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call(seed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu_s


def _report(
    result: Result, timings: dict[str, Timings], options: argparse.Namespace, arms: Arms, checked: dict[int, bool]
) -> None:
    cfg, cells = load_run(options.run, arms.words), len(arms.shots)
    images = cells * cfg.train.duration.steps(cfg.train.global_batch_size, 1, 1) * cfg.train.global_batch_size
    conditions = {"run": options.run.stem, "words": options.settings, "steps": options.steps}
    conditions |= {"cells_a_round": cells, "workers": arms.workers}
    for arm, times in timings.items():
        rate = images * len(times.wall_s) / sum(times.wall_s)
        figures: dict[str, Any] = {"images_a_round": images, "images_per_s": rate}
        if arm == "sweep":
            figures |= {"cells_compared": len(checked), "cells_equal_bit_by_bit": sum(checked.values())}
        result.add(arm, times, conditions=conditions, figures=figures)
    for clock in ("wall_s", "cpu_s"):
        found = compare_paired(getattr(timings["sweep"], clock), getattr(timings["one by one"], clock))
        result.ratios.append({"what": f"sweep over one by one, {clock}", **found.facts()})
        print_status(f"sweep over one by one, {clock}: {found}")
    print_status(f"{sum(checked.values())} of {len(checked)} cells equal bit by bit")


def _words(options: argparse.Namespace, folder: Path) -> list[str]:
    """Settings of every cell; without data, some are made."""
    words = [f"train.duration={options.steps} steps", f"runtime.log_every={options.steps} steps", *options.settings]
    if not any(word.startswith("data.path=") for word in words):
        pack("skull", folder / "skulls", PackSettings(kind="phantom", size=128, counts=FILMS), workers=1)
        words += [f"data.path={folder / 'skulls'}", "evaluate.split=test"]
    return words


def _options() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--run", type=find, default=root / "configs" / "finetune" / "isbi_cpu.yaml")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a cell")
    parser.add_argument("--rounds", type=int, default=6, help="seeds; every one is five cells, run both ways")
    parser.add_argument("--workers", type=int, help="of the sweep (default: cores, or GPUs)")
    parser.add_argument("--check", type=int, default=len(SHOTS), help="cells that are compared bit by bit")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_budget(parser, math.inf)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    options = parser.parse_intermixed_args()
    options.device = device_of(options)
    if options.workers is None:
        options.workers = torch.cuda.device_count() if options.device == "cuda" else granted_cores()
    return options


if __name__ == "__main__":
    carried_out(main)
