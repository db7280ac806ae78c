"""Is one method better than another? Differences over seeds (shots, weights, order) and over images, kept apart.

Both intervals are of the difference of two mean radial errors, of 95 %, and from pairs: runs of the same seed learn
from the same shots, and every method is scored on the same images. Over seeds it is Student's t, which with three
seeds is as wide as three seeds are few. Over images it is the percentile bootstrap, which says nothing about other
seeds. Differences are ours minus the reference's: a plus means a larger error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ddpm_lmk.report import html
from ddpm_lmk.report.collect import SCRATCH, Run, Study, labels_text
from ddpm_lmk.report.html import signed
from ddpm_lmk.report.style import method_name

RESAMPLES = 4000  # the ends of the interval then move by about 1 % of its width from one seed to the next
# Two-sided 95 % quantiles of Student's t by degrees of freedom; above these, the normal's.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
NORMAL_QUANTILE = 1.960


@dataclass(frozen=True)
class Difference:
    """A mean difference of `count` pairs and its interval; no interval from a single pair."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Does the interval leave out zero?"""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def over_seeds(ours: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Mean of `ours` - `other` over the seeds both have, with Student's interval; None where they share none."""
    values = np.array([ours[seed] - other[seed] for seed in sorted(set(ours) & set(other))])
    if not len(values):
        return None
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Difference(mean, None, None, 1)
    reach = T_QUANTILES.get(count - 1, NORMAL_QUANTILE) * float(values.std(ddof=1)) / count**0.5
    return Difference(mean, mean - reach, mean + reach, count)


def over_images(ours: Mapping[str, float], other: Mapping[str, float]) -> Difference | None:
    """Mean of `ours` - `other` over the images both have, with a bootstrap interval that is the same at every call."""
    values = np.array([ours[name] - other[name] for name in sorted(set(ours) & set(other))])
    if len(values) < 2:
        return None
    # one seed for all pairs of methods: their intervals are of the same draws of images
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high), len(values))


def difference(study: Study, start: str, reference: str, labels: int) -> tuple[Difference | None, Difference | None]:
    """Error (protocol original) minus that of the reference, over seeds and over images; None where one has no run."""
    ours, other = study.select(start, labels), study.select(reference, labels)
    if start == reference or not ours or not other:
        return None, None
    return over_seeds(_by_seed(ours), _by_seed(other)), over_images(_by_image(ours), _by_image(other))


def log_ratio(study: Study, start: str, reference: str) -> Difference | None:
    """Log of the error over the reference's: its mean over the numbers of labels both have, over seeds."""
    logs: dict[int, list[float]] = {}
    for labels in study.shots:
        ours, other = (_by_seed(study.select(each, labels)) for each in (start, reference))
        for seed in sorted(set(ours) & set(other)):
            logs.setdefault(seed, []).append(float(np.log(ours[seed] / other[seed])))
    # a seed that lacks a number of labels would weigh the others more than its fellows do
    full = max(map(len, logs.values()), default=0)
    means = {seed: float(np.mean(values)) for seed, values in logs.items() if len(values) == full}
    return over_seeds(means, dict.fromkeys(means, 0.0))


def best_overall(study: Study) -> str:
    """The start with the lowest geometric mean of errors, of those that have all numbers of labels."""
    errors = {labels: study.errors(labels) for labels in study.shots}
    whole = [start for start in study.starts if all(start in by_start for by_start in errors.values())]
    # geometric: with one label errors are ten times those with fifty and would decide alone
    means = {start: float(np.mean(np.log([by_start[start] for by_start in errors.values()]))) for start in whole}
    return min(means, key=lambda start: means[start]) if means else study.best_start(study.shots[-1])


def _by_seed(runs: Sequence[Run]) -> dict[int, float]:
    return {run.seed: run.results["protocols"]["original"]["mre"] for run in runs}


def _by_image(runs: Sequence[Run]) -> dict[str, float]:
    """Mean error of each image over the runs."""
    errors = [run.image_errors() for run in runs]
    return {name: float(np.mean([each[name] for each in errors])) for name in (errors[0] if errors else {})}


def difference_tables(study: Study) -> str:
    """One table per reference: random weights, and the start with the lowest error where that is another one."""
    references = dict.fromkeys([start for start in (SCRATCH, best_overall(study)) if start in study.starts])
    return "".join(_table(study, reference) for reference in references) if len(study.starts) > 1 else ""


def _table(study: Study, reference: str) -> str:
    """A row per method, a column per number of labels, and one for all of them."""
    heads = [labels_text(labels) for labels in study.shots]
    heads = [html.head("method"), *(html.head(head, "first") for head in [*heads, "all, %"])]
    lines = []
    for start in (start for start in study.starts if start != reference):
        cells = [_cell(*difference(study, start, reference, labels)) for labels in study.shots]
        cells.append(_percent(log_ratio(study, start, reference)))
        lines.append(html.row([html.cell(method_name(study, start)), *cells]))
    title = f"Error minus that of “{escape(study.title(reference))}”, {study.runs[0].unit} (protocol original)"
    return f"<h3>{title}</h3>{html.table([html.row(heads)], lines, 'against differences')}"


def _cell(seeds: Difference | None, images: Difference | None) -> str:
    """The difference, with its interval over seeds, and below that over images."""
    if seeds is None:
        return html.cell("–", "first")
    # bold by seeds alone: images say nothing about another draw of shots
    text = f"{signed(seeds.mean)}<br>{_interval('seeds', seeds)}<br>{_interval('images', images)}"
    return html.cell(text, f"first{' best' if seeds.is_clear else ''}")


def _percent(ratio: Difference | None) -> str:
    """A mean log ratio as a change in per cent, with its interval over seeds."""
    if ratio is None:
        return html.cell("–", "first")
    # exact, where 100 * log would be off by 19 points at half the error
    change = [None if log is None else 100 * float(np.expm1(log)) for log in (ratio.mean, ratio.low, ratio.high)]
    percent = Difference(change[0] or 0.0, change[1], change[2], ratio.count)
    text = f"{signed(percent.mean, 0)}<br>{_interval('seeds', percent, digits=0)}"
    return html.cell(text, f"first{' best' if ratio.is_clear else ''}")


def _interval(over: str, difference: Difference | None, *, digits: int = 2) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return f'<span class="spread">{over}: –</span>'
    return f'<span class="spread">{over}: {signed(difference.low, digits)} to {signed(difference.high, digits)}</span>'
