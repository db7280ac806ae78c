"""The pre-training runs that starting weights came from, where they are still there."""

from __future__ import annotations

from pathlib import Path

from ddpm_lmk.report.collect import Run, Study


def parent_of(run: Run) -> Path | None:
    """The run directory a run's starting weights came from, where it is still there."""
    weights = run.results["start"]["weights"]
    if weights is None:
        return None
    path = Path(weights)
    for candidate in (path, *path.parents[:2]):
        if (candidate / "metrics.jsonl").is_file():
            return candidate
    return None


def parents_of(study: Study, start: str) -> list[Path]:
    """Those of a row: one, or several where few and many labels start from different weights."""
    found = (parent_of(run) for run in study.runs if run.start == start)
    return list(dict.fromkeys(parent for parent in found if parent is not None))
