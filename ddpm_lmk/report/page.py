"""Finished runs to something to read: one self-contained HTML page, and the same table as CSV and Markdown.

Everything in the page is inside it: no font, script or picture is fetched from anywhere. The x-rays of the overlays
are read from the packed data, where it is still there. Numbers in other documents are put in place by
`tables.update_between_markers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.report import refuse_seen
from ddpm_lmk.report import (
    figures,
    html,
    tables,
)
from ddpm_lmk.report.collect import (
    PROTOCOLS,
    RunFolder,
    Study,
    collect,
    labels_text,
    paper_rows,
    paper_tables,
)
from ddpm_lmk.report.paper import beside_paper
from ddpm_lmk.report.style import legend
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
        acknowledge_leakage: write the report although pre-training saw images that are scored; it says so.

    Raises:
        DataError: a folder is neither, nothing in them is finished, or there is leakage that is not acknowledged.
    """
    out = Path(out)
    check_writable(out.parent)  # before minutes of drawing
    studies = collect([Path(folder) for folder in folders])
    # refused before anything is written: a page with such scores must not exist by accident
    for study in studies:
        refuse_seen([run.results for run in study.runs], acknowledged=acknowledge_leakage)
    paths = [out, out.with_suffix(".csv"), out.with_suffix(".md")]
    title = f"Landmarks from few labels: {', '.join(dict.fromkeys(study.dataset for study in studies))}"
    body = "".join(_study(study, against_paper=against_paper) for study in studies)
    source = escape(paper_tables()["source"])
    footer = f"<footer><p>Made by ddpm-lmk report. The paper: {source}.</p></footer>"
    files.write_text(paths[0], html.page(title, body + footer))
    files.write_text(paths[1], to_csv([row for study in studies for row in tables.csv_rows(study)]))
    files.write_text(paths[2], "\n".join(tables.markdown_table(study) for study in studies))
    return paths


def _study(study: Study, *, against_paper: bool) -> str:
    """Everything about one dataset, in the order in which a reader asks for it: result, proof, details."""
    best = study.best_start(max(study.shots))
    by_landmark = f"Protocol original, {escape(study.title(best))}, mean over seeds; bars to compare."
    parts = [
        _header(study),
        *(f'<p class="stamp">{escape(line)}</p>' for line in tables.warnings(study)),
        tables.cards(study),
        beside_paper(study) if against_paper else "",
        f"<h2>Scores</h2>{html.note(_explanation(study))}{tables.score_table(study)}",
        "<h2>Error against labels</h2>",
        legend(study, paper=bool(paper_rows(study.spec)), shape=True),
        html.figures(_mre_figure(study, protocol) for protocol in PROTOCOLS),
        _curves(study),
        figures.one_image_every_method(study),
        figures.overlays(study, best),
        f"<h2>Landmark by landmark</h2>{html.note(by_landmark)}{tables.landmark_table(study, best)}",
        tables.second_look_table(study).html(),
        tables.radius_table(study).html(),
        tables.calibration_table(study).html(),
        figures.calibration_plots(study),
        tables.recipes_table(study).html(),
        tables.runs_table(study).html(),
        tables.compute_table(study).html(),
        *(html.note(escape(line)) for line in _left_out(study)),
    ]
    return "".join(parts)


def _header(study: Study) -> str:
    runs = (
        f"{len(study.runs)} runs" if study.planned <= len(study.runs) else f"{len(study.runs)} of {study.planned} runs"
    )
    return (
        f'<header><p class="eyebrow">few-shot landmark detection</p><h1>{escape(study.dataset)}</h1>'
        f"<p>{escape(tables.verdict(study))} {runs}, scored on the {study.num_images} images of split "
        f"“{escape(study.split)}”.</p></header>"
    )


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
    featured = figures.featured_shots(study.shots)
    middle = featured[len(featured) // 2]
    within = ""
    if any(run.predictions for run in study.runs):
        caption = "Protocol original, all runs of a row together. Dotted verticals are the thresholds of the table."
        within = html.figure(figures.cumulative_error(study, featured), caption, "Cumulative error")
    drawn = []
    if (svg := figures.mre_by_pre_training(study, featured)) is not None:
        caption = "Starts that are snapshots of one pre-training run; bands are one standard deviation over seeds."
        drawn.append(html.figure(svg, caption, "Length of pre-training"))
    for svg in figures.pre_training_curves(study):
        drawn.append(html.figure(svg, "The runs the starting weights came from; pale: as logged.", "Pre-training"))
    if (svg := figures.fine_tuning_curves(study, middle)) is not None:
        caption = f"All runs with {labels_text(middle, 'training')}. Losses of different targets do not compare."
        drawn.append(html.figure(svg, caption, "Fine-tuning"))
    if not within and not drawn:
        return ""
    return f"<h2>Curves</h2>{legend(study)}{within}{html.figures(drawn, 'figures three')}"


def _left_out(study: Study) -> list[str]:
    """What each pre-training did not see, and why."""
    parents: dict[Path, tuple[RunFolder, list[str]]] = {}
    for start in study.starts:
        for parent in study.parents(start):
            parents.setdefault(parent.path, (parent, []))[1].append(study.title(start))
    lines = []
    for parent, titles in parents.values():
        record = read_json(parent.path / report.FILE_NAME)
        if record is not None:
            counts = report.summary(record)
            offered = sum(facts["images"] for facts in record["trained_on"])
            lines.append(
                f"Pre-training of {'; '.join(titles)} left out {counts['left_out']:,} of {offered:,} images: "
                f"{counts['leaks']:,} were found in protected splits, {counts['copies']:,} repeat another one."
            )
    return lines
