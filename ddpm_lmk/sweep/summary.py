"""The files that say how a sweep stands: sweep.json, its cells and rows, and results.csv, the scores of those done."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ddpm_lmk.sweep.expand import Sweep, cell_folder
from ddpm_lmk.system import files
from ddpm_lmk.system.durable import read_json


def write_summary(sweep: Sweep, out: Path, *, done: Collection[str], failed: Mapping[str, str]) -> None:
    """Write OUT/sweep.json and OUT/results.csv from what lies in the cells; `done` and `failed` are names of cells.

    `recipe` is equal for cells that were trained alike but for shots, seed, packs and starting weights.
    """
    rows, scores = [], []
    dataset = None
    for cell in sorted(sweep.cells, key=lambda cell: (cell.start, cell.shots or 10**9, cell.seed)):
        status = "done" if cell.name in done else "failed" if cell.name in failed else "pending"
        facts = {"cell": cell.name, "start": cell.start, "shots": cell.shots, "seed": cell.seed}
        facts |= {"draw": cell.cfg.data.draw, "weights": cell.cfg.init.weights, "recipe": cell.recipe}
        rows.append({**facts, "status": status, "error": failed.get(cell.name)})
        results = read_json(cell_folder(out, cell.name) / "results.json") if status == "done" else None
        if results is not None:
            parts = results["parts"] if results["kind"] == "mixture" else [results]
            dataset = ", ".join(part["dataset"] for part in parts)
            scores += [facts | flat_scores(part) for part in parts if "protocols" in part]  # else it was not scored
    texts = {label: text.model_dump(exclude_none=True) for label, text in sweep.rows.items()}
    stages = {stage.name: str(stage.folder) for stage in sweep.stages}
    facts = {"kind": "sweep", "name": sweep.name, "dataset": dataset}
    summary = {**facts, "rows": texts, "stages": stages, "cells": rows}
    files.write_json(out / "sweep.json", summary)
    files.write_text(out / "results.csv", to_csv(scores))


def flat_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers of a results.json as one flat row."""
    row: dict[str, Any] = {"dataset": results["dataset"], "split": results["split"], "images": results["num_images"]}
    row |= {f"labels_{kind}": count for kind, count in results["labels"].items()}
    for stage, leak in results.get("leakage", {}).items():
        row[f"leaked_{stage}_images"] = leak.get("images")
    for protocol, scores in results["protocols"].items():
        row |= {f"{protocol}_{key}": scores[key] for key in ("unit", "mre", "median", "failed")}
        row |= {f"{protocol}_sdr_{threshold}": rate for threshold, rate in scores["sdr"].items()}
        shape = (results.get("mean_shape") or {}).get(protocol)
        row[f"{protocol}_mean_shape_mre"] = shape["mre"] if shape else None
    train = results.get("train") or {}
    return row | {f"train_{key}": value for key, value in train.items() if key != "wall_s"}  # the same at every run


def to_csv(rows: list[dict[str, Any]]) -> str:
    """CSV text of rows that may have different keys; numbers keep six digits."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
