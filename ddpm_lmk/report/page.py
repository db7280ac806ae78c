"""Finished runs to something to read: one self-contained HTML page, and the same table as CSV and Markdown.

Everything in the page is inside it: no font, script or picture is fetched from anywhere. The x-rays of the overlays
are read from the packed data, where it is still there. Numbers in other documents are put in place by
`report_text.update_between_markers`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ddpm_lmk import atomic, leakage
from ddpm_lmk.durable import read_json
from ddpm_lmk.leakage import refuse_seen
from ddpm_lmk.report import against, compute, differences, figures, html, notes, pictures, steps
from ddpm_lmk.report.data import PROTOCOLS, Study, collect, paper_tables, parent_of
from ddpm_lmk.report.text import csv_rows, markdown_table
from ddpm_lmk.runfile import load_run
from ddpm_lmk.sweep.summary import to_csv


def write_report(
    folders: Sequence[str | Path], out: str | Path, *, against_paper: bool = False, acknowledge_leakage: bool = False
) -> list[Path]:
    """Write `out` (HTML), and beside it the same name with .csv and .md; returns the three paths.

    Args:
        folders: sweep folders and run directories, finished or under way; only finished runs count.
        against_paper: put our table beside the paper's, with differences, significance and what has to be known.
        acknowledge_leakage: write the report although pre-training saw films that are scored; it says so.

    Raises:
        DataError: a folder is neither, nothing in them is finished, or there is leakage that is not acknowledged.
    """
    out = Path(out)
    studies = collect([Path(folder) for folder in folders])
    for study in studies:
        refuse_seen([run.results for run in study.runs], acknowledged=acknowledge_leakage)
    paths = [out, out.with_suffix(".csv"), out.with_suffix(".md")]
    title = f"Landmarks from few labels: {', '.join(dict.fromkeys(study.dataset for study in studies))}"
    atomic.write_text(
        paths[0],
        html.page(title, "".join(_section(study, against_paper=against_paper) for study in studies) + _footer()),
    )
    atomic.write_text(paths[1], to_csv([row for study in studies for row in csv_rows(study)]))
    atomic.write_text(paths[2], "\n".join(markdown_table(study) for study in studies))
    return paths


def _section(study: Study, *, against_paper: bool) -> str:
    """Everything about one dataset."""
    best = study.best_start(max(study.shots))
    parts = [
        _header(study),
        _stamp(study),
        html.cards(study),
        *(_beside_paper(study) if against_paper else []),
        "<h2>Scores</h2>",
        f'<p class="note">{_explanation(study)}</p>',
        html.headline_table(study),
        "<h2>Error against labels</h2>",
        f'<div class="figures">{"".join(_mre_figure(study, protocol) for protocol in PROTOCOLS)}</div>',
        _curves(study),
        pictures.panels(study),
        pictures.overlays(study, best),
        "<h2>Landmark by landmark</h2>",
        f'<p class="note">Protocol original, {escape(study.title(best))}, mean over seeds; bars to compare.</p>',
        html.landmark_table(study, best),
        "<h2>The runs</h2>",
        html.facts_table(*_facts(study)),
        "<h2>Compute</h2>",
        html.facts_table(compute.rows(study), compute.HEADINGS),
        _left_out(study),
    ]
    return "".join(parts)


def _beside_paper(study: Study) -> list[str]:
    """The table beside the paper's, and its footnotes."""
    published = paper_tables()["datasets"].get(study.spec)
    if published is None:
        text = f"The paper has no table for {study.spec}; rows stand alone."
        return ["<h2>Beside the paper</h2>", f'<p class="note">{escape(text)}</p>', against.table(study)]
    numbered = "".join(f"<li>{escape(note)}</li>" for note in against.row_notes(study))
    general = "".join(f"<p>{escape(note)}</p>" for note in notes.footnotes(study))
    return [
        f"<h2>Beside table {published['table']} of the paper</h2>",
        against.table(study),
        differences.table(study),
        f'<div class="footnotes"><ol>{numbered}</ol>{general}</div>',
    ]


def _header(study: Study) -> str:
    runs = (
        f"{len(study.runs)} runs" if study.planned <= len(study.runs) else f"{len(study.runs)} of {study.planned} runs"
    )
    return (
        f'<header><p class="eyebrow">few-shot landmark detection</p><h1>{escape(study.dataset)}</h1>'
        f"<p>{escape(html.verdict(study))} {runs}, scored on the {study.num_images} images of split "
        f"“{escape(study.split)}”.</p></header>"
    )


def _stamp(study: Study) -> str:
    """What has to be said about leakage before any number is."""
    lines = refuse_seen([run.results for run in study.runs], acknowledged=True)
    return "".join(f'<p class="stamp">{escape(line)}</p>' for line in lines)


