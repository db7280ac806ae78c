"""Training as it really runs: images per second, waiting for data, and what the engine adds to a loop by hand.

    ddpm-lmk bench train [--model PRESET | --run RUN.yaml] [--steps 30] [--out DIR] [key=value ...]

`training` is a run through `fit`, loader, updates and logging included; without `data.path=DIR` synthetic chests are
packed first. `engine step` and `bare step` take turns inside one process on the same images, which are in memory: what
the ratio says is the engine's own cost (keyed noise, checks, exchange, metrics), everything but saving and scoring.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _bare import BareLoop, TurnTaking
from _subject import RESULTS, Subject, budget_of, carried_out, device_of, option_parser, run_config

from ddpm_lmk.bench import Budget, Result, compare_paired
from ddpm_lmk.bench.compare import conclude
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.loop import Loaders, fit
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.directory import RunDir

PHANTOMS, PACKED = 128, "chests"
WARM_UP = 3
FEWEST_STEPS = 8


def main() -> None:
    """Measure both, and write the result file."""
    parser = option_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each")
    options = parser.parse_intermixed_args()
    device, budget = device_of(options), budget_of(options)
    cfg = run_config(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared: list[tuple[Subject, RunConfig, float]] = []
        if not budget.run("the network and its data", lambda: prepared.append(prepare(cfg, options, folder))):
            return
        [(subject, run, step_s)] = prepared
        steps = affordable_steps(step_s, budget, options.steps)
        subject.cfg, run = (shortened(each, steps + WARM_UP) for each in (subject.cfg, run))
        result = Result("train", settings=subject.cfg.model_dump(mode="json"), device=device, budget=budget)
        try:
            budget.run("training", lambda: measure_training(result, subject, run, folder), parts=3)
            if steps >= FEWEST_STEPS:
                budget.run("the engine's overhead", lambda: measure_overhead(result, subject, folder))
        finally:  # what fails takes nothing with it that was measured
            conclude(result, options.out, f"{cfg.name}-{subject.precision}", earlier=[RESULTS])


def affordable_steps(step_s: float, budget: Budget, wanted: int) -> int:
    """Steps that fit, besides those to warm up: of the run and of both loops, or only of the run."""
    steps = min(wanted, int(budget.left_s / (3 * step_s)) - WARM_UP)
    if steps < FEWEST_STEPS:
        budget.leave_out(f"the engine's overhead: a ratio needs {FEWEST_STEPS} steps, of {step_s:.1f} s here")
        steps = max(1, min(FEWEST_STEPS - 1, int(budget.left_s / step_s) - WARM_UP))
    if steps < wanted:
        budget.leave_out(f"{wanted - steps} of {wanted} steps")
    return steps


def prepare(cfg: RunConfig, options: argparse.Namespace, folder: Path) -> tuple[Subject, RunConfig, float]:
    """The network, its run with data, and the seconds of a step; phantoms are packed where no data is given."""
    subject = Subject(options, cfg=cfg)
    subject.step()
    begin = time.perf_counter()
    subject.step()
    passes = cfg.train.global_batch_size // subject.batch_images
    step_s = passes * (time.perf_counter() - begin)
    fields = cfg.model_dump(mode="json")
    if [str(path) for path in cfg.data.path] == ["."]:
        settings = PackSettings(kind="phantom", counts={"train": PHANTOMS}, size=cfg.data.image_size)
        pack("chest", folder / PACKED, settings, workers=1)
        fields["data"] |= {"path": [str(folder / PACKED)]}
    fields["runtime"] |= {"log_every": 1}
    return subject, RunConfig.model_validate(fields), step_s


def shortened(cfg: RunConfig, steps: int) -> RunConfig:
    """The same run, `steps` long, with nothing saved or scored on the way."""
    fields = cfg.model_dump(mode="json")
    fields["runtime"] |= {"checkpoint_every": steps + 1, "keep_every": None}
    fields["train"] |= {"duration": steps, "snapshot_every": None}
    fields["train"] |= {"evaluate_every": None, "patience": None, "select": "last"}
    fields["data"] |= {"validation_split": None}
    fields["optim"] |= {"plateau": None}
    fields["evaluate"] |= {"split": None, "samples": 0}
    return RunConfig.model_validate(fields)


def measure_training(result: Result, subject: Subject, cfg: RunConfig, folder: Path) -> None:
    """A real run on packed shards, a line of metrics per step."""
    cpu = time.process_time()
    execute(cfg, folder / "run", parallel=subject.parallel)
    cpu = time.process_time() - cpu
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = [cfg.train.global_batch_size / line["images_per_s"] for line in lines]
    waited = [line["data_wait"] * wall_s for line, wall_s in zip(lines, seconds)]
    figures: dict[str, Any] = {"data_wait_share_pct": 100 * sum(waited) / sum(seconds)}
    figures |= {"largest_data_wait_share_pct": 100 * max(line["data_wait"] for line in lines)}
    figures |= {"cpu_s_per_step_start_included": cpu / (len(lines) + WARM_UP)}
    if subject.device == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    is_packed_here = cfg.data.path[0] == str(folder / PACKED)
    conditions = {
        **subject.conditions(),
        "group_images": cfg.train.global_batch_size,
        "data": "phantoms, prepared shards" if is_packed_here else "given",
    }
    samples = {"wall_s": seconds, "images_per_s": [line["images_per_s"] for line in lines]}
    row = result.add("training", samples, conditions=conditions, figures=figures)
    row.warm_up = WARM_UP


def measure_overhead(result: Result, subject: Subject, folder: Path) -> None:
    """The engine and a loop by hand, a step each in turn."""
    subject.state.step = 0  # it has tried some already
    loader = TurnTaking(subject, BareLoop(subject).step, warm_up=WARM_UP)
    with RunDir.lock(folder / "turns", subject.cfg) as run:
        loaders = Loaders(loader)  # type: ignore[arg-type] # what `fit` uses of a loader
        fit(subject.cfg, subject.task, subject.state, loaders, subject.parallel, run)
    clock = "wall_s" if subject.device == "cuda" else "cpu_s"
    engine, around = getattr(loader.turns.engine, clock), getattr(loader.turns.bare, clock)
    bare = [(before + after) / 2 for before, after in itertools.pairwise(around)][: len(engine)]
    engine = engine[: len(bare)]  # every engine step stands between two bare ones
    found = compare_paired(engine, bare)
    facts = found.facts()
    whole = {"ratio_of_medians": median(engine) / median(bare), "ratio_of_sums": sum(engine) / sum(bare)}
    result.add("engine step", loader.turns.engine, conditions=subject.conditions())
    result.add("bare step", loader.turns.bare, conditions=subject.conditions())
    result.ratios.append({"what": "engine step over bare step", "clock": clock, **facts, **whole})


if __name__ == "__main__":
    carried_out(main)
