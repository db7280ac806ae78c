"""Benchmarks, run in this process as `ddpm-lmk bench` runs them in their own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from ddpm_lmk.bench import read_results
from ddpm_lmk.bench.result import Stored

# On a machine that is busy with other things a benchmark leaves out what its usual time has no room for.
LONG = ("--budget-s", "3600")
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMOKE = ROOT / "configs" / "smoke"


def run_benchmark(name: str, out: Path, *words: object) -> Stored:
    """`python benchmarks/NAME.py WORDS... --out OUT`, in as long as it takes, and the result it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py"), *map(str, words), *LONG, "--out", str(out)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return read_results(out, name)[-1]
