"""Our table beside the paper's: the same rows, columns and rounding, the differences, and footnotes.

Where a row of ours stands beside one of the paper's is said by the sweep file (`rows`). Numbers are compared under
protocol `paper`, which computes what the paper's released code computes; the error under protocol `original` stands
beside. Ours come from results.json, theirs from `paper_tables.json`, and footnotes from what the runs say of
themselves: none is written for a certain study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ddpm_lmk.inference.scoring import Spread
from ddpm_lmk.report import html
from ddpm_lmk.report.collect import MEAN_SHAPE, PROTOCOLS, Row, Score, Study, labels_text, paper_rows, paper_tables
from ddpm_lmk.report.html import signed, spread_text
from ddpm_lmk.report.statistics import difference_tables
from ddpm_lmk.report.style import SHAPE_COLOUR, method_name, swatch

# Counted in the released code (docs/method.md, section 1).
PAPER_NETWORK = "558.5 M parameters at 256² pixels"


@dataclass(frozen=True)
class Pair:
    """A row of ours beside one of the paper's; either may be missing, and `start` is None for the mean shape."""

    title: str
    start: str | None
    training: int
    validation: int | None
    ours: dict[str, Score] | None
    paper: Row | None


def beside_paper(study: Study) -> str:
    """The section of the page: both tables side by side, differences between methods of ours, footnotes."""
    published = paper_tables()["datasets"].get(study.spec)
    if published is None:
        text = f"The paper has no table for {study.spec}; rows stand alone."
        return f"<h2>Beside the paper</h2>{html.note(escape(text))}{paper_table(study)}"
    numbered = "".join(f"<li>{escape(study.texts[start]['note'])}</li>" for start in _noted(study))
    general = "".join(f"<p>{escape(text)}</p>" for text in _footnotes(study, published))
    return (
        f"<h2>Beside table {published['table']} of the paper</h2>{paper_table(study)}{difference_tables(study)}"
        f'<div class="footnotes"><ol>{numbered}</ol>{general}</div>'
    )


def pairs(study: Study) -> list[Pair]:
    """All rows, by number of labels: the mean shape, ours, then the paper's that nothing of ours stands beside."""
    published = _published(study)
    rows = []
    for labels in study.shots:
        shape = {protocol: study.mean_shape(labels, protocol) for protocol in PROTOCOLS}
        rows.append(Pair(f"{MEAN_SHAPE} (no picture)", None, labels, 0, shape, None))
        used = set()
        for row in study.rows(with_paper=False):
            if row.kind == "run" and row.training == labels:
                method = study.texts.get(row.method, {}).get("paper")
                theirs = published.get((method, labels)) if method else None
                used.add(method)
                rows.append(Pair(study.title(row.method), row.method, labels, row.validation, row.scores, theirs))
        # a published row that nothing of ours stands beside is still what a reader compares with
        rest = [row for (method, k), row in published.items() if k == labels and method not in used]
        rows += [Pair(row.method, None, labels, None, None, row) for row in rest]
    return rows


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


def paper_table(study: Study) -> str:
    """The table as HTML."""
    thresholds = study.thresholds("paper")
    unit = study.unit("paper")
    groups = [html.head(""), html.head("", span=2)]
    groups.append(html.head(f"protocol paper: MRE, {unit}", "first", span=3))
    groups += [html.head(f"SDR {key} {unit}, %", "first", span=2) for key in thresholds]
    groups.append(html.head(f"original:<br>MRE, {study.unit('original')}", "first"))
    ours, paper = html.head("ours", "first"), html.head("paper")
    heads = [html.head(word) for word in ("method", "all labels<br>ours / paper", "runs")]
    heads += [ours, paper, html.head("differ&shy;ence"), *([ours, paper] * len(thresholds)), ours]
    rows = pairs(study)
    lines = []
    for labels in study.shots:
        lines.append(html.heading_row(labels_text(labels, "training"), len(heads)))
        here = [row for row in rows if row.training == labels]
        best = min((row.ours["paper"].mre[0] for row in here if row.ours and row.start), default=None)
        lines += [_line(row, best, study, thresholds) for row in here]
    return html.table([html.row(groups, "protocols"), html.row(heads)], lines, "against")


def _line(row: Pair, best: float | None, study: Study, thresholds: Sequence[str]) -> str:
    """A line of the table; `best` is the lowest error of ours with as many labels."""
    ours = row.ours["paper"] if row.ours else None
    theirs = row.paper.scores["paper"] if row.paper else None
    name = escape(row.title)
    if row.start:
        number = {start: index for index, start in enumerate(_noted(study), 1)}.get(row.start)
        name = method_name(study, row.start) + (f"<sup>{number}</sup>" if number else "")
    elif row.ours:
        name = swatch(SHAPE_COLOUR) + name
    # validation labels are labels too: the paper used as many in every row
    our_labels = "–" if row.validation is None else str(row.training + row.validation)
    their_labels = "–" if row.paper is None else str(row.paper.training + row.paper.validation)
    is_best = ours is not None and row.start is not None and ours.mre[0] == best
    cells = [
        html.cell(name),
        html.cell(f"{our_labels} / {their_labels}"),
        html.cell(str(ours.mre[2]) if ours and row.start else "–"),
        _mre(ours, f"first{' best' if is_best else ''}"),
        _mre(theirs, "theirs"),
        html.cell(signed(ours.mre[0] - theirs.mre[0]) if ours and theirs else ""),
    ]
    for key in thresholds:
        cells += [_rate(ours.sdr.get(key) if ours else None, "first")]
        cells += [_rate(theirs.sdr.get(key) if theirs else None, "theirs")]
    cells.append(_mre(row.ours["original"] if row.ours else None, "first"))
    return html.row(cells, "" if row.start else "shape" if row.ours else "published")


