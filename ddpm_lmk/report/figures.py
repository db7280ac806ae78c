"""The curves of a report, as SVG text that a page can hold: error against labels, cumulative error.

Text stays text (the page's own font). Colours, markers and dashes tell starting weights apart, for the colour-blind and
in print, with one key for all figures (module `key`). The same data give the same bytes, and nothing is computed here
that a table does not also say.

One key for all figures of a study, as part of the page: it wraps with the screen, unlike a legend in a figure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ddpm_lmk.report.collect import SCRATCH, Study, paper_rows

INK, MUTED, HAIRLINE = "#1c2733", "#6b7785", "#dfe4ea"
SCRATCH_COLOUR, SHAPE_COLOUR, PAPER_COLOUR = "#d55e00", "#8a94a0", "#7d4fa3"
# Okabe and Ito's colours, and from the fifth on Tol's: told apart with every kind of colour blindness, and in grey with
# the help of markers and dashes.
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#332288", "#6f7d1c", "#44aa99", "#4a5a6b")
Dash = str | tuple[int, tuple[float, ...]]
PAPER_DASHES: tuple[Dash, ...] = ((0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
DASHES: tuple[Dash, ...] = ("solid", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.2, 1.4)))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MARKERS = ("o", "^", "v", "P", "X", "<", ">", "p", "*")
WIDE, NARROW, BROAD = (5.4, 3.4), (4.1, 3.0), (11.2, 3.1)  # inches; the page scales them
CURVE_POINTS = 240
DODGE = 1.035  # neighbouring methods stand this factor apart on the axis of labels, so that error bars can be seen


@dataclass(frozen=True)
class Look:
    """How a start is drawn, in every figure and in their key."""

    colour: str
    marker: str
    dash: Dash


def looks(study: Study) -> dict[str, Look]:
    """A look for each starting point; scratch always has the same."""
    others = [start for start in study.starts if start != SCRATCH]
    found = {SCRATCH: Look(SCRATCH_COLOUR, "s", "solid")}
    for index, start in enumerate(others):
        dash = DASHES[index % len(DASHES)]
        found[start] = Look(PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)], dash)
    return found


def colours(study: Study) -> dict[str, str]:
    """A colour for each starting point."""
    return {start: look.colour for start, look in looks(study).items()}


def mre_by_labels(study: Study, protocol: str) -> str:
    """MRE against the number of labels, one line per start with bars of one standard deviation, and references."""
    with mpl.rc_context(STYLE):
        figure, axes = blank(WIDE)
        for place, start in enumerate(study.starts):
            found = [(k, score.mre) for k in study.shots if (score := study.score(start, k, protocol)) is not None]
            dodge = DODGE ** (place - (len(study.starts) - 1) / 2)
            x, y = [k * dodge for k, _ in found], [mre[0] for _, mre in found]
            bars = [mre[1] or 0.0 for _, mre in found]
            look = looks(study)[start]
            axes.errorbar(
                x, y, bars, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4.5, linewidth=1.5,
                elinewidth=0.9, capsize=1.8, zorder=3,
            )  # fmt: skip
        shape = [study.mean_shape(k, protocol).mre[0] for k in study.shots]
        axes.plot(study.shots, shape, color=SHAPE_COLOUR, linestyle=(0, (5, 3)), linewidth=1.4)
        if protocol == "paper":
            _add_paper(axes, study)
        _log_errors(axes)
        _label_axis(axes, study.shots)
        axes.set_xlabel("labelled training images")
        axes.set_ylabel(f"mean radial error, {unit_name(study, protocol)}")
        title = f"Mean radial error by number of labels, {protocol} protocol"
        return to_svg(figure, f"mre-{study.dataset}-{protocol}", title)


def _add_paper(axes: Axes, study: Study) -> None:
    rows = paper_rows(study.spec)
    for method, dash in zip(dict.fromkeys(row.method for row in rows), PAPER_DASHES):
        points = [(row.training, row.scores["paper"].mre[0]) for row in rows if row.method == method]
        axes.plot(*zip(*points), color=PAPER_COLOUR, linestyle=dash, linewidth=1.5, marker="D", markersize=3)


def _log_errors(axes: Axes) -> None:
    """Errors on a logarithmic axis: with few labels they are ten times those with many."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    means = values[np.isfinite(values) & (values > 0)]
    if not len(means):
        return
    axes.set_yscale("log", nonpositive="clip")
    low, high = float(means.min()), float(means.max())
    axes.set_ylim(0.85 * low, 1.15 * high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def cumulative_error(study: Study, shots: Sequence[int]) -> str:
    """Share of landmarks found within a distance; a panel per number of labels."""
    thresholds = [float(key) for key in study.runs[0].results["protocols"]["original"]["sdr"]]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=BROAD, layout=ConstrainedLayoutEngine(wspace=0.06))
        panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
        for labels, axes in zip(shots, panels):
            _shares_within(axes, study, labels, thresholds)
            axes.set_title(
                f"{labels} {'label' if labels == 1 else 'labels'}", loc="left", fontsize=9, color=INK, pad=14
            )
            axes.set_xlabel(f"radial error, {unit_name(study, 'original')}")
        panels[0].set_ylabel("landmarks within, %")
        return to_svg(figure, f"ced-{study.dataset}", "Cumulative error curves")


