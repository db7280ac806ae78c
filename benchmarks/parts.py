"""What each part of the recipe gives: the first look alone, the second, and images without labels, from finished cells.

    ddpm-lmk sweep configs/sweep/table2.yaml --scale small "only=[ours-pool]" --out runs/t2
    ddpm-lmk evaluate CELL/teacher/teacher --data shards/isbi512 --split test1 --out CELL/on_labels    # of every cell
    python benchmarks/parts.py runs/t2                        # writes benchmarks/results/table2_two_looks/parts.json

The teacher of the teacher of a cell is the same run on its labels alone, so no other runs are needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "results" / "table2_two_looks" / "parts.json"


def parts_of(cell: Path) -> dict[str, Any] | None:
    """Errors in mm and training in 10^12 operations of one cell; None where its labels alone were not scored."""
    whole, alone = cell / "results.json", cell / "on_labels" / "results.json"
    if not (whole.is_file() and alone.is_file()):
        return None
    pool, labels = json.loads(whole.read_text()), json.loads(alone.read_text())
    crops = labels["train"].get("tflop_crops", None)
    return {
        "labels": pool["labels"]["training"],
        "seed": pool["seed"],
        "first_look_mm": labels["coarse"]["original"]["mre"],
        "second_look_mm": labels["protocols"]["original"]["mre"],
        "pool_first_look_mm": pool["coarse"]["original"]["mre"],
        "pool_mm": pool["protocols"]["original"]["mre"],
        "first_look_tflop": None if crops is None else labels["train"]["tflop"] - crops,
        "second_look_tflop": labels["train"]["tflop"],
        "pool_tflop": pool["train"]["tflop"],
        "accepted_pct": 100 * pool["pool"]["points"] / pool["pool"]["of"],
    }


def main() -> None:
    """Collect the cells of sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    cells = [cell for sweep in parser.parse_args().sweeps for cell in sorted((sweep / "cells").iterdir())]
    rows = [found for cell in cells if cell.is_dir() and (found := parts_of(cell)) is not None]
    keys = [key for key in rows[0] if key not in ("labels", "seed")]
    counts = sorted({row["labels"] for row in rows})
    means = []
    for count in counts:
        alike = [row for row in rows if row["labels"] == count]
        known = {key: [row[key] for row in alike if row[key] is not None] for key in keys}
        figures = {key: statistics.mean(values) if values else None for key, values in known.items()}
        means.append({"labels": count, "seeds": len(alike), **figures})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"means": means, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
