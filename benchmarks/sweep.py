"""A sweep against the same cells run one by one: wall time, processor time, images per second, and equal results.

    python benchmarks/sweep.py [--run RUN.yaml] [--steps 30] [--rounds 6] [--workers N] [--out DIR] [key=value]

A round is one seed at five numbers of shots: once as `ddpm-lmk sweep` with N workers on N cores, once as one
`ddpm-lmk finetune` after the other, each of which has all the cores; the order turns from round to round, and what both
take includes the start of every process. Results are compared with cells run alone on as many threads as a worker has
(the last bits of a sum depend on the number of threads): predictions and scores have to be equal bit by bit. Without
data.path=DIR synthetic skulls are packed first. Three rounds are the sweep of 15 cells; six support a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _subject import RESULTS, carried_out, device_of

from ddpm_lmk.bench import Result, Timings, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.sweep import cell_folder
from ddpm_lmk.system.machine import granted_cores
from ddpm_lmk.system.shipped import find

SHOTS = (1, 5, 10, 25, 50)
FILMS = {"train": 60, "test": 40}
COMMAND = (sys.executable, "-m", "ddpm_lmk.cli")


class Arms:
    """The same cells, two ways; a folder for each."""

    def __init__(self, folder: Path, options: argparse.Namespace, words: list[str]) -> None:
        self.folder, self.options, self.words = folder, options, words
        content = {"name": "bench", "run": str(options.run.absolute()), "shots": list(SHOTS), "seeds": [0]}
        self.file = folder / "sweep.yaml"
        self.file.write_text(json.dumps({**content, "grids": [{"start": {"scratch": None}}]}))

    def sweep(self, seed: int) -> None:
        """All shots of a seed on warm workers."""
        words = [str(self.file), *self.words, f"seeds=[{seed}]"]
        self._call(["sweep", *words, "--out", str(self.folder / f"sweep-{seed}")], self.options.workers)

    def one_by_one(self, seed: int) -> None:
        """All shots of a seed, one command after the other; each has the whole machine."""
        for shots in SHOTS:
            self.alone(shots, seed, self.folder / "alone")

    def alone(self, shots: int, seed: int, out: Path, *, threads: int | None = None) -> Path:
        """One cell through `finetune`; returns its run directory."""
        place = out / f"scratch-k{shots}-s{seed}"
        cell = [f"data.shots={shots}", f"seed={seed}", f"name={place.name}"]
        words = [str(self.options.run), *self.words, *cell, "--out", str(place)]
        self._call(["finetune", *words], 1, threads=threads)
        return place

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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = _words(options, folder)
        cores = granted_cores()
        settings = {"run_file": options.run.name, "words": options.settings, "cores": cores}
        settings |= {"workers": options.workers, "shots": SHOTS}
        result = Result("sweep", settings=settings, device=options.device)
        arms = Arms(folder, options, words)
        timings = {"sweep": Timings(), "one by one": Timings()}
        begin = time.monotonic()
        for seed in range(options.rounds):
            if seed and time.monotonic() - begin > options.budget_s * seed / (seed + 1):
                break  # another round would not end in time
            calls: list[tuple[str, Callable[[int], None]]] = [("sweep", arms.sweep), ("one by one", arms.one_by_one)]
            for arm, call in calls[:: 1 if seed % 2 == 0 else -1]:
                _time(call, seed, timings[arm])
            _say(f"round {seed + 1}: " + ", ".join(f"{arm} {t.wall_s[-1]:.1f} s" for arm, t in timings.items()))
        threads = max(1, cores // options.workers)
        checked = {shots: _compare(arms, shots, threads) for shots in SHOTS[: options.check]}
        _report(result, timings, options, words, checked)
        conclude(result, options.out, options.run.stem, earlier=[RESULTS])


def _time(call: Callable[[int], None], seed: int, timings: Timings) -> None:
    """Seconds on the wall, and of all processes that were started."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call(seed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    timings.wall_s.append(time.perf_counter() - begin)
    timings.cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _compare(arms: Arms, shots: int, threads: int) -> bool:
    """Is a cell of the sweep what the same cell is alone, bit by bit?"""
    alone = arms.alone(shots, 0, arms.folder / "check", threads=threads)
    swept = cell_folder(arms.folder / "sweep-0", alone.name)
    scores = [json.loads((place / "results.json").read_text())["protocols"] for place in (alone, swept)]
    points = [(place / "predictions.csv").read_bytes() for place in (alone, swept)]
    return scores[0] == scores[1] and points[0] == points[1]


def _report(
    result: Result, timings: dict[str, Timings], options: argparse.Namespace, words: list[str], checked: dict[int, bool]
) -> None:
    cfg = load_run(options.run, words)
    images = len(SHOTS) * cfg.train.length.steps(cfg.train.group_size, 1, 1) * cfg.train.group_size
    conditions = {"run": options.run.stem, "words": options.settings, "cells_a_round": len(SHOTS)}
    for arm, times in timings.items():
        rate = images * len(times.wall_s) / sum(times.wall_s)
        figures: dict[str, Any] = {"images_a_round": images, "images_per_s": rate}
        if arm == "sweep":
            figures |= {"cells_compared": len(checked), "cells_equal_bit_by_bit": sum(checked.values())}
        result.add(arm, times, conditions={**conditions, "workers": options.workers}, figures=figures)
    for clock in ("wall_s", "cpu_s"):
        found = compare_paired(getattr(timings["sweep"], clock), getattr(timings["one by one"], clock))
        result.ratios.append({"what": f"sweep over one by one, {clock}", **found.facts()})
        _say(f"sweep over one by one, {clock}: {found}")
    _say(f"{sum(checked.values())} of {len(checked)} cells equal bit by bit")


def _words(options: argparse.Namespace, folder: Path) -> list[str]:
    """Settings of every cell; without data, some are made."""
    words = [f"train.length={options.steps} steps", f"train.log_every={options.steps} steps", *options.settings]
    if not any(word.startswith("data.path=") for word in words):
        pack("skull", folder / "skulls", PackSettings(kind="phantom", size=128, counts=FILMS))
        words += [f"data.path={folder / 'skulls'}", "evaluate.split=test"]
    return words


def _options() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--run", type=find, default=root / "configs" / "finetune" / "isbi_cpu.yaml")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a cell")
    parser.add_argument("--rounds", type=int, default=6, help="seeds; every one is five cells, run both ways")
    parser.add_argument("--workers", type=int, default=granted_cores(), help="of the sweep")
    parser.add_argument("--check", type=int, default=len(SHOTS), help="cells that are compared bit by bit")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds the rounds may take, about")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    options = parser.parse_intermixed_args()
    options.device = device_of(options)
    return options


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    carried_out(main)
