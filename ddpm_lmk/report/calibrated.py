"""Do models know their errors? What runs with contour-hugging maps say about it: numbers of every row, and its plot.

The numbers are `reliability` and `calibration` of results.json, the plot is the run's own calibration.png, and the
temperatures are those of its calibration.json.
"""

from __future__ import annotations

from html import escape

from ddpm_lmk.inference.scoring import mean_and_std
from ddpm_lmk.report import html
from ddpm_lmk.report.collect import Run, Spread, Study
from ddpm_lmk.system.files import read_json

PLOT, TEMPERATURES = "calibration.png", "calibration.json"
HEADINGS = (
    "method",
    "labels",
    "runs",
    "expected error",
    "radial error",
    "mean gap",
    "rank correlation",
    "ECE, %",
    "−log p of the landmark's pixel",
    "temperatures",
)
NOTE = (
    "Expected error: the mean distance of the map's pixels from the point that was read, weighted by their probability "
    "(expected radial error). Mean gap: distance of expected from real error over ten bins of equal count, 0 for an "
    "honest model. ECE: expected calibration error of the peak's probability, ten bins up to 0.15 as in the "
    "contour-hugging paper (McCouat and Voiculescu, CVPR 2022); a point is right within the circle of the area of one "
    "pixel of the map. −log p: with temperature 1 → with the fitted ones, on the films they were fitted on."
)


def section(study: Study) -> str:
    """A table of all rows that have expected errors, and the plot of each at its largest number of labels."""
    groups = [
        (start, labels, runs)
        for start in study.starts
        for labels in study.shots
        if (runs := [run for run in study.select(start, labels) if run.results.get("reliability")])
    ]
    if not groups:
        return ""
    rows = [[study.title(start), str(labels), *_facts(runs)] for start, labels, runs in groups]
    most = {start: runs[0] for start, _, runs in groups}  # the last one of a start has the most labels
    plots = "".join(_plot(study, run) for run in most.values())
    figures = f'<div class="figures">{plots}</div>' if plots else ""
    return f'<h2>Calibration</h2><p class="note">{NOTE}</p>{html.facts_table(rows, HEADINGS)}{figures}'


def _facts(runs: list[Run]) -> list[str]:
    """Means and deviations over the runs of a row at one number of labels."""
    found = [run.results["reliability"] for run in runs]
    weights = [[each["count"] for each in facts["bins"]] for facts in found]
    means = [
        mean_and_std(
            [
                sum(n * each[key] for n, each in zip(counts, facts["bins"])) / sum(counts)
                for counts, facts in zip(weights, found)
            ]
        )
        for key in ("expected", "error")
    ]
    gap = mean_and_std([facts["gap"] for facts in found])
    ranks = [facts["correlation"] for facts in found if facts["correlation"] is not None]
    ece = [facts["ece_pct"] for facts in found if facts.get("ece_pct") is not None]
    unit = found[0]["unit"]
    shown = [f"{_plain(value)} {unit}" for value in (*means, gap)]
    shown += [_plain(mean_and_std(values)) if values else "–" for values in (ranks, ece)]
    return [str(len(runs)), *shown, *_tempered(runs)]


def _tempered(runs: list[Run]) -> list[str]:
    """What the fitted temperatures changed, and their range; dashes where there are none."""
    found = [run.results["calibration"] for run in runs if run.results.get("calibration")]
    values = [t for run in runs for t in _temperatures(run).values()]
    if not found:
        return ["–", "none"]
    before, after = (mean_and_std([facts[f"surprise_{when}"] for facts in found])[0] for when in ("before", "after"))
    span = f"{min(values):.2f} to {max(values):.2f}" if values else "–"
    return [f"{before:.2f} → {after:.2f}", f"{span}; {found[0]['learnt_on']}"]


def _temperatures(run: Run) -> dict[str, float]:
    facts = read_json(run.home / TEMPERATURES) or {}
    return dict(zip(facts.get("landmarks") or (), facts.get("temperatures") or ()))


def _plot(study: Study, run: Run) -> str:
    """The plot a run has drawn, and its temperatures; nothing where the file is gone."""
    path = run.folder / PLOT
    if not path.is_file():
        return ""
    temperatures = ", ".join(f"{name.replace('_', ' ')} {t:.2f}" for name, t in _temperatures(run).items())
    told = f"seed {run.results['seed']}. " + (f"Temperatures: {temperatures}." if temperatures else "No temperatures.")
    name = "label" if run.labels == 1 else "labels"
    title = f"{study.title(run.start)}, {run.labels} {name}"
    picture = html.image(path.read_bytes(), f"expected and real errors of {title}", "png")
    return html.figure(picture, escape(f"Each dot is a landmark; {told}"), title)


def _plain(value: Spread) -> str:
    return f"{value[0]:.2f}" if value[1] is None else f"{value[0]:.2f} ± {value[1]:.2f}"
