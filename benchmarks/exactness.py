"""The price of class exact: seconds per step of training against class ordered, on one machine, in one run.

    python -m benchmarks.exactness [--processes 1 2] [--rounds 3] [--steps 12] [--out benchmarks/results]

Every number of processes is one launch, in which the variants take turns, `--rounds` times, so that a busy machine is
busy for all of them. A variant is a short run through `runs.execute` on synthetic chests; its figure is the median over
rounds of the median step. `ordered` with no micro-batch computes a process's whole share at once, what a user of that
class would do; with the micro-batch of `exact` it shows what the tree alone costs. Writes `exactness_DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack import pack
from ddpm_lmk.launcher import Placement, run_ranks
from ddpm_lmk.machine import hardware, versions

WARM_UP = 2  # steps of every run that are not counted
PHANTOMS, SIDE, GROUP = 16, 64, 8
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
        _work(options.worker)
        return
    result: dict[str, Any] = {
        "benchmark": "exactness",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu",
        "hardware": hardware(),
        "threads_per_process": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "versions": versions("ddpm-lmk", "torch", "accelerate"),
        "image_size_px": SIDE,
        "group_size_images": GROUP,
        "model": MODEL,
        "rounds": options.rounds,
        "steps_counted_per_round": options.steps - WARM_UP,
        "processes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        pack("chest", "phantom", Path(folder) / "chests", counts={"train": PHANTOMS}, size=SIDE)
        for count in options.processes:
            job = Path(folder) / f"job-{count}.json"
            job.write_text(json.dumps({"folder": folder, "rounds": options.rounds, "steps": options.steps}))
            words = ["-m", "benchmarks.exactness", "--worker", str(job)]
            if run_ranks(words, Placement("cpu", count)):
                raise SystemExit(f"the run with {count} processes failed")
            result["processes"][str(count)] = _compared(json.loads(job.with_suffix(".out").read_text()))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "exactness_cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result['processes'], indent=1)}\n{path}\n")


def _compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median over rounds, and the share by which a variant is slower than the first."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    base = medians["ordered, whole share"]
    return {
        name: {
            "step_ms": round(1000 * median, 2),
            "step_ms_rounds": [round(1000 * value, 2) for value in seconds[name]],
            "more_than_whole_share_pct": round(100 * (median / base - 1), 1),
        }
        for name, median in medians.items()
    }


def _work(path: Path) -> None:
    """A rank: all variants in turn, each round in the same process."""
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.runs import Workbench, execute

    job = json.loads(path.read_text())
    parallel, workbench = Parallel("cpu"), Workbench()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(job["rounds"]):
        for name, fields in VARIANTS.items():
            out = Path(job["folder"]) / f"{parallel.world}-{number}-{name.replace(' ', '')}"
            cfg = _config(Path(job["folder"]) / "chests", {**fields, "length": job["steps"]})
            execute(cfg, out, parallel=parallel, workbench=workbench)
            lines = parallel.on_main((out / "metrics.jsonl").read_text).splitlines()
            rates = [json.loads(line)["images_per_s"] for line in lines if '"images_per_s"' in line]
            seconds[name].append(statistics.median(GROUP / rate for rate in rates[WARM_UP:]))
    if parallel.is_main:
        path.with_suffix(".out").write_text(json.dumps(seconds))
    parallel.close()


def _config(data: Path, train: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"path": str(data), "image_size": SIDE},
            "model": MODEL,
            "task": {"kind": "denoise"},
            "train": {"group_size": GROUP, "log_every": 1, "checkpoint_every": 10**6, "ema": {"warmup": True}, **train},
        }
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
