"""The headline table as text: CSV in long form, Markdown, and a way to keep a table in another document up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ddpm_lmk.data.duplicates.report import refuse_seen
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.report.collect import PROTOCOLS, Spread, Study
from ddpm_lmk.report.recipes import mixed
from ddpm_lmk.system import files


def csv_rows(study: Study) -> list[dict[str, Any]]:
    """The headline table in long form: one row per line of it and protocol."""
    rows = []
    for row in study.rows():
        for protocol, score in row.scores.items():
            facts: dict[str, Any] = {"dataset": study.dataset, "split": study.split, "protocol": protocol}
            facts |= {"kind": row.kind, "start": row.method, "labels_training": row.training}
            facts |= {"labels_validation": row.validation, "runs": score.mre[2], "unit": score.unit}
            facts |= {"mre": score.mre[0], "mre_std": score.mre[1]}
            for key, rate in score.sdr.items():
                facts |= {f"sdr_{key}": rate[0], f"sdr_{key}_std": rate[1]}
            rows.append(facts)
    return rows


def markdown_table(study: Study, *, with_paper: bool = True) -> str:
    """The headline table as Markdown, both protocols side by side; no column of success rates that nobody asked for."""
    keys = {name: list(study.runs[0].results["protocols"][name]["sdr"]) for name in PROTOCOLS}
    heads = ["labels", "validation labels", "start", "runs"]
    for name in PROTOCOLS:
        unit = study.runs[0].results["protocols"][name]["unit"]
        heads += [f"{name}: MRE {unit}", *([f"{name}: SDR {'/'.join(keys[name])} %"] if keys[name] else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in study.rows(with_paper=with_paper):
        runs = "–" if row.kind == "mean shape" else str(next(iter(row.scores.values())).mre[2])
        cells = [str(row.training), str(row.validation), row.method, runs]
        for name in PROTOCOLS:
            score = row.scores.get(name)
            cells.append("–" if score is None else _plain(score.mre))
            rates = "–" if score is None else " / ".join(f"{score.sdr[key][0]:.1f}" for key in keys[name])
            cells += [rates] if keys[name] else []
        lines.append("| " + " | ".join(cells) + " |")
    told = [*refuse_seen([run.results for run in study.runs], acknowledged=True), *mixed(study)]
    remarks = "".join(f"{line}\n\n" for line in told)
    head = f"**{study.dataset}**, {study.num_images} images of split {study.split}\n\n"
    return head + remarks + "\n".join(lines) + "\n"


def _plain(value: Spread) -> str:
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def update_between_markers(file: str | Path, name: str, text: str) -> bool:
    """Put `text` between `<!-- NAME -->` and `<!-- /NAME -->` of a document; True if that changed it.

    Raises:
        ConfigError: the two markers are not there, each once.
    """
    path = Path(file)
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ConfigError(f"{path} needs the lines {begin} and {end}, each once and in this order")
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    changed = pattern.sub(lambda match: f"{match[1]}\n{text.strip()}\n{match[2]}", content)
    if changed != content:
        files.write_text(path, changed)
    return changed != content
