"""Errors on the scored films alone that have no copy among the films that could be learnt from.

Published splits may share films. Which ones is known from the `leakage.json` of a pre-training run of the study, which
compares the splits; whatever of them a row learnt from, every row is scored without all of them here.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference.scoring import mean_and_std
from ddpm_lmk.report.collect import Run, Spread, Study, parents_of
from ddpm_lmk.report.figures import colours
from ddpm_lmk.report.html import spread_text, swatch
from ddpm_lmk.system.files import read_json


def copied_films(study: Study) -> set[str]:
    """Scored films with a copy in the training split; empty where no run of the study lists them all."""
    found: set[str] = set()
    for parent in dict.fromkeys(parent for start in study.starts for parent in parents_of(study, start)):
        record = read_json(parent / report.FILE_NAME) or {}
        listed = (record.get("listed") or {}).get("leaks") or []
        if len(listed) == sum((record.get("leaks") or {}).values()):
            found |= _names(study, record, listed)
    return found


def _names(study: Study, record: dict[str, Any], listed: list[dict[str, Any]]) -> set[str]:
    """Names of the films that `listed` leaks are copies of, where the pack they are in is still the same."""
    names = set()
    for facts in record.get("protected") or ():
        if facts["dataset"] != study.dataset or study.split not in facts["splits"]:
            continue
        try:
            manifest = Manifest.open(Path(facts["path"]))
        except DataError:
            continue
        if manifest.fingerprint != facts["fingerprint"]:
            continue
        rows = {each["of"]["row"] for each in listed if each["of"]["dataset"] == study.dataset}
        names |= {manifest.read_record(int(row)).id for row in rows & set(map(int, manifest.rows([study.split])))}
    return names


def without(run: Run, films: set[str]) -> float | None:
    """Mean error of a run over the other films, each landmark alike; None where nothing was kept."""
    errors = [
        float(row[run.error_column]) for name, rows in run.predictions.items() if name not in films for row in rows
    ]
    return float(np.mean(errors)) if errors else None


def table(study: Study) -> str:
    """A row per method, a column per number of labels: the error without the copies, and with them."""
    films = copied_films(study)
    if not films:
        return ""
    heads = "".join(f'<th class="first">{k} {"label" if k == 1 else "labels"}</th>' for k in study.shots)
    lines = []
    for start in study.starts:
        cells = "".join(_cell(study, start, labels, films) for labels in study.shots)
        lines.append(f"<tr><td>{swatch(colours(study)[start])}{escape(study.title(start))}</td>{cells}</tr>")
    left = study.num_images - len(films)
    title = f"MRE on the {left} scored films without a copy among the training films, {study.runs[0].unit}"
    return (
        f"<h3>{title} (protocol original)</h3>"
        '<div class="scroll"><table class="against differences"><thead>'
        f"<tr><th>method</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(study: Study, start: str, labels: int, films: set[str]) -> str:
    values = [value for run in study.select(start, labels) if (value := without(run, films)) is not None]
    score = study.score(start, labels, "original")
    if not values or score is None:
        return '<td class="first">–</td>'
    found: Spread = mean_and_std(values)
    return f'<td class="first">{spread_text(found)}<br><span class="spread">all films: {score.mre[0]:.2f}</span></td>'
