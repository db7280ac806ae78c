"""The price of class exact: time per step against class ordered, on one machine, in one run.

    python benchmarks/exactness.py [--processes 1 2] [--steps 16] [--out benchmarks/results]

Every number of processes is one launch, in which the variants take turns step by step, so that a machine that is busy
with other things is busy for all of them. A step is the engine's own: micro-batches of the pre-training task, one
reduction, one update; no loader, no saving. Figures are medians; `cpu_ms` is the processor time of rank 0, which other
work on the machine disturbs less than the clock. `ordered, whole share` computes a process's share at once, as a user
of that class would; with the micro-batch of `exact`, class ordered shows what the tree alone costs. Writes
`exactness_DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddpm_lmk.config import DenoiseConfig, RunConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.launcher import Placement, run_ranks
from ddpm_lmk.system.machine import hardware, versions

if TYPE_CHECKING:
    from ddpm_lmk.engine.parallel import Parallel

WARM_UP = 3  # steps of each variant that are not counted
SIDE, GROUP = 64, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "ordered, whole share": {"exactness": "ordered", "micro_batch": None},
    "ordered, micro_batch 4": {"exactness": "ordered", "micro_batch": 4},
    "exact, micro_batch 4": {"exactness": "exact", "micro_batch": 4},
    "ordered, micro_batch 1": {"exactness": "ordered", "micro_batch": 1},
    "exact, micro_batch 1": {"exactness": "exact", "micro_batch": 1},
}
MODEL = {"width": 24, "multipliers": [1, 2], "head_dim": 16, "linear_attention": [False, True]}


def main() -> None:
    """Measure for each number of processes and write the result file."""
    options = _options()
    if options.worker:
        _work(options.worker, options.steps)
        return
    result: dict[str, Any] = {
        "benchmark": "exactness",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "hardware": hardware(),
        "threads_per_process": 1,
        "versions": versions("ddpm-lmk", "torch", "accelerate"),
        "image_size_px": SIDE,
        "group_size_images": GROUP,
        "model": MODEL,
        "steps_measured": options.steps,
        "processes": {},
    }
    os.environ["OMP_NUM_THREADS"] = "1"
    for count in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            words = [__file__, "--worker", str(found), "--steps", str(options.steps)]
            if run_ranks(words, Placement("cpu", count)):
                raise SystemExit(f"the run with {count} processes failed")
            result["processes"][str(count)] = _compared(json.loads(found.read_text()))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "exactness_cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result['processes'], indent=1)}\n{path}\n")


def _compared(seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians of wall-clock and processor time, and by how much they exceed those of the first variant."""
    medians = {name: [statistics.median(column) for column in zip(*found)] for name, found in seconds.items()}
    base = medians["ordered, whole share"]
    return {
        name: {
            "step_ms": round(1000 * wall, 2),
            "cpu_ms": round(1000 * cpu, 2),
            "step_more_pct": round(100 * (wall / base[0] - 1), 1),
            "cpu_more_pct": round(100 * (cpu / base[1] - 1), 1),
        }
        for name, (wall, cpu) in medians.items()
    }


def _work(found: Path, steps: int) -> None:
    """A rank: one step of each variant in turn, after some that warm up."""
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.engine.rank_checks import kernels

    parallel = Parallel("cpu")
    lanes = {name: _Lane(fields, parallel) for name, fields in VARIANTS.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in lanes}
    for step in range(WARM_UP + steps):
        for name, lane in lanes.items():
            with kernels(lane.cfg.train.exactness, parallel.device):
                parallel.gather(None)  # all ranks begin together
                wall, cpu = time.perf_counter(), time.process_time()
                lane.step(step)
                if step >= WARM_UP:
                    seconds[name].append([time.perf_counter() - wall, time.process_time() - cpu])
    if parallel.is_main:
        found.write_text(json.dumps(seconds))
    parallel.close()


class _Lane:
    """One variant: a model of its own, and its way to update it."""

    def __init__(self, fields: dict[str, Any], parallel: Parallel) -> None:
        from ddpm_lmk.engine.loop import build_updater
        from ddpm_lmk.engine.state import TrainState
        from ddpm_lmk.models import build_model
        from ddpm_lmk.tasks import DenoiseTask

        train = {"group_size": GROUP, **fields}
        data = {"path": "none", "image_size": SIDE}
        self.cfg = RunConfig.model_validate({"data": data, "model": MODEL, "task": {"kind": "denoise"}, "train": train})
        task = self.cfg.task
        assert isinstance(task, DenoiseConfig)
        self._task, self._parallel = DenoiseTask(task, seed=0), parallel
        model = build_model(self.cfg.model, out_channels=1)
        self._state = TrainState.fresh(self.cfg, model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self._updater = build_updater(self.cfg, self._state, parallel)
        share = GROUP // parallel.world
        self._micro = self.cfg.train.given_micro_batch or share
        self._count = share // self._micro

    def step(self, number: int) -> None:
        """What the loop does in a step, on images that do not matter."""
        for k in range(self._count):
            with self._updater.micro_batch(k, of=self._count):
                losses = self._task.loss(self._updater.net, self._batch(number, k))
                self._updater.add(losses.sum(), GROUP)
        self._updater.finish(0.0)
        self._updater.apply(self.cfg.optim.clip)
        self._state.ema.update(number + 1)
        self._updater.clear()

    def _batch(self, number: int, k: int) -> Batch:
        first = number * GROUP + (self._parallel.rank * self._count + k) * self._micro
        images = torch.full((self._micro, 1, SIDE, SIDE), 0.5).to(memory_format=torch.channels_last)
        return Batch(
            images=images,
            points=None,
            to_native=torch.eye(2, 3).expand(self._micro, 2, 3),
            native_size=torch.full((self._micro, 2), float(SIDE)),
            mm_per_px=torch.full((self._micro,), torch.nan),
            positions=torch.arange(first, first + self._micro),
            weight=torch.ones(self._micro),
            ids=tuple(map(str, range(self._micro))),
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