def _shares_within(axes: Axes, study: Study, labels: int, thresholds: Sequence[float]) -> None:
    """One panel: a curve per start, over all runs with so many labels."""
    parts = {start: [run.errors() for run in study.select(start, labels)] for start in study.starts}
    errors = {start: np.concatenate(found) for start, found in parts.items() if any(map(len, found))}
    limit = (
        2.5 * max(thresholds)
        if thresholds
        else max((float(np.quantile(e, 0.95)) for e in errors.values()), default=1.0)
    )
    x = np.linspace(0, limit, CURVE_POINTS)
    for start, found in errors.items():
        share = 100 * np.searchsorted(np.sort(found), x, side="right") / len(found)
        look = looks(study)[start]
        axes.plot(x, share, color=look.colour, linestyle=look.dash, linewidth=1.5)
    for threshold in thresholds:
        axes.axvline(threshold, color=SHAPE_COLOUR, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(f"{threshold:g}", (threshold, 101), ha="center", fontsize=7, color=MUTED, annotation_clip=False)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 100)


def unit_name(study: Study, protocol: str) -> str:
    """The unit of a protocol in words."""
    unit = study.runs[0].results["protocols"][protocol]["unit"]
    grid = study.runs[0].results["protocols"][protocol].get("grid")
    if unit == "mm":
        return "mm"
    return f"pixels of the {grid} grid" if grid else "original pixels"


def _label_axis(axes: Axes, shots: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(shots), [str(value) for value in shots])
    axes.xaxis.set_minor_locator(NullLocator())


def blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty drawing of so many inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str, title: str) -> str:
    """SVG text to put into a page: scales with it, and has a title for screen readers."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    box = head[head.index("viewBox") :].split('"')[1]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = body.replace("'DejaVu Sans', sans-serif", "inherit").replace("'DejaVu Sans'", "inherit")
    return f'<svg {namespaces} viewBox="{box}" role="img" aria-label="{title}">{body}'


# Outlines of matplotlib's markers around (0, 0), in pixels.
MARKS = {
    "o": "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",
    "s": "M-3,-3H3V3H-3Z",
    "D": "M0,-3.4L3.4,0L0,3.4L-3.4,0Z",
    "^": "M0,-3.4L3.4,3H-3.4Z",
    "v": "M0,3.4L3.4,-3H-3.4Z",
    "<": "M-3.4,0L3,3.4V-3.4Z",
    ">": "M3.4,0L-3,3.4V-3.4Z",
    "P": "M-1.2,-3.4H1.2V-1.2H3.4V1.2H1.2V3.4H-1.2V1.2H-3.4V-1.2H-1.2Z",
    "X": "M-3.4,-1.8L-1.8,-3.4L0,-1.6L1.8,-3.4L3.4,-1.8L1.6,0L3.4,1.8L1.8,3.4L0,1.6L-1.8,3.4L-3.4,1.8L-1.6,0Z",
    "p": "M0,-3.5L3.3,-1.1L2.1,2.8H-2.1L-3.3,-1.1Z",
    "*": "M0,-4.2L1,-1.3H4L1.6,0.5L2.5,3.4L0,1.6L-2.5,3.4L-1.6,0.5L-4,-1.3H-1Z",
    "": "",
}


def html(study: Study, *, paper: bool = False, shape: bool = False) -> str:
    """The starts of a study, and on demand the mean shape and the paper's rows."""
    entries = [_entry(looks(study)[start], study.title(start)) for start in study.starts]
    if shape:
        entries.append(_entry(Look(SHAPE_COLOUR, "", (0, (5, 3))), "mean shape (no picture)"))
    if paper:
        names = dict.fromkeys(row.method for row in paper_rows(study.spec))
        entries += [
            _entry(Look(PAPER_COLOUR, "D", dash), f"{name} (right figure only)")
            for name, dash in zip(names, PAPER_DASHES)
        ]
    return f'<p class="legend">{"".join(entries)}</p>'


def _entry(look: Look, title: str) -> str:
    """A piece of the line, with its marker, and the name."""
    line = f'<path d="M1,5H31" stroke="{look.colour}" stroke-width="1.8"{_dashes(look.dash)} fill="none"/>'
    mark = f'<path d="{MARKS[look.marker]}" transform="translate(16,5)" fill="{look.colour}"/>' if look.marker else ""
    drawn = f'<svg width="32" height="10" viewBox="0 0 32 10" aria-hidden="true">{line}{mark}</svg>'
    return f"<span>{drawn}{escape(title)}</span>"


def _dashes(dash: Dash) -> str:
    """What SVG calls a dash of matplotlib, which counts in widths of the line."""
    if isinstance(dash, str):
        return ""
    return f' stroke-dasharray="{" ".join(f"{1.8 * part:g}" for part in dash[1])}"'
