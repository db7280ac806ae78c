"""The runs of a study as a table: what ran, from which weights, for how long, on what."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_lmk.config.load import load_stored
from ddpm_lmk.report.collect import Study, parents_of
from ddpm_lmk.report.recipes import recipes
from ddpm_lmk.system.files import read_json

HEADINGS = (
    "method",
    "weights from",
    "runs",
    "seeds",
    "steps",
    "images seen",
    "median time",
    "hardware",
    "network",
)


def rows(study: Study) -> list[list[str]]:
    """One row per start, and below it the run its weights came from."""
    found = []
    for start in study.starts:
        runs = [run for run in study.runs if run.start == start]
        train = [run.results.get("train") or {} for run in runs]
        seeds = sorted({run.results["seed"] for run in runs})
        times = [entry["wall_s"] for entry in train if entry.get("wall_s") is not None]
        weights = dict.fromkeys(_weights(run.results["start"]) for run in runs)
        networks = dict.fromkeys(each.cfg.model.describe(each.cfg.data.image_size) for each in recipes(study, start))
        found.append(
            [
                study.title(start),
                ", ".join(weights),
                str(len(runs)),
                ", ".join(map(str, seeds)),
                _range([entry.get("steps") for entry in train]),
                _range([entry.get("images") for entry in train]),
                f"{statistics.median(times):,.0f} s" if times else "–",
                _hardware(runs[0].home),
                ", ".join(networks) or "–",
            ]
        )
        found += [_parent_facts(parent) for parent in parents_of(study, start)]
    return found


def _weights(start: dict[str, Any]) -> str:
    return "random" if start["weights"] is None else f"{start['weights']} ({start['use']})"


def _parent_facts(parent: Path) -> list[str]:
    results = read_json(parent / "results.json") or {}
    train = results.get("train") or {}
    time = train.get("wall_s")
    figures_ = [_range([train.get("steps")]), _range([train.get("images")]), "–" if time is None else f"{time:,.0f} s"]
    seed = str(results.get("seed", "–"))
    return ["↳ pre-training", str(parent), "1", seed, *figures_, _hardware(parent), _network(parent)]


def _range(values: Sequence[int | None]) -> str:
    found = sorted({value for value in values if value is not None})
    if not found:
        return "–"
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _hardware(folder: Path) -> str:
    run: dict[str, Any] = read_json(folder / "run.json") or {}
    facts = run.get("hardware") or {}
    if not facts:
        return "–"
    count, threads = facts.get("processes", 1), facts.get("threads", "?")
    names = ", ".join(dict.fromkeys(run.get("devices") or [facts.get("device", "?")]))
    return f"{names}, {count} process{'es' if count != 1 else ''}, {threads} thread{'s' if threads != 1 else ''}"


def _network(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "–"
    cfg = load_stored(folder)
    return cfg.model.describe(cfg.data.image_size)
