"""What every method gains or loses over a reference, and what chance could do, as tables.

References are training from random weights, and the start with the lowest error over all numbers of labels: is it
really better than each of the others? Differences are ours less the reference's: a plus means a larger error.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ddpm_lmk.report.collect import SCRATCH, Run, Study
from ddpm_lmk.report.figures import colours
from ddpm_lmk.report.html import signed, swatch
from ddpm_lmk.report.statistics import Difference, over_films, over_seeds


def less_scratch(study: Study, start: str, labels: int) -> tuple[Difference | None, Difference | None]:
    """Error (protocol original) less that from random weights, over seeds and over films."""
    return less(study, start, SCRATCH, labels)


def less(study: Study, start: str, reference: str, labels: int) -> tuple[Difference | None, Difference | None]:
    """Error (protocol original) less that of the reference, over seeds and over films."""
    ours, other = study.select(start, labels), study.select(reference, labels)
    if start == reference or not ours or not other:
        return None, None
    return over_seeds(_by_seed(ours), _by_seed(other)), over_films(_by_film(ours), _by_film(other))


def ratio(study: Study, start: str, reference: str) -> Difference | None:
    """Log of the error over the reference's: its mean over the numbers of labels both have, over seeds."""
    logs: dict[int, list[float]] = {}
    for labels in study.shots:
        ours, other = (_by_seed(study.select(each, labels)) for each in (start, reference))
        for seed in sorted(set(ours) & set(other)):
            logs.setdefault(seed, []).append(float(np.log(ours[seed] / other[seed])))
    full = max(map(len, logs.values()), default=0)
    means = {seed: float(np.mean(values)) for seed, values in logs.items() if len(values) == full}
    return over_seeds(means, dict.fromkeys(means, 0.0))


def best_overall(study: Study) -> str:
    """The start with the lowest geometric mean of errors, of those that have all numbers of labels."""
    found = {}
    for start in study.starts:
        scores = [study.score(start, labels, "original") for labels in study.shots]
        means = [score.mre[0] for score in scores if score is not None]
        if len(means) == len(study.shots):
            found[start] = float(np.mean(np.log(means)))
    return min(found, key=lambda start: found[start]) if found else study.best_start(study.shots[-1])


def _by_seed(runs: Sequence[Run]) -> dict[int, float]:
    return {run.results["seed"]: run.results["protocols"]["original"]["mre"] for run in runs}


def _by_film(runs: Sequence[Run]) -> dict[str, float]:
    """Mean error of each film over the runs."""
    errors = [run.image_errors() for run in runs]
    return {name: float(np.mean([each[name] for each in errors])) for name in (errors[0] if errors else {})}


def tables(study: Study) -> str:
    """One table per reference: random weights, and the best start where that is another one."""
    references = dict.fromkeys([start for start in (SCRATCH, best_overall(study)) if start in study.starts])
    return "".join(_table(study, reference) for reference in references) if len(study.starts) > 1 else ""


def _table(study: Study, reference: str) -> str:
    """A row per method, a column per number of labels, and one for all of them."""
    others = [start for start in study.starts if start != reference]
    heads = "".join(f'<th class="first">{k} {"label" if k == 1 else "labels"}</th>' for k in study.shots)
    lines = [_line(study, start, reference) for start in others]
    return (
        f"<h3>Error less that of “{escape(study.title(reference))}”, {study.runs[0].unit} (protocol original)</h3>"
        '<div class="scroll"><table class="against differences"><thead>'
        f'<tr><th>method</th>{heads}<th class="first">all, %</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(study: Study, start: str, reference: str) -> str:
    cells = "".join(_cell(*less(study, start, reference, labels)) for labels in study.shots)
    name = f"{swatch(colours(study)[start])}{escape(study.title(start))}"
    return f"<tr><td>{name}</td>{cells}{_percent(ratio(study, start, reference))}</tr>"


def _cell(seeds: Difference | None, films: Difference | None) -> str:
    """The difference, with its interval over seeds, and below that over films."""
    if seeds is None:
        return '<td class="first">–</td>'
    mark = " best" if seeds.is_clear else ""
    return f'<td class="first{mark}">{signed(seeds.mean)}<br>{_reach("seeds", seeds)}<br>{_reach("films", films)}</td>'


def _reach(over: str, found: Difference | None) -> str:
    if found is None or found.low is None or found.high is None:
        return f'<span class="spread">{over}: –</span>'
    return f'<span class="spread">{over}: {signed(found.low)} to {signed(found.high)}</span>'


def _percent(found: Difference | None) -> str:
    """A mean ratio as a change in per cent, with its interval over seeds."""
    if found is None:
        return '<td class="first">–</td>'
    mean, low, high = (
        None if value is None else 100 * float(np.expm1(value)) for value in (found.mean, found.low, found.high)
    )
    assert mean is not None
    reach = "–" if low is None or high is None else f"{signed(low, 0)} to {signed(high, 0)}"
    mark = " best" if found.is_clear else ""
    return f'<td class="first{mark}">{signed(mean, 0)}<br><span class="spread">seeds: {reach}</span></td>'
