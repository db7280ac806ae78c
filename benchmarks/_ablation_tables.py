"""What is lost or gained when one part of the recipe is taken away: the table of a sweep of ablations."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _tables import markdown

from ddpm_lmk.report.statistics import Difference, over_seeds


def ablations_table(source: Path) -> str:
    """Rows of a sweep against its recipe: what is lost or gained by each change, with intervals over seeds.

    `source` is the sweep's results.csv, beside its sweep.json.
    """
    summary = json.loads((source.parent / "sweep.json").read_text(encoding="utf-8"))
    with source.open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    parts = []
    for labels in sorted({int(cell["shots"]) for cell in cells}):
        here = [cell for cell in cells if int(cell["shots"]) == labels]
        name = "label" if labels == 1 else "labels"
        heads = [f"{labels} {name}", "seeds", "MRE, mm", "less the recipe, mm", "of 95 %", "verdict", "SDR 2 / 4 mm, %"]
        parts.append(markdown(heads, _ablations(here, summary)))
    return "\n\n".join(parts)


def _ablations(cells: Sequence[Mapping[str, str]], summary: Mapping[str, Any]) -> list[list[str]]:
    """The recipe first, the others from the worst change to the best."""
    texts, names = summary["rows"], list(summary["rows"])
    starts = dict.fromkeys(cell["start"] for cell in cells)
    recipe = next(name for name in names if texts[name].get("title") == "our recipe")
    errors = {start: _errors(cells, start) for start in starts}
    differences = {start: over_seeds(errors[start], errors[recipe]) for start in starts}
    order = sorted(starts, key=lambda start: (start != recipe, -(found.mean if (found := differences[start]) else 0.0)))
    return [
        _ablation(start, texts, errors[start], None if start == recipe else differences[start], cells)
        for start in order
    ]


def _ablation(
    start: str,
    texts: Mapping[str, Mapping[str, str]],
    errors: Mapping[int, float],
    difference: Difference | None,
    cells: Sequence[Mapping[str, str]],
) -> list[str]:
    values = list(errors.values())
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    rates = " / ".join(
        f"{statistics.mean(float(cell[f'original_sdr_{key}']) for cell in cells if cell['start'] == start):.1f}"
        for key in (2, 4)
    )
    title = texts.get(start, {}).get("title") or start
    told = ["", "", ""]
    if difference is not None:
        reach = "–" if difference.low is None else f"{difference.low:+.2f} to {difference.high:+.2f}"
        verdict = "no clear difference" if not difference.is_clear else "worse" if difference.mean > 0 else "better"
        told = [f"{difference.mean:+.2f}", reach, verdict]
    return [title, str(len(values)), f"{statistics.mean(values):.2f}{spread}", *told, rates]


def _errors(cells: Sequence[Mapping[str, str]], start: str) -> dict[int, float]:
    return {int(cell["seed"]): float(cell["original_mre"]) for cell in cells if cell["start"] == start}
