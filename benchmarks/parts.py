"""Scores of finished cells of `table2 --scale small`, with what each part of the recipe gives: two looks, and the pool.

    ddpm-lmk sweep configs/sweep/table2.yaml --scale small "only=[ours-pool]" --out runs/t2
    ddpm-lmk evaluate CELL/teacher/teacher --data shards/isbi512 --split test1 --out CELL/on_labels    # of every cell
    python benchmarks/parts.py runs/t2 ...                    # writes benchmarks/results/table2_two_looks/cells.json
    python benchmarks/parts.py runs/pool --name pools         # and the cells of configs/sweep/pool_cpu.yaml
    python benchmarks/parts.py --radius runs/k10s0 ...        # writes radius.json there: of calibrated runs, each with
                                                              # `evaluate RUN --split test1 --out RUN-test1` beside it

The teacher of the teacher of a cell with a pool is the same run on its labels alone: row `ours` of the same seed and
weights, so that no other run is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "results" / "table2_two_looks"
POOL = "-pool"


def scores(start: str, labels: int, results: dict[str, Any]) -> dict[str, Any]:
    """One run: errors in mm at the annotated points, and training in 10^12 operations, those of teachers included."""
    original, train, pool = results["protocols"]["original"], results["train"], results.get("pool")
    return {
        "start": start,
        "labels": labels,
        "seed": results["seed"],
        "mre_mm": original["mre"],
        "median_mm": original["median"],
        "sdr_2mm_pct": original["sdr"]["2"],
        "first_look_mm": results["coarse"]["original"]["mre"],
        "steps": train["steps"],
        "tflop": train["tflop"],
        "accepted_pct": None if pool is None else 100 * pool["points"] / pool["of"],
    }


def rows_of(cell: Path) -> Iterator[dict[str, Any]]:
    """The scores of a cell, and of its labels alone where those were evaluated."""
    start, _, numbers = cell.name.rpartition("-k")
    labels = int(numbers.partition("-s")[0])
    for file, name in ((cell / "results.json", start), (cell / "on_labels" / "results.json", start.removesuffix(POOL))):
        if file.is_file():
            yield scores(name, labels, json.loads(file.read_text()))


def radius_of(run: Path) -> dict[str, Any]:
    """What the radius of a calibrated run held on the films of test 1."""
    fitted = json.loads((run / "radius.json").read_text())
    tested = json.loads((run.with_name(f"{run.name}-test1") / "results.json").read_text())
    held = tested["radius"]
    return {
        "labels": fitted["images"],
        "seed": tested["seed"],
        "folds": fitted["folds"],
        "factor": round(held["factor"], 3),
        "within_pct": round(held["within_pct"], 1),
        "mean_mm": round(held["mean"], 2),
        "constant_within_pct": round(held["constant"]["within_pct"], 1),
        "constant_mean_mm": round(held["constant"]["mean"], 2),
        "least_covered": min(held["per_landmark"], key=lambda landmark: landmark["within_pct"]),
    }


def main() -> None:
    """Collect the cells of sweeps, or radii of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of sweeps; with --radius of runs")
    parser.add_argument("--name", default="cells", help="of the result file")
    parser.add_argument("--radius", action="store_true", help="collect what the radius of each run held")
    options = parser.parse_args()
    if options.radius:
        radii = sorted(map(radius_of, options.folders), key=lambda row: (row["labels"], row["seed"]))
        (OUT / "radius.json").write_text(json.dumps(radii, indent=1) + "\n")
        return
    cells = [cell for sweep in options.folders for cell in sorted((sweep / "cells").iterdir())]
    rows = [row for cell in cells if cell.is_dir() for row in rows_of(cell)]
    rows.sort(key=lambda row: (row["start"], row["labels"], row["steps"], row["seed"]))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{options.name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
