"""How this project measures: things take turns, and a ratio is printed only where the noise supports it.

    timings = alternate({"ours": step_a, "theirs": step_b}, rounds=11)     # A B, B A, A B, ... on any device
    print(compare_paired(timings["ours"].busy_s, timings["theirs"].busy_s))
    result = Result("peers", settings={...})
    result.add("train step", timings["ours"], conditions={"model": "ours", "precision": "fp32"}, figures={...})
    result.write(folder)

`ratio` times calls and compares samples, `budget` keeps a benchmark to its time, `result` is the one form of result
files, `compare` compares and draws those. What is measured is no business of this package; the benchmarks know
(`benchmarks/`).
"""

from __future__ import annotations

from ddpm_lmk.bench.budget import Budget
from ddpm_lmk.bench.ratio import Comparison, Timings, alternate, compare_paired, compare_samples
from ddpm_lmk.bench.result import Result, Row, Stored, read_result, read_results

__all__ = [
    "Budget",
    "Comparison",
    "Result",
    "Row",
    "Stored",
    "Timings",
    "alternate",
    "compare_paired",
    "compare_samples",
    "read_result",
    "read_results",
]
