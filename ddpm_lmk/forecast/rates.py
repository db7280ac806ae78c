"""What result files say of a device: which are of the one that is here, and its rates of arithmetic and bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ddpm_lmk.measure import Row, Stored
from ddpm_lmk.system.cores import cpu_name


@dataclass(frozen=True)
class Rates:
    """What a device does per second when so many threads of it work, by `bench device`."""

    flops: Mapping[int, float]
    bytes: Mapping[int, float]

    def share(self, processes: int, threads: int) -> tuple[float, float]:
        """Arithmetic and bandwidth of one of `processes` with `threads` each."""
        flops, moved = (_at(table, processes * threads) / processes for table in (self.flops, self.bytes))
        return flops, moved


def read_rates(device: Stored, precision: str) -> Rates:
    """The fastest matrix product, and the triad, by threads."""
    flops: dict[int, float] = {}
    moved: dict[int, float] = {}
    for row in device.rows:
        threads = row.conditions.get("threads", 1)
        if row.what == "matrix product" and row.conditions["precision"] == precision:
            flops[threads] = max(flops.get(threads, 0.0), 1e9 * median(row.samples["gflop_per_s"]))
        if row.what == "triad":
            moved[threads] = 1e9 * median(row.samples["gbyte_per_s"])
    return Rates(flops, moved)


def this_machine(device: str) -> str | None:
    """The device as result files name it."""
    if device != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def is_here(found: Stored, device: str) -> bool:
    """Was this measured on the kind of device that is here?"""
    hardware: Mapping[str, Any] = found.facts["hardware"]
    return hardware["device"] == device and (hardware["device_name"] or hardware["cpu"]) == this_machine(device)


def whole_step(found: Stored) -> Row:
    """The row of a step result that has the whole step."""
    return next(row for row in found.rows if row.what == "train step")


def threads_of(step: Stored) -> int:
    """Threads whose processor time a step result adds up; one where the clock is that of a GPU."""
    is_cuda = step.facts["hardware"]["device"] == "cuda"
    return 1 if is_cuda else int(whole_step(step).conditions["threads"])


def _at(table: Mapping[int, float], threads: int) -> float:
    """The rate at a number of threads: measured, or between the nearest that were."""
    counts = sorted(table)
    return float(np.interp(threads, counts, [table[count] for count in counts]))
