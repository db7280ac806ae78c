"""The pieces of a report's page: cards, tables and figures as HTML text. Numbers come in, no number is made here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from ddpm_lmk.report.collect import PROTOCOLS, SCRATCH, Row, Score, Spread, Study
from ddpm_lmk.report.figures import SHAPE_COLOUR, colours, unit_name

EMPTY = '<td class="{kind}">–</td>'


def page(title: str, body: str) -> str:
    """A whole page; nothing in it points outside."""
    template = resources.files("ddpm_lmk").joinpath("report/page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body)


def spread_text(value: Spread, digits: int = 2) -> str:
    """`3.97 ±0.08`, or the bare number of a single run."""
    mean, std, _ = value
    text = f"{mean:.{digits}f}"
    return text if std is None else f'{text} <span class="spread">±{std:.{digits}f}</span>'


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, the minus as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def swatch(colour: str) -> str:
    """A small square of a curve's colour."""
    return f'<span class="swatch" style="background:{colour}"></span>'


def cards(study: Study) -> str:
    """The best MRE at each number of labels, against the next two and the mean shape."""
    shown = []
    for labels in study.shots:
        best = study.best_start(labels)
        score = study.score(best, labels, "original")
        assert score is not None
        others = [(start, study.score(start, labels, "original")) for start in study.starts if start != best]
        ranked = sorted((other.mre[0], start) for start, other in others if other is not None)
        versus = [f"{escape(study.title(start))} {error:.2f}" for error, start in ranked[:2]]
        versus.append(f"mean shape {study.mean_shape(labels, 'original').mre[0]:.2f}")
        name = "label" if labels == 1 else "labels"
        std = "" if score.mre[1] is None else f" ± {score.mre[1]:.2f}"
        shown.append(
            f'<div class="card"><div class="what">{labels} {name}</div>'
            f'<div class="number">{score.mre[0]:.2f}<small>{std} {score.unit}</small></div>'
            f'<div class="versus">{swatch(colours(study)[best])}{escape(study.title(best))}<br>'
            f"{' · '.join(versus)}</div></div>"
        )
    return f'<div class="cards">{"".join(shown)}</div>'