def _mre(score: Score | None, kind: str) -> str:
    return html.cell("" if score is None else spread_text(score.mre), kind)


def _rate(value: Spread | None, kind: str) -> str:
    """A success rate without its deviation, which is in the CSV: the table is wide enough."""
    return html.cell("" if value is None else f"{value[0]:.2f}", kind)


def _noted(study: Study) -> list[str]:
    """The starts with a footnote of their own, in the order of its number."""
    return [start for start in study.starts if study.texts.get(start, {}).get("note")]


def _footnotes(study: Study, published: dict[str, object]) -> list[str]:
    """What a reader has to know before believing a difference, one sentence or two each."""
    return [
        "Rounding is the paper's. ± is the standard deviation over runs; the paper's three runs share one seed, which "
        "is why its own is near zero; those of success rates (SDR) are in the CSV. Bold in the column of ours: the "
        "lowest error of ours with as many labels.",
        _about_protocol(study),
        _about_images(study, published["test_images"]),
        _about_labels(study, published["validation_labels"]),
        _about_networks(study),
        _about_significance(study),
        _about_leakage(study),
        f"The paper's numbers: {paper_tables()['source']}. {paper_tables()['note']}",
    ]


def _about_significance(study: Study) -> str:
    """How differences were tested, and how many of them chance alone would make bold."""
    # of the table against random weights; at 95 % one in twenty is clear by chance
    count = (len(study.starts) - 1) * len(study.shots)
    return (
        "Differences are paired by seed (the same shots), with Student's interval of 95 %, and by image, with a "
        "bootstrap interval over images. Bold where the interval over seeds leaves out zero, not corrected for their "
        f"number: of {count} differences of equal methods about {0.05 * count:.1f} would be bold. “All” is the mean "
        "over numbers of labels of the change of the error, in per cent, with its interval over seeds. Few seeds give "
        "wide intervals; what is clear over images alone says nothing about other shots. The paper's rows come without "
        "single runs, so no test is possible against them."
    )


def _about_protocol(study: Study) -> str:
    text = (
        "Columns under protocol paper compute what the released code computes: both points on an integer 256 grid, "
        "labels read back from their masks"
    )
    if study.spec == "cephalometric":
        text += ", millimetre factors of x and y swapped"  # docs/method.md, section 3
    return f"{text}. Protocol original measures in pixels of the original image with the right spacing."


def _about_images(study: Study, paper_images: object) -> str:
    ours = f"{study.num_images} images of split {study.split} ({study.dataset})"
    if study.num_images == paper_images:
        return f"Both score as many images: ours {ours}."
    return f"Ours are scored on {ours}, the paper's on {paper_images}: not the same test set."


def _about_labels(study: Study, validation: object) -> str:
    used = sorted({run.results["labels"]["validation"] for run in study.runs})
    draws = sorted({run.results["draw"] for run in study.runs})
    how = {
        "random": "drawn at random from the seed",
        "first": "the first by name, as in the paper",
        "listed": "chosen by name in the run file",
    }
    return (
        f"All labels counts validation labels too: the paper used {validation} in every row, ours "
        f"{_listed(used)}. Our shots are {_listed(how[draw] for draw in draws)}."
    )


def _about_networks(study: Study) -> str:
    """What our networks are, where run files are still there."""
    last = {run.start: run.home.cfg for run in study.runs}.values()
    networks = dict.fromkeys(f"{cfg.model.kind} at {cfg.data.image_size}²" for cfg in last if cfg is not None)
    ours = _listed(networks) if networks else "not recorded"
    return f"Networks of ours: {ours} (sizes under The runs); the paper's own has {PAPER_NETWORK}."


def _about_leakage(study: Study) -> str:
    """Whether anything that is scored was seen before."""
    blocks = [block for run in study.runs for block in (run.results.get("leakage") or {}).values()]
    seen = max((block.get("images") or 0 for block in blocks if block.get("status") == "overlap"), default=0)
    if seen:
        return f"Pre-training or fine-tuning of some rows saw {seen} of the scored images; see the top of the page."
    # "none": random weights, which saw nothing; "clean": compared, and nothing found
    unknown = any(block.get("status") not in ("none", "clean") for block in blocks)
    if not blocks or unknown:
        return "For some rows it is not known whether pre-training saw scored images (weights from elsewhere)."
    compared = not any(block.get("patients_not_compared") for block in blocks)
    by = "pixels, near copies and patients" if compared else "pixels and near copies; not all patients were compared"
    return f"No scored image was in pre-training or among the training labels, by {by}."


def _listed(words: Iterable[object]) -> str:
    return ", ".join(str(word) for word in words)
