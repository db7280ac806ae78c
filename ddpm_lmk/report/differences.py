"""What every method gains or loses over training from random weights, and what chance could do, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ddpm_lmk.report.data import SCRATCH, Run, Study
from ddpm_lmk.report.figures import colours
from ddpm_lmk.report.html import swatch
from ddpm_lmk.report.significance import Difference, over_films, over_seeds


def less_scratch(study: Study, start: str, labels: int) -> tuple[Difference | None, Difference | None]:
    """Error (protocol original) less that from random weights, over seeds and over films."""
    ours, other = study.select(start, labels), study.select(SCRATCH, labels)
    if start == SCRATCH or not ours or not other:
        return None, None
    return over_seeds(_by_seed(ours), _by_seed(other)), over_films(_by_film(ours), _by_film(other))


def _by_seed(runs: Sequence[Run]) -> dict[int, float]:
    return {run.results["seed"]: run.results["protocols"]["original"]["mre"] for run in runs}


def _by_film(runs: Sequence[Run]) -> dict[str, float]:
    """Mean error of each film over the runs."""
    errors = [run.image_errors() for run in runs]
    return {name: float(np.mean([each[name] for each in errors])) for name in (errors[0] if errors else {})}


def table(study: Study) -> str:
    """A row per method, a column per number of labels; nothing where no run began with random weights."""
    others = [start for start in study.starts if start != SCRATCH]
    if SCRATCH not in study.starts or not others:
        return ""
    heads = "".join(f'<th class="first">{k} {"label" if k == 1 else "labels"}</th>' for k in study.shots)
    lines = [_line(study, start) for start in others]
    unit = study.runs[0].unit
    return (
        f"<h3>Error less that of “{escape(study.title(SCRATCH))}”, {unit} (protocol original)</h3>"
        '<div class="scroll"><table class="against differences"><thead>'
        f"<tr><th>method</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(study: Study, start: str) -> str:
    cells = "".join(_cell(*less_scratch(study, start, labels)) for labels in study.shots)
    return f"<tr><td>{swatch(colours(study)[start])}{escape(study.title(start))}</td>{cells}</tr>"


def _cell(seeds: Difference | None, films: Difference | None) -> str:
    """The difference, with its interval over seeds, and below that over films."""
    if seeds is None:
        return '<td class="first">–</td>'
    mark = " best" if seeds.is_clear else ""
    return f'<td class="first{mark}">{seeds.mean:+.2f}<br>{_reach("seeds", seeds)}<br>{_reach("films", films)}</td>'


def _reach(over: str, found: Difference | None) -> str:
    if found is None or found.low is None:
        return f'<span class="spread">{over}: –</span>'
    return f'<span class="spread">{over}: {found.low:+.2f} to {found.high:+.2f}</span>'