def headline_table(study: Study) -> str:
    """Every start at every number of labels, both protocols side by side; the best of ours is bold."""
    rows = study.rows()
    thresholds = {name: list(study.runs[0].results["protocols"][name]["sdr"]) for name in PROTOCOLS}
    titles, heads = "", ""
    for name in PROTOCOLS:
        span = 1 + len(thresholds[name])
        rates = ", SDR in %" if thresholds[name] else ""
        title = f"protocol {name} <small>{unit_name(study, name)}{rates}</small>"
        titles += f'<th class="first" colspan="{span}">{title}</th>'
        heads += '<th class="first">MRE</th>' + "".join(f"<th>SDR {t}</th>" for t in thresholds[name])
    lines = []
    width = 3 + sum(1 + len(keys) for keys in thresholds.values())
    for labels in study.shots:
        name = "training label" if labels == 1 else "training labels"
        lines.append(f'<tr class="heading"><td colspan="{width}">{labels} {name}</td></tr>')
        here = [row for row in rows if row.training == labels]
        lines += [_headline_row(row, here, study, thresholds) for row in here]
    return (
        '<div class="scroll"><table class="scores"><thead>'
        f'<tr class="protocols"><th></th><th colspan="2"></th>{titles}</tr>'
        f"<tr><th>starting weights</th><th>validation<br>labels</th><th>runs</th>{heads}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _headline_row(row: Row, beside: Sequence[Row], study: Study, thresholds: dict[str, list[str]]) -> str:
    colour = {"run": colours(study).get(row.method), "mean shape": SHAPE_COLOUR}.get(row.kind)
    name = (swatch(colour) if colour else "") + escape(study.title(row.method))
    runs = next(iter(row.scores.values())).mre[2]
    cells = [f"<td>{name}</td>", f"<td>{row.validation}</td>"]
    cells.append(f"<td>{'–' if row.kind == 'mean shape' else runs}</td>")
    for protocol in PROTOCOLS:
        ours = [other.scores[protocol] for other in beside if other.kind == "run"]
        score = row.scores.get(protocol)
        cells.append(
            _cell(score.mre if score else None, [o.mre[0] for o in ours], row, kind="first", lower_is_better=True)
        )
        for key in thresholds[protocol]:
            rates = [o.sdr[key][0] for o in ours]
            cells.append(_cell(score.sdr.get(key) if score else None, rates, row, digits=1, lower_is_better=False))
    kind = {"run": "", "mean shape": "shape", "paper": "published"}[row.kind]
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _cell(
    value: Spread | None,
    ours: list[float],
    row: Row,
    *,
    lower_is_better: bool,
    digits: int = 2,
    kind: str = "",
) -> str:
    """A number with its spread; bold where it is the best of our runs in its group."""
    if value is None:
        return EMPTY.format(kind=kind)
    best = (min if lower_is_better else max)(ours)
    marked = f"{kind} best" if row.kind == "run" and value[0] == best and len(ours) > 1 else kind
    return f'<td class="{marked.strip()}">{spread_text(value, digits)}</td>'


def landmark_table(study: Study, start: str) -> str:
    """MRE of each landmark at each number of labels (mean over seeds), and its SDR at the largest."""
    groups = {labels: study.select(start, labels) for labels in study.shots if study.select(start, labels)}
    most = max(groups)
    first = groups[most][0].results["protocols"]["original"]
    keys = list(first["sdr"])

    def mean(labels: int, index: int, key: str | None) -> float:
        rows = [run.results["protocols"]["original"]["per_landmark"][index] for run in groups[labels]]
        values = [row["mre"] if key is None else row["sdr"][key] for row in rows]
        return sum(values) / len(values)

    count = len(first["per_landmark"])
    table = {labels: [mean(labels, index, None) for index in range(count)] for labels in groups}
    top = max(max(values) for values in table.values())
    lines = []
    for index, landmark in enumerate(first["per_landmark"]):
        cells = "".join(
            f'<td class="heat" style="--share:{100 * values[index] / top:.0f}%">{values[index]:.2f}</td>'
            for values in table.values()
        )
        rates = "".join(
            f'<td class="{"first" if place == 0 else ""}">{mean(most, index, key):.1f}</td>'
            for place, key in enumerate(keys)
        )
        lines.append(f"<tr><td>{index + 1}. {escape(landmark['name'].replace('_', ' '))}</td>{cells}{rates}</tr>")
    heads = "".join(f"<th>{labels} {'label' if labels == 1 else 'labels'}</th>" for labels in groups)
    rates = "".join(f'<th class="{"first" if place == 0 else ""}">SDR {key} %</th>' for place, key in enumerate(keys))
    above = f'<th class="first" colspan="{len(keys)}">with {most} labels</th>' if keys else ""
    return (
        '<div class="scroll"><table><thead><tr class="protocols"><th></th>'
        f'<th class="first" colspan="{len(groups)}">MRE {first["unit"]}</th>{above}</tr>'
        f"<tr><th>landmark</th>{heads}{rates}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts_table(rows: Iterable[Sequence[str]], headings: Sequence[str], groups: Sequence[tuple[str, int]] = ()) -> str:
    """A plain table of words; `groups` are words above so many headings each."""
    above = "".join(f'<th colspan="{count}">{escape(word)}</th>' for word, count in groups)
    above = f'<tr class="protocols">{above}</tr>' if above else ""
    head = "".join(f"<th>{escape(word)}</th>" for word in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in rows)
    table = f'<table class="words"><thead>{above}<tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def figure(content: str, caption: str, title: str = "") -> str:
    """A drawing or picture in a frame; `caption` is HTML."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{content}<figcaption>{caption}</figcaption></figure>"


def image(data: bytes, description: str, kind: str = "jpeg") -> str:
    """A picture that lies in the page itself."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(description)}" loading="lazy">'


def verdict(study: Study) -> str:
    """What the table says, in one sentence made from it."""
    shots = study.shots
    others = [start for start in study.starts if start != SCRATCH]
    if SCRATCH in study.starts and others:
        pairs = [(k, min(_means(study, k, others), default=None), _means(study, k, [SCRATCH])) for k in shots]
        compared = [(k, best, scratch[0]) for k, best, scratch in pairs if best is not None and scratch]
        won = sum(best < scratch for _, best, scratch in compared)
        if compared:
            return (
                f"Pre-trained weights have the lower mean radial error at {won} of {len(compared)} numbers of labels."
            )
    beaten = sum(min(_means(study, k, study.starts)) < study.mean_shape(k, "original").mre[0] for k in shots)
    return f"The best starting weights beat the mean shape at {beaten} of {len(shots)} numbers of labels."


def _means(study: Study, labels: int, starts: Sequence[str]) -> list[float]:
    scores: list[Score | None] = [study.score(start, labels, "original") for start in starts]
    return [score.mre[0] for score in scores if score is not None]
