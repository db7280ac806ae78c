"""Methods side by side, from the report of a sweep: rows are methods, columns numbers of labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from _tables import markdown

ORIGINAL = "original"


def methods_table(source: Path) -> str:
    """Mean radial error in mm of every method; mean and deviation over the seeds, the best of a column in bold.

    Args:
        source: report.csv of a sweep, with its sweep.json beside it.
    """
    rows = [row for row in csv.DictReader(source.read_text().splitlines()) if row["mre"]]
    texts = json.loads((source.parent / "sweep.json").read_text())["rows"]
    labels = sorted({int(row["labels_training"]) for row in rows})
    ours = {(row["start"], int(row["labels_training"])): row for row in rows if row["protocol"] == ORIGINAL}
    methods = sorted({start for start, _ in ours}, key=lambda start: -float(ours[start, labels[-1]]["mre"]))
    best = {count: min(float(row["mre"]) for (_, found), row in ours.items() if found == count) for count in labels}

    def cell(start: str, count: int) -> str:
        if (start, count) not in ours:
            return ""
        mean, spread = float(ours[start, count]["mre"]), float(ours[start, count]["mre_std"])
        text = f"{mean:.2f} ± {spread:.2f}"
        return f"**{text}**" if mean == best[count] else text

    heads = ["start and method", *(f"{count} label{'s' if count > 1 else ''}" for count in labels)]
    return markdown(
        heads,
        [[texts.get(start, {}).get("title", start), *(cell(start, count) for count in labels)] for start in methods],
    )
