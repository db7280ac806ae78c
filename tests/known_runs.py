"""Finished runs whose errors are known, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import dump_run, load_run
from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.inference import scoring

CEPH = SPECS["cephalometric"]
SIZE = (1935, 2400)


def put(path: Path, content: Any) -> None:
    """Write text, or anything else as JSON, without the disk flushes that would slow the tests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_run(
    folder: Path,
    *,
    errors_px: np.ndarray,
    labels: int = 5,
    seed: int = 0,
    weights: str | None = None,
    validation: int = 0,
    spec: DatasetSpec = CEPH,
    truth: dict[str, tuple[np.ndarray, tuple[int, int], float]] | None = None,
    data: Path | None = None,
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """A finished run whose image i is off by `errors_px[i]` to the right, at every landmark, and nothing else."""
    if truth is None:
        points = np.random.default_rng(0).uniform(300, 1500, (len(errors_px), spec.num_landmarks, 2))
        truth = {f"{i:03}": (points[i], SIZE, 0.1) for i in range(len(errors_px))}
    ids = sorted(truth)
    true = np.stack([truth[name][0] for name in ids])
    size = np.array([truth[name][1] for name in ids], float)
    spacing = np.array([truth[name][2] for name in ids])
    found = true + np.stack([errors_px, np.zeros_like(errors_px)], -1)[:, None, :]
    shape = scoring.place_shape(scoring.mean_shape(true[:1], size[:1]), size)

    def both(at: np.ndarray) -> dict[str, Any]:
        return {
            "original": scoring.score_original(at, true, spacing, spec),
            "paper": scoring.score_paper(at, size, true, spec, mm_per_px=spacing),
        }

    results = {
        "kind": "landmarks",
        "name": folder.name,
        "dataset": spec.name,
        "spec": spec.name,
        "split": "test",
        "num_images": len(ids),
        "seed": seed,
        "draw": "first",
        "shots": labels,
        "start": {"weights": weights, "use": "ema"},
        "labels": {"training": labels, "validation": validation},
        "protocols": both(found),
        "mean_shape": both(shape),
        "train": {"steps": 300, "images": 300 * labels, "wall_s": 12.5},
    }
    rows = [["image_id", "landmark_index", "landmark_name", "x", "y", "true_x", "true_y", "error_px", "error_mm"]]
    rows[0] += ["spread_px", "failed"]
    for i, name in enumerate(ids):
        for j, landmark in enumerate(spec.landmark_names):
            error = float(errors_px[i])
            rows.append([name, j, landmark, *found[i, j], *true[i, j], error, error * spacing[i], 3.0, 0])
    put(folder / "predictions.csv", "\n".join(",".join(map(str, row)) for row in rows) + "\n")
    put(folder / "results.json", results)
    put(folder / "done.json", {"config": "0"})
    put(folder / "run.json", {"hardware": {"device": "x86_64", "processes": 1, "cpus": 2, "threads": 1}})
    losses = [{"step": step, "images": step * labels, "loss": 8 / (1 + step / 40)} for step in range(10, 301, 10)]
    put(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in losses) + '{"torn')
    cfg = {"data": {"path": str(data or folder / "no-data")}, "task": {"kind": "landmarks"}}
    put(folder / "config.yaml", dump_run(RunConfig.model_validate(cfg)))
    if settings:
        put(folder / "config.yaml", dump_run(load_run(folder / "config.yaml", settings)))
    return results


def write_sweep(
    folder: Path,
    cells: dict[tuple[str, int, int], float],
    weights: dict[str, str | None],
    rows: dict[str, dict[str, str]] | None = None,
    settings: dict[tuple[str, int], list[str]] | None = None,
    **facts: Any,
) -> None:
    """A sweep folder with one run per (start, labels, seed), off by that many pixels everywhere.

    `settings` are words for the run files of (start, labels).
    """
    listed = []
    images = facts.pop("images", 4)
    for (start, labels, seed), error in cells.items():
        name = f"{start}-k{labels}-s{seed}"
        listed.append({"cell": name, "start": start, "shots": labels, "seed": seed, "status": "done"})
        errors = np.full(images, float(error))
        facts |= {"labels": labels, "seed": seed, "weights": weights[start]}
        write_run(folder / "cells" / name, errors_px=errors, settings=(settings or {}).get((start, labels)), **facts)
    put(folder / "sweep.json", {"kind": "sweep", "name": "known", "rows": rows or {}, "cells": listed})
