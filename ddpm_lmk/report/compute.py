"""What the rows of a study cost: pre-training once, fine-tuning per run, in operations and in hours of a device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_lmk.report.collect import Run, Study, parents_of
from ddpm_lmk.system.files import read_json

GROUPS = (("", 1), ("pre-training, once", 3), ("fine-tuning, a run (median)", 3), ("all its runs", 2))
HEADINGS = ("method", "images", "TFLOP", "hours", "images", "TFLOP", "hours", "hours", "of")
NOTE = (
    "TFLOP: operations of training as executed, 10¹²; scoring is left out. Rows that start from the same pre-training "
    "name it each, though it was run once. Hours are those of the clock, times the devices or threads; a dash is what "
    "a run did not record. The paper tells neither."
)


def rows(study: Study) -> list[list[str]]:
    """One row per start, in the order of the study; what is not known is a dash."""
    return [_row(study, start) for start in study.starts]


def _row(study: Study, start: str) -> list[str]:
    runs = [run for run in study.runs if run.start == start]
    costs = [_parent_cost(parent) for parent in parents_of(study, start)]
    before = [_dash(_total(values)) for values in zip(*costs)] if costs else ["none", "–", "–"]
    images = [float(cost["images"]) for run in runs if (cost := _train(run)).get("images") is not None]
    tflop = [float(cost["tflop"]) for run in runs if (cost := _train(run)).get("tflop") is not None]
    hours = [found for run in runs if (found := _hours(run.home, _train(run))) is not None]
    after = [_dash(statistics.median(values) if values else None) for values in (images, tflop, hours)]
    return [study.title(start), *before, *after, _dash(sum(hours) if hours else None), _unit(runs)]


def _train(run: Run) -> dict[str, Any]:
    return run.results.get("train") or {}


def _parent_cost(parent: Path) -> tuple[float | None, float | None, float | None]:
    train = (read_json(parent / "results.json") or {}).get("train") or {}
    return train.get("images"), train.get("tflop"), _hours(parent, train)


def _total(values: Sequence[float | None]) -> float | None:
    """The sum of what several pre-training runs cost; None where one of them does not say."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _hours(folder: Path, train: dict[str, Any]) -> float | None:
    """Device hours of training: wall time times the GPUs, or times the processor threads, it had."""
    facts = (read_json(folder / "run.json") or {}).get("hardware") or {}
    if train.get("wall_s") is None or not facts:
        return None
    threads = facts.get("threads", 1) if _is_cpu(facts) else 1
    return float(train["wall_s"]) * facts.get("processes", 1) * threads / 3600


def _is_cpu(facts: dict[str, Any]) -> bool:
    return facts.get("device") in ("x86_64", "aarch64", "arm64", "AMD64")


def _unit(runs: Sequence[Run]) -> str:
    """What an hour is an hour of."""
    facts = [(read_json(run.home / "run.json") or {}).get("hardware") or {} for run in runs]
    names = dict.fromkeys(
        f"one thread of {fact['device']}" if _is_cpu(fact) else f"one {fact['device']}" for fact in facts if fact
    )
    return ", ".join(names) or "–"


def _dash(value: float | None) -> str:
    """Three digits, or a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
