"""What saving costs training: the wait at a save, and what the write in the background takes from the steps beside it.

    python benchmarks/checkpoint_save.py [RUN.yaml] [--steps 60] [--every 10] [--out benchmarks/results] [key=value ...]

A real run saves every `--every` steps. A step's time is from one line of metrics to the next; a save's wait is the time
`Checkpointer.save` takes; a write's time is that of the thread, which is what a save without a thread would cost. The
cost at the interval of the run file is (wait + what the steps beside the write lost) / interval, of a step. Times
of a processor that others use too are noisy; `cpu_ms` is what the training thread itself spent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.checkpointer import Checkpointer
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.log import RunLog
from ddpm_lmk.system.machine import hardware, versions
from ddpm_lmk.system.shipped import find, shipped

WARM_UP_STEPS = 3


class Span(NamedTuple):
    """From one moment to another, and the processor time of the thread in between."""

    begin: float
    end: float
    cpu_s: float

    @property
    def wall_s(self) -> float:
        """Seconds on the clock."""
        return self.end - self.begin

    def overlap_s(self, other: Span) -> float:
        """Seconds that both share."""
        return max(0.0, min(self.end, other.end) - max(self.begin, other.begin))


def main() -> None:
    """Run, and write the result file."""
    options = _options()
    waits, writes, lines = _time(Checkpointer, "save"), _time(RunDir, "save_checkpoint"), _time(RunLog, "metrics")
    with tempfile.TemporaryDirectory() as folder:
        words = list(options.settings)
        full = load_run(options.run_file, [*words, "data.path=unused"])
        if not any(word.startswith("data.path=") for word in words):
            pack("chest", "phantom", Path(folder) / "chests", counts={"train": 32}, size=full.data.image_size)
            words.append(f"data.path={folder}/chests")
        cfg = _shortened(load_run(options.run_file, words), options.steps, options.every)
        parallel = Parallel("auto")
        execute(cfg, Path(folder) / "run", parallel=parallel)
        [newest, *_] = sorted((Path(folder) / "run" / "checkpoints").glob("step-*"), reverse=True)
        size = sum(file.stat().st_size for file in newest.iterdir())
    result = {
        "benchmark": "checkpoint_save",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_file": "/".join(options.run_file.parts[-3:]),
        "image_size_px": cfg.data.image_size,
        "group_size_images": cfg.train.group_size,
        "device": parallel.device.type,
        "checkpoint_mib": round(size / 2**20, 1),
        "interval_steps": full.train.checkpoint_every.count,
        **_figures(waits, writes, lines, full.train.checkpoint_every.count),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions("torch", "safetensors"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"checkpoint_save-{cfg.name}-{parallel.device.type}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result)}\n{path}\n")


def _figures(waits: list[Span], writes: list[Span], lines: list[Span], interval: float) -> dict[str, Any]:
    """Milliseconds, and shares of a step; the first save, which takes its memory, is told apart."""
    steps = [Span(a.end, b.end, b.cpu_s - a.cpu_s) for a, b in itertools.pairwise(lines)][WARM_UP_STEPS:]
    beside = [step for step in steps if any(step.overlap_s(write) for write in writes)]
    quiet = [step for step in steps if step not in beside]
    step_s, step_cpu_s = (statistics.median(getattr(step, kind) for step in quiet) for kind in ("wall_s", "cpu_s"))
    wait_s, wait_cpu_s = (statistics.median(getattr(wait, kind) for wait in waits[1:]) for kind in ("wall_s", "cpu_s"))
    write_s = statistics.median(write.wall_s for write in writes)
    waited_s = sum(step.overlap_s(wait) for step in beside for wait in waits)
    lost_s = (sum(step.wall_s - step_s for step in beside) - waited_s) / len(writes)
    return {
        "saves": len(waits),
        "step_ms": round(1e3 * step_s, 2),
        "step_cpu_ms": round(1e3 * step_cpu_s, 2),
        "wait_ms": round(1e3 * wait_s, 3),
        "wait_cpu_ms": round(1e3 * wait_cpu_s, 3),
        "wait_ms_first": round(1e3 * waits[0].wall_s, 3),
        "write_ms": round(1e3 * write_s, 1),
        "lost_beside_a_write_ms": round(1e3 * lost_s, 1),
        "wait_pct_of_step": round(100 * wait_s / step_s, 2),
        "wait_cpu_pct_of_step": round(100 * wait_cpu_s / step_cpu_s, 2),
        "without_thread_pct_of_step": round(100 * (wait_s + write_s) / step_s, 1),
        "cost_at_interval_pct_of_step": round(100 * (wait_s + max(lost_s, 0.0)) / step_s / interval, 4),
    }


def _time(owner: type, name: str) -> list[Span]:
    """Note when each call of a method begins and ends; `cpu_s` is the thread's own clock for lines of metrics."""
    spans: list[Span] = []
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **more: Any) -> Any:
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        try:
            return method(*arguments, **more)
        finally:
            clock = time.thread_time()
            spans.append(Span(begin, time.perf_counter(), clock if owner is RunLog else clock - cpu_begin))

    setattr(owner, name, timed)
    return spans


def _shortened(cfg: RunConfig, steps: int, every: int) -> RunConfig:
    """The same run, `steps` long, a line per step, saving often, and nothing scored."""
    fields = cfg.model_dump(mode="json")
    fields["train"] |= {"length": steps, "log_every": 1, "checkpoint_every": every, "snapshot_every": None}
    fields["train"] |= {"evaluate_every": None, "patience": None, "select": "last"}
    fields["data"] |= {"validation_split": None}
    fields["optim"] |= {"plateau": None}
    fields["evaluate"] |= {"split": None, "samples": 0}
    return RunConfig.model_validate(fields)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=find, nargs="?", default=shipped("configs") / "pretrain" / "isbi_cpu.yaml")
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
