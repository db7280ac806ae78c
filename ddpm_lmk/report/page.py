"""Finished runs to something to read: one self-contained HTML page, and the same table as CSV and Markdown.

Everything in the page is inside it: no font, script or picture is fetched from anywhere. The x-rays of the overlays
are read from the packed data, where it is still there. Numbers in other documents are put in place by
`report_text.update_between_markers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.report import refuse_seen
from ddpm_lmk.report import (
    calibrated,
    compute,
    differences,
    figures,
    html,
    learning,
    notes,
    paper,
    pictures,
    recipes,
    runs,
    unseen,
)
from ddpm_lmk.report import figures as key
from ddpm_lmk.report import learning as steps
from ddpm_lmk.report.collect import PROTOCOLS, Study, collect, paper_rows, paper_tables, parents_of
from ddpm_lmk.report.tables import csv_rows, markdown_table
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.sweep.progress import to_csv
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json


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
    check_writable(out.parent)
    studies = collect([Path(folder) for folder in folders])
    for study in studies:
        refuse_seen([run.results for run in study.runs], acknowledged=acknowledge_leakage)
    paths = [out, out.with_suffix(".csv"), out.with_suffix(".md")]
    title = f"Landmarks from few labels: {', '.join(dict.fromkeys(study.dataset for study in studies))}"
    files.write_text(
        paths[0],
        html.page(title, "".join(_section(study, against_paper=against_paper) for study in studies) + _footer()),
    )
    files.write_text(paths[1], to_csv([row for study in studies for row in csv_rows(study)]))
    files.write_text(paths[2], "\n".join(markdown_table(study) for study in studies))
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
        key.html(study, paper=bool(paper_rows(study.spec)), shape=True),
        f'<div class="figures">{"".join(_mre_figure(study, protocol) for protocol in PROTOCOLS)}</div>',
        _curves(study),
        pictures.panels(study),
        pictures.overlays(study, best),
        "<h2>Landmark by landmark</h2>",
        f'<p class="note">Protocol original, {escape(study.title(best))}, mean over seeds; bars to compare.</p>',
        html.landmark_table(study, best),
        calibrated.section(study),
        _recipes(study),
        "<h2>The runs</h2>",
        html.facts_table(runs.rows(study), runs.HEADINGS),
        "<h2>Compute</h2>",
        html.facts_table(compute.rows(study), compute.HEADINGS, compute.GROUPS),
        f'<p class="note wide">{compute.NOTE}</p>',
        _left_out(study),
    ]
    return "".join(parts)


def _beside_paper(study: Study) -> list[str]:
    """The table beside the paper's, and its footnotes."""
    published = paper_tables()["datasets"].get(study.spec)
    if published is None:
        text = f"The paper has no table for {study.spec}; rows stand alone."
        return ["<h2>Beside the paper</h2>", f'<p class="note">{escape(text)}</p>', paper.table(study)]
    numbered = "".join(f"<li>{escape(note)}</li>" for note in paper.row_notes(study))
    general = "".join(f"<p>{escape(note)}</p>" for note in notes.footnotes(study))
    return [
        f"<h2>Beside table {published['table']} of the paper</h2>",
        paper.table(study),
        differences.tables(study),
        unseen.table(study),
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
    """What has to be said about leakage, and about rows of unlike runs, before any number is."""
    lines = [*refuse_seen([run.results for run in study.runs], acknowledged=True), *recipes.mixed(study)]
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
        "original": "Bars are one standard deviation over seeds; methods stand side by side for clarity.",
        "paper": "The released code's metric, with the paper's own curves where it has them.",
    }[protocol]
    return html.figure(figures.mre_by_labels(study, protocol), caption, f"Protocol {protocol}")


def _curves(study: Study) -> str:
    """Cumulative error and learning curves, as far as the runs have kept what they need."""
    featured = pictures.featured_shots(study.shots)
    middle = featured[len(featured) // 2]
    within = ""
    if any(run.predictions for run in study.runs):
        caption = "Protocol original, all runs of a row together. Dotted verticals are the thresholds of the table."
        within = html.figure(figures.cumulative_error(study, featured), caption, "Cumulative error")
    drawn = []
    if (svg := steps.curve(study, featured)) is not None:
        caption = "Starts that are snapshots of one pre-training run; bands are one standard deviation over seeds."
        drawn.append(html.figure(svg, caption, "Length of pre-training"))
    for svg in learning.pre_training_curves(study).values():
        drawn.append(html.figure(svg, "The runs the starting weights came from; pale: as logged.", "Pre-training"))
    if (svg := learning.fine_tuning_curves(study, middle)) is not None:
        caption = f"All runs with {middle} training labels. Losses of different targets do not compare."
        drawn.append(html.figure(svg, caption, "Fine-tuning"))
    if not within and not drawn:
        return ""
    return f'<h2>Curves</h2>{key.html(study)}{within}<div class="figures three">{"".join(drawn)}</div>'


def _recipes(study: Study) -> str:
    """How every row was trained, and which settings depend on the number of labels; nothing without run files."""
    lines = recipes.rows(study)
    if not lines:
        return ""
    found = recipes.differing(study)
    text = (
        "Settings that depend on the number of labels, a row by itself. " + " ".join(found)
        if found
        else ("No setting depends on the number of labels.")
    )
    table = html.facts_table(lines, recipes.HEADINGS)
    return f'<h2>Recipes</h2>{table}<p class="note wide">{escape(text)}</p>'


def _left_out(study: Study) -> str:
    """What each pre-training did not see, and why."""
    told: dict[Path, list[str]] = {}
    for start in study.starts:
        for parent in parents_of(study, start):
            told.setdefault(parent, []).append(study.title(start))
    lines = []
    for parent, titles in told.items():
        record = read_json(parent / report.FILE_NAME)
        if record is not None:
            found = report.summary(record)
            offered = sum(facts["images"] for facts in record["trained_on"])
            lines.append(
                f"Pre-training of {'; '.join(titles)} left out {found['left_out']:,} of {offered:,} images: "
                f"{found['leaks']:,} were found in protected splits, {found['copies']:,} repeat another one."
            )
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _footer() -> str:
    return f"<footer><p>Made by ddpm-lmk report. The paper: {escape(paper_tables()['source'])}.</p></footer>"
