"""Workers of a sweep are stopped and killed in the middle of cells: their cells are tried once more."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from ddpm_lmk.sweep.progress import last_step
from ddpm_lmk.system.files import read_json
from tests.faults.harness import ROOT, are_gone
from tests.faults.sweep_soak import FINE_TUNING

CODE = """
import sys
from pathlib import Path
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.sweep.run import run_sweep
sys.exit(run_sweep(load_sweep(sys.argv[1], out=Path(sys.argv[2])), stall_s=float(sys.argv[3])))
"""
STALL_S = 6.0


class Sweep:
    """A sweep with one worker, in a process of its own."""

    def __init__(self, file: Path, out: Path) -> None:
        self.out, self.said = out, out.with_suffix(".txt")
        self._lost = 0
        words = [sys.executable, "-c", CODE, str(file), str(out), str(STALL_S)]
        with self.said.open("a") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)

    def worker(self) -> psutil.Process:
        [found] = psutil.Process(self.process.pid).children()
        return found

    def until(self, condition: Callable[[], bool], *, seconds: float = 240) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                self.process.kill()
                raise AssertionError(f"did not happen, exit code {self.process.returncode}:\n{self.said.read_text()}")
            time.sleep(0.02)

    def until_stepping(self, cell: str, *, past: int = 0) -> int:
        """Until this cell has made some steps more; returns how many it has."""
        path = self.out / "cells" / cell / "metrics.jsonl"
        self.until(lambda: last_step(path) > past + 3)
        return last_step(path)

    def until_another(self, before: psutil.Process) -> None:
        """Until another worker is there."""
        self.until(lambda: self.said.read_text().count("tries it once more") > self._lost)
        self._lost += 1
        assert are_gone([before.pid])


def write_sweep(folder: Path, data: Path) -> Path:
    run = FINE_TUNING | {"data": {"path": str(data), "image_size": 32}}
    run["train"] = {"duration": "60 steps", "global_batch_size": 2}
    run["runtime"] = {"workers": 0, "log_every": "1 steps", "checkpoint_every": "5 steps"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    grid = {"shots": [2], "seeds": [0, 1, 2], "start": {"scratch": None}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "hurt", "run": "run.yaml", "grids": [grid]}))
    return folder / "sweep.yaml"


def tables_of(out: Path) -> dict[Path, bytes]:
    files = (out / "results.csv", *out.glob("cells/*/predictions.csv"))
    return {path.relative_to(out): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_stopped_and_a_killed_worker_cost_no_cell_and_a_cell_that_loses_two_fails(
    tmp_path: Path, packed_phantoms: Path
) -> None:
    file = write_sweep(tmp_path, packed_phantoms)
    assert Sweep(file, tmp_path / "peaceful").process.wait(300) == 0
    sweep = Sweep(file, tmp_path / "hurt")

    sweep.until_stepping("scratch-k2-s0")
    stopped = sweep.worker()
    stopped.suspend()
    sweep.until_another(stopped)
    assert "made no progress (rank 0 (process" in sweep.said.read_text()
    assert "stopped by a signal) at step " in sweep.said.read_text()
    [stacks] = (sweep.out / "stacks").iterdir()
    assert "most recent call first" in stacks.read_text()

    sweep.until_stepping("scratch-k2-s1")
    killed = sweep.worker()
    killed.kill()
    sweep.until_another(killed)

    done = sweep.until_stepping("scratch-k2-s2")
    killed = sweep.worker()
    killed.kill()
    sweep.until_another(killed)
    sweep.until_stepping("scratch-k2-s2", past=done)
    sweep.worker().kill()

    assert sweep.process.wait(120) == 1, sweep.said.read_text()
    said = sweep.said.read_text()
    assert "scratch-k2-s2 FAILED: its worker died with exit code -9" in said
    assert "2 of 3 cells done, 1 failed" in said
    failure = read_json(sweep.out / "cells" / "scratch-k2-s2.error.json")
    assert failure is not None
    assert (failure["type"], failure["exit_code"]) == ("WorkerLost", -9)
    assert Sweep(file, sweep.out).process.wait(300) == 0
    tables = [tables_of(out) for out in (tmp_path / "peaceful", sweep.out)]
    assert len(tables[0]) == 4
    assert tables[0] == tables[1]
