"""Timing of calls that take turns, so that whatever else a machine does hits all of them alike.

Three clocks are read. `wall_s` is what a user waits. `cpu_s` is processor time of this process with all its threads: on
a shared CPU it hardly depends on what else runs. `device_s`, on CUDA, is the time between two events in the stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FEWEST_ROUNDS = 6  # below it no interval of 95 % exists (see `ratio`)


@dataclass
class Timings:
    """Seconds of one call, round by round; the lists of calls that took turns belong together by index."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    device_s: list[float] = field(default_factory=list)  # empty on a CPU
    warm_up: int = 0

    @property
    def busy_s(self) -> list[float]:
        """The clock that other programs disturb least: of the device, or of the processor."""
        return self.device_s or self.cpu_s

    def samples(self) -> dict[str, list[float]]:
        """What a result file keeps."""
        kept = {"wall_s": self.wall_s, "cpu_s": self.cpu_s, "device_s": self.device_s}
        return {clock: values for clock, values in kept.items() if values}


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    warm_up: int = 2,
    device: str = "cpu",
    budget_s: float | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Timings]:
    """Time every call once a round, in turn; the order turns round from one round to the next (A B, B A, A B, ...).

    Args:
        warm_up: rounds before, not kept.
        device: "cpu", or a CUDA device, on which a call counts until its work is done.
        budget_s: no round begins after so many seconds, if there are `FEWEST_ROUNDS` by then.
        tell: is called with (rounds done, rounds).
    """
    found = {name: Timings(warm_up=warm_up) for name in calls}
    since = time.perf_counter()
    for number in range(warm_up + rounds):
        done = number - warm_up
        if budget_s is not None and done >= FEWEST_ROUNDS and time.perf_counter() - since > budget_s:
            break
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            wall_s, cpu_s, device_s = _time(calls[name], device)
            if done < 0:
                continue
            found[name].wall_s.append(wall_s)
            found[name].cpu_s.append(cpu_s)
            if device_s is not None:
                found[name].device_s.append(device_s)
        if tell is not None:
            tell(max(0, done + 1), rounds)
    return found


def _time(call: Callable[[], object], device: str) -> tuple[float, float, float | None]:
    """Seconds by the three clocks of one call."""
    if not device.startswith("cuda"):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu, None
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    begin.record(torch.cuda.current_stream(torch.device(device)))
    call()
    end.record(torch.cuda.current_stream(torch.device(device)))
    torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu, begin.elapsed_time(end) / 1e3


def environment(device: str) -> dict[str, Any]:
    """The device and threads of a measurement, for a result file."""
    import torch

    is_cuda = device.startswith("cuda")
    return {
        "device": "cuda" if is_cuda else "cpu",
        "device_name": torch.cuda.get_device_name(device) if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "threads": torch.get_num_threads(),
    }
