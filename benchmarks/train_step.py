"""Images per second of training as it really runs: a run through `runs.execute`, loader, updates and logging included.

    python benchmarks/train_step.py RUN.yaml [--steps 30] [--out benchmarks/results] [--device auto] [key=value ...]

Without `data.path=DIR` it packs synthetic chests first. Figures are medians over the lines of metrics.jsonl after the
first third, which warms up; `data_wait` is the share of time the loop waited for its loader. Saving and scoring are no
part of them. Writes `train_step-NAME-DEVICE.json` into `--out`, NAME being the run's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack import pack
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.runfile import load_run
from ddpm_lmk.runs import execute

PHANTOMS = 128
PACKED_SIZE = 256


def main() -> None:
    """Run, read what the run measured, write the result file."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        words = list(options.settings)
        if not any(word.startswith("data.path=") for word in words):
            pack("chest", "phantom", Path(folder) / "chests", counts={"train": PHANTOMS}, size=PACKED_SIZE)
            words.append(f"data.path={folder}/chests")
        cfg = _shortened(load_run(options.run_file, words), options.steps)
        parallel = Parallel(options.device)
        execute(cfg, Path(folder) / "run", parallel=parallel)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    result = {**_circumstances(cfg, options, parallel), **_figures(lines[len(lines) // 3 :], parallel)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"train_step-{cfg.name}-{parallel.device.type}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result)}\n{path}\n")


def _shortened(cfg: RunConfig, steps: int) -> RunConfig:
    """The same run, `steps` long, a line per step, and nothing saved or scored on the way."""
    fields = cfg.model_dump(mode="json")
    fields["train"] |= {"length": steps, "log_every": 1, "checkpoint_every": steps + 1, "snapshot_every": None}
    fields["train"] |= {"evaluate_every": None, "patience": None, "select": "last"}
    fields["data"] |= {"validation_split": None}
    fields["optim"] |= {"plateau": None}
    fields["evaluate"] |= {"split": None, "samples": 0}
    return RunConfig.model_validate(fields)


def _figures(lines: list[dict[str, Any]], parallel: Parallel) -> dict[str, Any]:
    rate = statistics.median(line["images_per_s"] for line in lines)
    is_cuda = parallel.device.type == "cuda"
    return {
        "images_per_s": round(rate, 3),
        "images_per_s_quartiles": [round(q, 3) for q in statistics.quantiles([x["images_per_s"] for x in lines])],
        "data_wait": round(statistics.median(line["data_wait"] for line in lines), 4),
        "steps_measured": len(lines),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if is_cuda else None,
    }


def _circumstances(cfg: RunConfig, options: argparse.Namespace, parallel: Parallel) -> dict[str, Any]:
    is_cuda = parallel.device.type == "cuda"
    return {
        "benchmark": "train_step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_file": str(options.run_file),
        "settings": options.settings,
        "image_size_px": cfg.data.image_size,
        "group_size_images": cfg.train.group_size,
        "micro_batch_images": cfg.train.micro_batch,
        "precision": cfg.train.precision,
        "compile": cfg.train.compile,
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
