"""Benchmarks whose work grows with the machine end in their share on 64 cores and on 8 GPUs, which are played here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _subject
import device
import pytest
import scaling
import sweep
import torch

from ddpm_lmk.bench import Budget
from ddpm_lmk.bench import ratio as ratios
from ddpm_lmk.bench import result as results
from ddpm_lmk.cli import bench
from ddpm_lmk.system import accelerator
from tests.bench.test_budget import Clock

CORES, GPUS, STARTING_S, WRITING_S = 64, 8, 12.0, 6.0
MODULES = {"device": device, "scaling": scaling, "sweep": sweep}


class Machine:
    """A clock, and what each benchmark did; everything that would take time moves the clock by `slowness` of it."""

    def __init__(self, slowness: float) -> None:
        self.clock, self.slowness = Clock(), slowness
        self.left_out: dict[str, list[str]] = {}
        self.processes: list[int] = []
        self.workers: list[int] = []

    def turns(self, result: Any, *words: Any) -> None:
        """Stand-in for a part of `bench device`: 30 calls in turn."""
        calls = {str(number): self.clock.spend(0.1 * self.slowness) for number in range(30)}
        result.budget.alternate(calls, rounds=11, needs_all=False)

    def ranks(self, count: int, options: Any, device: str, *, budget_s: float) -> dict[str, Any]:
        """Stand-in for the ranks of `bench scaling`: the more, the longer they take to start."""
        self.processes.append(count)
        start_s, round_s = self.slowness * (5 + count), self.slowness
        self.clock.now += max(start_s + 2 * round_s, min(budget_s, start_s + 13 * round_s))
        samples = {"wall_s": [1.0] * 6, "cpu_s": [1.0] * 6}
        ways = dict.fromkeys(("alone", "side by side", "weak"), samples)
        facts = {"ways": {name: dict(each) for name, each in ways.items()}, "left_out": ["strong"], "warm_up": 1}
        return facts | {"start_s": start_s, "round_s": round_s, "gradient_bytes": 4}

    def command(self, words: list[str], processes: int, **settings: Any) -> None:
        """Stand-in for a command of `bench sweep`."""
        self.workers.append(processes)
        self.clock.now += self.slowness * (9 if words[0] == "sweep" else 5)

    def conclude(self, name: str, result: Any, *words: Any, **settings: Any) -> None:
        """Stand-in for writing and drawing."""
        self.left_out[name] = result.budget.left_out
        self.clock.now += WRITING_S

    def start(self, script: Path, words: list[str], *, limit_s: float) -> int:
        """Stand-in for the process of a benchmark; here it runs in this one."""
        begin = self.clock.now
        self.clock.now += STARTING_S
        sys.argv = [script.stem, *words]
        MODULES[script.stem].main()
        assert self.clock.now - begin <= limit_s, f"{script.stem} would have been killed"
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], Machine]:
    """Makes a machine of 64 cores, and as many GPUs and as slow as asked for."""

    def make(gpus: int, slowness: float) -> Machine:
        played = Machine(slowness)
        clock, patch = played.clock, monkeypatch.setattr
        patch(sys, "argv", [])
        patch(torch.cuda, "is_available", lambda: gpus > 0)
        patch(torch.cuda, "device_count", lambda: gpus)
        for module in (ratios, accelerator):
            patch(module, "time", SimpleNamespace(perf_counter=clock, process_time=clock))
        for module in (scaling, sweep):  # a benchmark's process is its own; this one has helpers of other tests
            patch(module, "end_children", lambda: None)
        patch(results, "measure_anchor", lambda device: [1.0])
        patch(_subject, "Budget", partial(Budget, clock=clock))
        patch(bench, "_start", played.start)
        for name, module in MODULES.items():
            patch(module, "granted_cores", lambda: CORES)
            patch(module, "conclude", partial(played.conclude, name))
        for part in ("measure_products", "measure_memory", "measure_transfers", "measure_convolutions"):
            patch(device, part, played.turns)
        patch(scaling, "run_on", played.ranks)
        patch(sweep.Arms, "_call", staticmethod(played.command))
        patch(sweep.Arms, "check", lambda arms, shots: True)
        patch(sweep, "_words", lambda options, folder: [])
        patch(sweep, "_report", lambda *words: None)
        return played

    return make


@pytest.mark.parametrize("gpus", [0, GPUS])
@pytest.mark.parametrize("slowness", [0.1, 1.0, 4.0])
def test_all_parts_end_in_their_budget_on_64_cores(
    machine: Callable[[int, float], Machine], gpus: int, slowness: float, tmp_path: Path
) -> None:
    played = machine(gpus, slowness)
    begin, budget_s = played.clock.now, 450.0
    codes = bench._in_time(
        list(MODULES), {name: Path(f"{name}.py") for name in MODULES}, [], tmp_path, budget_s, clock=played.clock
    )
    assert set(codes.values()) == {0}
    assert played.clock.now - begin <= budget_s
    # never as many processes as there are cores
    assert max(played.processes) <= scaling.MOST_CPU_PROCESSES
    assert max(played.workers) <= len(sweep.SHOTS)
    if slowness < 1:
        assert played.processes == [2, 4, 8]
        assert played.left_out["sweep"] == []
    if slowness > 1:
        assert "8 processes" in played.left_out["scaling"]
        assert any("rounds" in each for each in played.left_out["sweep"])
