"""The curves of a report, as SVG text that a page can hold: error against labels, cumulative error, learning curves.

Text stays text (the page's own font), colours tell starting weights apart for the colour-blind too, and the same data
give the same bytes. Nothing is computed here that a table does not also say.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ddpm_lmk.report.data import SCRATCH, Study, paper_rows, parent_of, read_lines

INK, MUTED, HAIRLINE = "#1c2733", "#6b7785", "#dfe4ea"
SCRATCH_COLOUR, SHAPE_COLOUR, PAPER_COLOUR = "#c4621b", "#8a94a0", "#7d4fa3"
PALETTE = ("#0b66b0", "#138a6b", "#b0447f", "#8a7a12", "#3d9bd1", "#5b4fb3", "#d0872a", "#4d6b2f", "#a3443a", "#4a5a6b")
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
MARKERS = ("o", "^", "v", "P", "X", "*", "h")
WIDE, NARROW = (5.4, 3.7), (4.1, 3.5)  # inches; the page scales them
CURVE_POINTS = 240
PAPER_SCALE = 1.35  # the axis grows to this multiple of our largest value to let the paper's curve in


def colours(study: Study) -> dict[str, str]:
    """A colour for each starting point; scratch always has the same."""
    others = [start for start in study.starts if start != SCRATCH]
    return {SCRATCH: SCRATCH_COLOUR} | {start: PALETTE[index % len(PALETTE)] for index, start in enumerate(others)}


def mre_by_labels(study: Study, protocol: str) -> str:
    """MRE against the number of labels, one line per start with a band of one standard deviation, and references."""
    with mpl.rc_context(STYLE):
        figure, axes = blank(WIDE)
        top = 0.0
        for start in study.starts:
            found = [(k, score.mre) for k in study.shots if (score := study.score(start, k, protocol)) is not None]
            shots, means = [k for k, _ in found], np.array([mre[0] for _, mre in found])
            spread = np.array([mre[1] or 0.0 for _, mre in found])
            colour = colours(study)[start]
            axes.fill_between(shots, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
            marker = MARKERS[study.starts.index(start) % len(MARKERS)]
            axes.plot(
                shots,
                means,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                label=study.title(start),
                zorder=3,
            )
            top = max(top, float((means + spread).max()))
        shape = [study.mean_shape(k, protocol).mre[0] for k in study.shots]
        axes.plot(
            study.shots, shape, color=SHAPE_COLOUR, linestyle=(0, (5, 3)), linewidth=1.4, marker="s", markersize=2.5,
            label="mean shape (no picture)",
        )  # fmt: skip
        top = max(top, *shape)
        if protocol == "paper":
            _add_paper(axes, study)
        axes.set_ylim(0, PAPER_SCALE * top if protocol == "paper" and paper_rows(study.spec) else 1.08 * top)
        _label_axis(axes, study.shots)
        axes.set_xlabel("labelled training images")
        axes.set_ylabel(f"mean radial error, {unit_name(study, protocol)}")
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(
            figure, f"mre-{study.dataset}-{protocol}", f"Mean radial error by number of labels, {protocol} protocol"
        )


def _add_paper(axes: Axes, study: Study) -> None:
    rows = paper_rows(study.spec)
    for method, style in zip(dict.fromkeys(row.method for row in rows), ((0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))):
        points = [(row.training, row.scores["paper"].mre[0]) for row in rows if row.method == method]
        axes.plot(
            *zip(*points), color=PAPER_COLOUR, linestyle=style, linewidth=1.5, marker="D", markersize=3, label=method
        )


def cumulative_error(study: Study, shots: Sequence[int]) -> str:
    """Share of landmarks found within a distance; a line style per number of labels, a colour per start."""
    with mpl.rc_context(STYLE):
        figure, axes = blank(NARROW)
        thresholds = [float(key) for key in study.runs[0].results["protocols"]["original"]["sdr"]]
        limit = 2.5 * max(thresholds) if thresholds else 0.0
        for labels, style in zip(shots, ("solid", (0, (5, 2)), (0, (1.5, 1.5)))):
            for start in study.starts:
                parts = [run.errors() for run in study.select(start, labels)]
                errors = np.concatenate(parts) if parts else np.empty(0)
                if not len(errors):
                    continue
                limit = limit or float(np.quantile(errors, 0.95))
                x = np.linspace(0, limit, CURVE_POINTS)
                share = 100 * np.searchsorted(np.sort(errors), x, side="right") / len(errors)
                name = f"{study.title(start)}, {labels} {'label' if labels == 1 else 'labels'}"
                axes.plot(x, share, color=colours(study)[start], linestyle=style, linewidth=1.7, label=name)
        for threshold in thresholds:
            axes.axvline(threshold, color=SHAPE_COLOUR, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                f"{threshold:g}", (threshold, 101), ha="center", fontsize=7.5, color=MUTED, annotation_clip=False
            )
        axes.set_xlim(0, limit)
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"radial error, {unit_name(study, 'original')}")
        axes.set_ylabel("landmarks within, %")
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, f"ced-{study.dataset}", "Cumulative error curve")


def fine_tuning_curves(study: Study, labels: int) -> str | None:
    """Training loss of every run at one number of labels; None where no run has metrics."""
    with mpl.rc_context(STYLE):
        figure, axes = blank(NARROW)
        is_drawn = False
        for start in study.starts:
            for index, run in enumerate(study.select(start, labels)):
                steps, losses = _series(run.metrics(), "loss")
                if len(steps) > 1:
                    is_drawn = True
                    axes.plot(
                        steps, losses, color=colours(study)[start], linewidth=1.2, alpha=0.85,
                        label=study.title(start) if index == 0 else None,
                    )  # fmt: skip
        if not is_drawn:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("fine-tuning loss")
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, f"tuning-{study.dataset}-{labels}", f"Fine-tuning loss with {labels} labels")


def pre_training_curves(study: Study) -> str | None:
    """Loss of the runs the starting weights came from; None where they are not there any more."""
    parents: dict[str, Path] = {}
    for run in study.runs:
        parent = parent_of(run)
        if parent is not None:
            parents.setdefault(run.start, parent)
    with mpl.rc_context(STYLE):
        figure, axes = blank(NARROW)
        for start, parent in parents.items():
            lines = read_lines(parent / "metrics.jsonl")
            images, losses = _series(lines, "loss", against="images")
            if len(images) > 1:
                axes.plot(images, losses, color=colours(study)[start], linewidth=0.8, alpha=0.35)
                axes.plot(images, _smooth(losses), color=colours(study)[start], linewidth=1.8, label=study.title(start))
        if not axes.lines:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("images seen")
        axes.set_ylabel("noise prediction loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, f"pretraining-{study.dataset}", "Pre-training loss")


def unit_name(study: Study, protocol: str) -> str:
    """The unit of a protocol in words."""
    unit = study.runs[0].results["protocols"][protocol]["unit"]
    grid = study.runs[0].results["protocols"][protocol].get("grid")
    if unit == "mm":
        return "mm"
    return f"pixels of the {grid} grid" if grid else "original pixels"


def _series(lines: list[dict[str, Any]], key: str, *, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
    found = [(line[against], line[key]) for line in lines if line.get(key) is not None and against in line]
    return np.array([x for x, _ in found]), np.array([y for _, y in found], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _log_if_positive(axes: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    if values.min() > 0 and values.max() > 3 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


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
