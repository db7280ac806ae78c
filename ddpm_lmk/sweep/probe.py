"""How many workers should share a device? Tried out: one, two and four of them train the longest cell for some steps.

A small network leaves much of a large GPU idle, and on a CPU the same holds for threads that wait for one another; how
much only the device knows. Each trial is a sweep of its own in a temporary folder, so what is tried is what runs.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.launcher import Device
from ddpm_lmk.sweep.expand import Cell, Sweep, cell_folder
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.signals import check_stopped

COUNTS = (1, 2, 4)
STEPS = 24  # the second half counts: the first warms up, and waits for the others to start
LEAST_GAIN = 1.05


def workers_per_device(wanted: str, sweep: Sweep, *, device: Device, say: Callable[[str], None]) -> int:
    """What `--per-device` asks for: a number, or `auto` for what the probe finds."""
    if wanted == "auto":
        return choose_per_device(sweep, device=device, say=say)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConfigError(f"--per-device {wanted}: wanted a number of workers, or auto")
    return int(wanted)


def choose_per_device(sweep: Sweep, *, device: Device, say: Callable[[str], None]) -> int:
    """The number of workers on one device with the highest rate; a larger number has to gain 5 %."""
    best, best_rate = 1, 0.0
    for count in COUNTS:
        rate = measure_rate(sweep.cells[0], count, device=device)
        if rate is None:
            say(f"probe: {count} workers do not fit on one device")
            break
        say(f"probe: {count} worker{'s' if count > 1 else ''} on one device, {rate:.1f} images/s")
        if rate < LEAST_GAIN * best_rate:
            break
        best, best_rate = count, rate
    return best


def measure_rate(cell: Cell, count: int, *, device: Device) -> float | None:
    """Images per second of `count` workers together; None where not all of them could train."""
    cells = tuple(replace(cell, name=f"probe-{number}", cfg=_shortened(cell.cfg, number)) for number in range(count))
    with tempfile.TemporaryDirectory(prefix="ddpm-lmk-probe-") as folder:
        out = Path(folder)
        console = Console(file=io.StringIO())
        code = run_sweep(Sweep("probe", cells), out, per_device=count, device=device, console=console)
        check_stopped(code)
        if code:
            return None
        return sum(_rate(cell_folder(out, cell.name)) for cell in cells)


def _shortened(cfg: RunConfig, number: int) -> RunConfig:
    """The same training for some steps from random weights, nothing validated, scored or saved on the way."""
    fields = cfg.model_dump(mode="json")
    fields |= {"name": f"probe-{number}"}
    fields["runtime"] |= {"log_every": 1, "checkpoint_every": STEPS + 1}
    fields["train"] |= {"duration": STEPS, "snapshot_every": None}
    fields["train"] |= {"evaluate_every": None, "patience": None, "select": "last"}
    fields["data"] |= {"validation_split": None}
    fields["optim"] |= {"plateau": None}
    fields["init"] |= {"weights": None}
    fields["evaluate"] |= {"split": None}
    return RunConfig.model_validate(fields)


def _rate(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines[len(lines) // 2 :])