def _explanation(study: Study) -> str:
    text = (
        "MRE: mean radial error, mean ± standard deviation over the runs of a row. SDR: share of landmarks within a "
        "distance. Protocol original: annotated points in pixels of the original file, with the right spacing. "
        "Protocol paper: exactly what the released code of the paper computes. The mean shape is the average of the "
        "same training labels and never looks at a picture. Validation labels are labels too: they count whenever a "
        "run used them to stop or to choose weights."
    )
    table = paper_tables()["datasets"].get(study.spec)
    if table is not None:
        text += (
            f" The paper's own rows (its table {table['table']}) are for {table['test_images']} test images and also "
            f"used {table['validation_labels']} validation labels."
        )
    return text


def _mre_figure(study: Study, protocol: str) -> str:
    caption = {
        "original": "Bands are one standard deviation over seeds.",
        "paper": "The released code's metric, with the paper's own curves where it has them.",
    }[protocol]
    return html.figure(figures.mre_by_labels(study, protocol), caption, f"Protocol {protocol}")


def _curves(study: Study) -> str:
    """Cumulative error and learning curves, as far as the runs have kept what they need."""
    featured = pictures.featured_shots(study.shots)
    middle = featured[len(featured) // 2]
    drawn = []
    if any(run.predictions for run in study.runs):
        caption = "Dotted verticals are the thresholds of the table."
        drawn.append(html.figure(figures.cumulative_error(study, featured), caption, "Cumulative error"))
    if (svg := steps.curve(study, featured)) is not None:
        caption = "Starts that are snapshots of one pre-training run; bands are one standard deviation over seeds."
        drawn.append(html.figure(svg, caption, "Length of pre-training"))
    if (svg := figures.pre_training_curves(study)) is not None:
        drawn.append(html.figure(svg, "The runs the starting weights came from; pale: as logged.", "Pre-training"))
    if (svg := figures.fine_tuning_curves(study, middle)) is not None:
        drawn.append(html.figure(svg, f"All runs with {middle} training labels.", "Fine-tuning"))
    return f'<h2>Curves</h2><div class="figures three">{"".join(drawn)}</div>' if drawn else ""


def _facts(study: Study) -> tuple[list[list[str]], list[str]]:
    """One row per start: what ran, for how long, on what."""
    headings = [
        "starting weights",
        "weights from",
        "runs",
        "seeds",
        "steps",
        "images seen",
        "median time",
        "hardware",
        "network",
    ]
    rows = []
    for start in study.starts:
        runs = [run for run in study.runs if run.start == start]
        train = [run.results.get("train") or {} for run in runs]
        seeds = sorted({run.results["seed"] for run in runs})
        times = [entry["wall_s"] for entry in train if entry.get("wall_s") is not None]
        weights = runs[0].results["start"]["weights"]
        rows.append(
            [
                start,
                "random" if weights is None else f"{weights} ({runs[0].results['start']['use']})",
                str(len(runs)),
                ", ".join(map(str, seeds)),
                _range([entry.get("steps") for entry in train]),
                _range([entry.get("images") for entry in train]),
                f"{statistics.median(times):,.0f} s" if times else "–",
                _hardware(runs[0].home),
                _network(runs[0].home),
            ]
        )
        parent = parent_of(runs[0])
        if parent is not None:
            rows.append(_parent_facts(parent))
    return rows, headings


def _left_out(study: Study) -> str:
    """What each pre-training did not see, and why."""
    lines = []
    for start in study.starts:
        parent = parent_of(next(run for run in study.runs if run.start == start))
        record = None if parent is None else read_json(parent / leakage.FILE_NAME)
        if record is not None:
            found = leakage.summary(record)
            offered = sum(facts["images"] for facts in record["trained_on"])
            lines.append(
                f"Pre-training of {start} left out {found['left_out']:,} of {offered:,} images: {found['leaks']:,} "
                f"were found in protected splits, {found['copies']:,} repeat another one."
            )
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


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
    facts: dict[str, Any] = (read_json(folder / "run.json") or {}).get("hardware") or {}
    if not facts:
        return "–"
    count = facts.get("processes", 1)
    return (
        f"{facts.get('device', '?')}, {count} process{'es' if count != 1 else ''}, {facts.get('threads', '?')} threads"
    )


def _network(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "–"
    cfg = load_run(folder / "config.yaml")
    return cfg.model.describe(cfg.data.image_size)


def _footer() -> str:
    return f"<footer><p>Made by ddpm-lmk report. The paper: {escape(paper_tables()['source'])}.</p></footer>"
