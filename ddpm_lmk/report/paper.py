"""Our table beside the paper's: the same rows, columns and rounding, and the differences.

Where a row of ours stands beside one of the paper's is said by the sweep file (`rows`). Numbers are compared under
protocol `paper`, which computes what the paper's released code computes; the error under protocol `original` stands
beside. Nothing here is typed: ours come from results.json, theirs from `paper_tables.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ddpm_lmk.report.collect import MEAN_SHAPE, Row, Score, Spread, Study, paper_rows, paper_tables
from ddpm_lmk.report.figures import SHAPE_COLOUR, colours
from ddpm_lmk.report.html import signed, spread_text, swatch


@dataclass(frozen=True)
class Pair:
    """A row of ours beside one of the paper's; either may be missing."""

    title: str
    start: str | None
    training: int
    validation: int | None
    ours: dict[str, Score] | None
    paper: Row | None


def pairs(study: Study) -> list[Pair]:
    """All rows, by number of labels: the mean shape, ours, then the paper's that nothing of ours stands beside."""
    published = _published(study)
    found = []
    for labels in study.shots:
        shape = {protocol: study.mean_shape(labels, protocol) for protocol in ("paper", "original")}
        found.append(Pair(f"{MEAN_SHAPE} (no picture)", None, labels, 0, shape, None))
        used = set()
        for row in study.rows(with_paper=False):
            if row.kind != "run" or row.training != labels:
                continue
            method = study.texts.get(row.method, {}).get("paper")
            theirs = published.get((method, labels)) if method else None
            used.add(method)
            title = study.title(row.method)
            found.append(Pair(title, row.method, labels, row.validation, row.scores, theirs))
        rest = [row for (method, k), row in published.items() if k == labels and method not in used]
        found += [Pair(row.method, None, labels, None, None, row) for row in rest]
    return found


def _published(study: Study) -> dict[tuple[str, int], Row]:
    """The paper's rows for this dataset by method and number of labels; of tables 4 and 5 those that are asked for."""
    table = paper_tables()["datasets"].get(study.spec)
    asked = {text.get("paper") for text in study.texts.values()}
    methods = dict.fromkeys(
        entry["method"]
        for entry in (table["rows"] if table else ())
        if "table" not in entry or entry["method"] in asked
    )
    return {(method, row.training): row for method in methods for row in paper_rows(study.spec, [method])}


def table(study: Study) -> str:
    """The table as HTML."""
    thresholds = list(study.runs[0].results["protocols"]["paper"]["sdr"])
    units = {protocol: study.runs[0].results["protocols"][protocol]["unit"] for protocol in ("paper", "original")}
    groups = [f'<th class="first" colspan="3">protocol paper: MRE, {units["paper"]}</th>']
    groups += [f'<th class="first" colspan="2">SDR {key} {units["paper"]}, %</th>' for key in thresholds]
    groups += [f'<th class="first">original:<br>MRE, {units["original"]}</th>']
    heads = '<th class="first">ours</th><th>paper</th><th>differ&shy;ence</th>'
    heads += '<th class="first">ours</th><th>paper</th>' * len(thresholds) + '<th class="first">ours</th>'
    width = 3 + 3 + 2 * len(thresholds) + 1
    rows = pairs(study)
    lines = []
    for labels in study.shots:
        name = "training label" if labels == 1 else "training labels"
        lines.append(f'<tr class="heading"><td colspan="{width}">{labels} {name}</td></tr>')
        here = [row for row in rows if row.training == labels]
        lines += [_line(row, here, study, thresholds) for row in here]
    return (
        '<div class="scroll"><table class="against"><thead>'
        f'<tr class="protocols"><th></th><th colspan="2"></th>{"".join(groups)}</tr>'
        f"<tr><th>method</th><th>all labels<br>ours / paper</th><th>runs</th>{heads}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(row: Pair, beside: Sequence[Pair], study: Study, thresholds: Sequence[str]) -> str:
    ours = row.ours["paper"] if row.ours else None
    theirs = row.paper.scores["paper"] if row.paper else None
    best = min((other.ours["paper"].mre[0] for other in beside if other.ours and other.start), default=None)
    colour = colours(study)[row.start] if row.start else SHAPE_COLOUR if row.ours else None
    cells = [f"<td>{swatch(colour) if colour else ''}{escape(row.title)}{_mark(study, row)}</td>", _labels(row)]
    cells.append(f"<td>{ours.mre[2] if ours and row.start else '–'}</td>")
    is_best = ours is not None and row.start is not None and ours.mre[0] == best
    cells.append(_number(ours.mre if ours else None, f"first{' best' if is_best else ''}"))
    cells.append(_number(theirs.mre if theirs else None, "theirs"))
    cells.append(f"<td>{signed(ours.mre[0] - theirs.mre[0])}</td>" if ours and theirs else "<td></td>")
    for key in thresholds:
        cells.append(_rate(ours.sdr.get(key) if ours else None, "first"))
        cells.append(_rate(theirs.sdr.get(key) if theirs else None, "theirs"))
    cells.append(_number(row.ours["original"].mre if row.ours else None, "first"))
    kind = "" if row.start else "shape" if row.ours else "published"
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _labels(row: Pair) -> str:
    """Labelled images, those for validation included: ours, then the paper's."""
    ours = "–" if row.validation is None else str(row.training + row.validation)
    theirs = "–" if row.paper is None else str(row.paper.training + row.paper.validation)
    return f"<td>{ours} / {theirs}</td>"


def _number(value: Spread | None, kind: str) -> str:
    return f'<td class="{kind}">{"" if value is None else spread_text(value)}</td>'


def _rate(value: Spread | None, kind: str) -> str:
    """A success rate without its deviation, which is in the CSV: the table is wide enough."""
    return f'<td class="{kind}">{"" if value is None else f"{value[0]:.2f}"}</td>'


def _mark(study: Study, row: Pair) -> str:
    """The number of a row's own footnote."""
    noted = [start for start in study.starts if study.texts.get(start, {}).get("note")]
    return f"<sup>{noted.index(row.start) + 1}</sup>" if row.start in noted else ""


def row_notes(study: Study) -> list[str]:
    """The footnotes of rows, in the order of their numbers."""
    notes = [study.texts.get(start, {}).get("note") for start in study.starts]
    return [note for note in notes if note]
