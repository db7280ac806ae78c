"""The curves and pictures of a report, as SVG and HTML text that a page can hold.

Curves: error against labels, cumulative error, losses, error against the length of pre-training. Pictures: best, median
and worst x-ray, one x-ray as every method sees it, calibration plots. The same data give the same bytes, and no number
is computed here that a table does not also say. X-rays are drawn from the packed data, where it is still there.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ddpm_lmk.data.drawing import draw_overlay, encode_jpeg, to_uint8
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.errors import DataError
from ddpm_lmk.report import html
from ddpm_lmk.report.collect import Run, RunFolder, Study, labels_text, paper_rows
from ddpm_lmk.report.style import (
    INK,
    MARKERS,
    MUTED,
    PALETTE,
    PAPER_COLOUR,
    PAPER_DASHES,
    RC,
    SHAPE_COLOUR,
    SHAPE_DASH,
    looks,
    method_name,
)
from ddpm_lmk.report.tables import fitted_temperatures
from ddpm_lmk.rundir.log import METRICS, read_lines

WIDE, NARROW, BROAD = (5.4, 3.4), (4.1, 3.0), (11.2, 3.1)  # inches; the page scales them
CURVE_POINTS = 240  # smooth at the width of a panel; more would only make the page larger
DODGE = 1.035  # neighbouring methods stand this factor apart on the axis of labels, so that error bars can be seen
FEATURED = 3  # numbers of labels that are shown where there is no room for all
SIDE, PANEL_SIDE = 760, 640  # pixels of the longer side
MARGIN = 0.15  # of the extent of the landmarks, around them
KEY = '<span class="key"><i style="color:#d07300">×</i> predicted, <i style="color:#2f9e44">○</i> annotated.</span>'
LOSSES = {
    "denoise": "noise prediction loss",
    "mocov3": "MoCo v3 loss",
    "simclrv2": "SimCLR v2 loss",
    "dino": "DINO loss",
}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def featured_shots(shots: Sequence[int]) -> list[int]:
    """At most three numbers of labels: the smallest, the middle one and the largest."""
    return list(shots) if len(shots) <= FEATURED else [shots[0], shots[len(shots) // 2], shots[-1]]


def mre_by_labels(study: Study, protocol: str) -> str:
    """MRE against the number of labels, one line per start with bars of one standard deviation, and references."""
    with mpl.rc_context(RC):
        figure, axes = _blank(WIDE)
        for place, start in enumerate(study.starts):
            scores = [(k, score.mre) for k in study.shots if (score := study.score(start, k, protocol)) is not None]
            dodge = DODGE ** (place - (len(study.starts) - 1) / 2)
            x, y = [k * dodge for k, _ in scores], [mre[0] for _, mre in scores]
            bars = [mre[1] or 0.0 for _, mre in scores]
            look = looks(study)[start]
            axes.errorbar(
                x, y, bars, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4.5, linewidth=1.5,
                elinewidth=0.9, capsize=1.8, zorder=3,
            )  # fmt: skip
        shape = [study.mean_shape(k, protocol).mre[0] for k in study.shots]
        axes.plot(study.shots, shape, color=SHAPE_COLOUR, linestyle=SHAPE_DASH, linewidth=1.4)
        if protocol == "paper":
            rows = paper_rows(study.spec)
            for method, dash in zip(dict.fromkeys(row.method for row in rows), PAPER_DASHES):
                points = [(row.training, row.scores["paper"].mre[0]) for row in rows if row.method == method]
                axes.plot(
                    *zip(*points), color=PAPER_COLOUR, linestyle=dash, linewidth=1.5, marker="D", markersize=3
                )  # fmt: skip
        _log_errors(axes)
        axes.set_xscale("log")
        axes.set_xticks(study.shots, [str(value) for value in study.shots])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("labelled training images")
        axes.set_ylabel(f"mean radial error, {study.unit_name(protocol)}")
        title = f"Mean radial error by number of labels, {protocol} protocol"
        return _to_svg(figure, f"mre-{study.dataset}-{protocol}", title)


def _log_errors(axes: Axes) -> None:
    """Errors on a logarithmic axis: with few labels they are ten times those with many."""
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    means = values[np.isfinite(values) & (values > 0)]
    if len(means):
        axes.set_yscale("log", nonpositive="clip")
        # error bars of few runs reach far: the means set the limits
        axes.set_ylim(0.85 * float(means.min()), 1.15 * float(means.max()))
        _label_log_axis(axes, (1, 2, 3, 5, 7))


def _label_log_axis(axes: Axes, digits: tuple[int, ...]) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def cumulative_error(study: Study, shots: Sequence[int]) -> str:
    """Share of landmarks found within a distance; a panel per number of labels."""
    thresholds = [float(key) for key in study.thresholds("original")]
    with mpl.rc_context(RC):
        figure = Figure(figsize=BROAD, layout=ConstrainedLayoutEngine(wspace=0.06))
        panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
        for labels, axes in zip(shots, panels):
            _shares_within(axes, study, labels, thresholds)
            axes.set_title(labels_text(labels), loc="left", fontsize=9, color=INK, pad=14)
            axes.set_xlabel(f"radial error, {study.unit_name('original')}")
        panels[0].set_ylabel("landmarks within, %")
        return _to_svg(figure, f"ced-{study.dataset}", "Cumulative error curves")


def _shares_within(axes: Axes, study: Study, labels: int, thresholds: Sequence[float]) -> None:
    """One panel: a curve per start, over all runs with so many labels."""
    parts = {start: [e for run in study.select(start, labels) for e in run.errors.values()] for start in study.starts}
    errors = {start: np.concatenate(values) for start, values in parts.items() if values}
    # without thresholds the axis ends where the worst method has 95 % of its landmarks
    tails = [float(np.quantile(values, 0.95)) for values in errors.values()]
    limit = 2.5 * max(thresholds) if thresholds else max(tails, default=1.0)
    x = np.linspace(0, limit, CURVE_POINTS)
    for start, values in errors.items():
        # at or below, as the success rates of the tables count
        share = 100 * np.searchsorted(np.sort(values), x, side="right") / len(values)
        look = looks(study)[start]
        axes.plot(x, share, color=look.colour, linestyle=look.dash, linewidth=1.5)
    for threshold in thresholds:
        axes.axvline(threshold, color=SHAPE_COLOUR, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(f"{threshold:g}", (threshold, 101), ha="center", fontsize=7, color=MUTED, annotation_clip=False)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 100)


def fine_tuning_curves(study: Study, labels: int) -> str | None:
    """Training loss of every run at one number of labels; None where no run has metrics."""
    with mpl.rc_context(RC):
        figure, axes = _blank(NARROW)
        for start in study.starts:
            look = looks(study)[start]
            for run in study.select(start, labels):
                steps, losses = _losses(run.path, "step")
                if len(steps) > 1:  # a single value is no curve
                    axes.plot(steps, losses, color=look.colour, linestyle=look.dash, linewidth=1.1, alpha=0.85)
        if not axes.lines:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("fine-tuning loss")
        return _to_svg(figure, f"tuning-{study.dataset}-{labels}", f"Fine-tuning loss with {labels_text(labels)}")


def pre_training_curves(study: Study) -> list[str]:
    """Loss of the runs the starting weights came from; different kinds of loss do not share an axis."""
    parents: dict[str, dict[Path, tuple[RunFolder, str]]] = {}
    for start in study.starts:
        for parent in study.parents(start):
            kind = parent.results.get("kind", "denoise")
            # several starts may come from one run: it is drawn once, in the look of the first
            parents.setdefault(LOSSES.get(kind, f"{kind} loss"), {}).setdefault(parent.path, (parent, start))
    curves = [_pre_training_curve(study, loss, members.values()) for loss, members in parents.items()]
    return [svg for svg in curves if svg is not None]


def _pre_training_curve(study: Study, loss: str, parents: Iterable[tuple[RunFolder, str]]) -> str | None:
    with mpl.rc_context(RC):
        figure, axes = _blank(NARROW)
        for parent, start in parents:
            look = looks(study)[start]
            images, losses = _losses(parent.path, "images")
            if len(images) > 1:
                axes.plot(images, losses, color=look.colour, linewidth=0.8, alpha=0.35)
                axes.plot(images, _smooth(losses), color=look.colour, linestyle=look.dash, linewidth=1.6)
        if not axes.lines:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("images seen")
        axes.set_ylabel(loss)
        axes.xaxis.set_major_formatter(THOUSANDS)
        return _to_svg(figure, f"pretraining-{study.dataset}-{loss}", f"Pre-training: {loss}")


def _losses(folder: Path, against: str) -> tuple[np.ndarray, np.ndarray]:
    """`against` and loss of the lines of metrics.jsonl that have both."""
    lines = [line for line in read_lines(folder / METRICS) if line.get("loss") is not None and against in line]
    return np.array([line[against] for line in lines]), np.array([line["loss"] for line in lines], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _log_if_positive(axes: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    # within a factor of three a logarithmic axis would have a label or two
    if values.min() > 0 and values.max() > 3 * values.min():
        axes.set_yscale("log")
        _label_log_axis(axes, (1, 2, 5))


def snapshots_by_step(study: Study) -> dict[tuple[str, str], dict[int, str]]:
    """Starts by step of the pre-training run and kind of weights they come from, where several steps were taken."""
    sources: dict[tuple[str, str], dict[int, str]] = {}
    for start in study.starts:
        parent = study.select(start)[0].home.facts.get("parent") or {}
        if parent.get("step") is not None and parent.get("path"):
            folder = Path(parent["path"])
            # RUN/snapshots/STEP: starts of the same RUN make a curve
            root = folder.parents[1] if folder.parent.name == "snapshots" else folder
            sources.setdefault((str(root), str(parent.get("use"))), {}).setdefault(int(parent["step"]), start)
    return {source: dict(sorted(starts.items())) for source, starts in sources.items() if len(starts) > 1}


def mre_by_pre_training(study: Study, shots: Sequence[int]) -> str | None:
    """MRE (protocol original) against pre-training steps, a line per number of labels (figure 2 of the paper).

    None where no two starts are snapshots of one pre-training run.
    """
    sources = snapshots_by_step(study)
    if not sources:
        return None
    with mpl.rc_context(RC):
        figure, axes = _blank(WIDE)
        for (folder, use), starts in sources.items():
            for index, labels in enumerate(shots):
                scores = {step: study.score(start, labels, "original") for step, start in starts.items()}
                spreads = {step: score.mre for step, score in scores.items() if score is not None}
                means = np.array([mre[0] for mre in spreads.values()])
                std = np.array([mre[1] or 0.0 for mre in spreads.values()])
                colour = PALETTE[index % len(PALETTE)]
                name = labels_text(labels) + (f", {Path(folder).name} {use}" if len(sources) > 1 else "")
                axes.fill_between(list(spreads), means - std, means + std, color=colour, alpha=0.13, linewidth=0)
                marker = MARKERS[index % len(MARKERS)]
                axes.plot(list(spreads), means, color=colour, marker=marker, markersize=5, label=name)
        axes.set_ylim(bottom=0)  # gains are seen at their true size
        axes.set_xlabel("pre-training, optimizer steps")
        axes.set_ylabel(f"mean radial error, {study.unit_name('original')}")
        axes.xaxis.set_major_formatter(THOUSANDS)
        figure.legend(loc="outside lower center", ncols=3)
        return _to_svg(figure, f"steps-{study.dataset}", "Mean radial error by length of pre-training")


def _blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty drawing of so many inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: Figure, name: str, title: str) -> str:
    """SVG text to put into a page: scales with it, and has a title for screen readers."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids of clip paths are random without it
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML head, which HTML does not have
    head, _, body = svg.partition(">")
    # without width and height, which would be absolute, the figure takes the width of its frame
    box = head[head.index("viewBox") :].split('"')[1]
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = body.replace("'DejaVu Sans', sans-serif", "inherit").replace("'DejaVu Sans'", "inherit")
    return f'<svg {namespaces} viewBox="{box}" role="img" aria-label="{title}">{body}'


def overlays(study: Study, start: str) -> str:
    """Best, median and worst image of the best start with most labels (its first seed)."""
    run = study.select(start, max(labels for labels in study.shots if study.select(start, labels)))[0]
    errors = sorted(run.image_errors().items(), key=lambda item: item[1])
    if not errors:
        return ""
    title = "Best, median and worst"
    opened: dict[str, Manifest] = {}
    chosen = {"best": errors[0], "median": errors[len(errors) // 2], "worst": errors[-1]}
    try:
        drawn = [
            html.figure(
                html.image(draw_image(run, name, SIDE, opened), f"x-ray {name} with landmarks"),
                f"<strong>{which}</strong> {escape(name)}: {error:.2f} {run.unit} on average",
            )
            for which, (name, error) in chosen.items()
        ]
    except DataError as error:
        return _not_at_hand(title, error)
    text = f"Starting from {escape(study.title(start))} with {labels_text(run.labels)}, seed {run.seed}. {KEY}"
    return f"<h2>{title}</h2>{html.note(text)}{html.figures(drawn, 'figures three')}"


def one_image_every_method(study: Study) -> str:
    """The median image of the best start with most labels, as each start sees it with few and with many labels."""
    shots = featured_shots(study.shots)
    best = study.best_start(shots[-1])
    ranked = sorted(study.select(best, shots[-1])[0].image_errors().items(), key=lambda item: item[1])
    if not ranked or len(study.starts) < 2:
        return ""
    title = "One image, every method"
    name = ranked[len(ranked) // 2][0]
    blocks = []
    opened: dict[str, Manifest] = {}
    try:
        for start in study.starts:
            runs = [next(iter(study.select(start, labels)), None) for labels in shots]
            cells = "".join(_panel(run, name, labels, opened) for run, labels in zip(runs, shots))
            blocks.append(
                f'<div class="method"><h3>{method_name(study, start)}</h3><div class="panels">{cells}</div></div>'
            )
    except DataError as error:
        return _not_at_hand(title, error)
    text = (
        f"Image {escape(name)}, the median one of {escape(study.title(best))} with {labels_text(shots[-1])}, around "
        f"its landmarks; first seed of every row. Below each picture its mean radial error. {KEY}"
    )
    grid = f'<div class="methods" style="--columns:{len(shots)}">{"".join(blocks)}</div>'
    return f"<h2>{title}</h2>{html.note(text)}{grid}"


def _not_at_hand(title: str, error: DataError) -> str:
    return f"<h2>{title}</h2>{html.note(f'The packed images could not be read: {escape(str(error))}')}"


def _panel(run: Run | None, name: str, labels: int, opened: dict[str, Manifest]) -> str:
    """A small picture with its error; a gap where there is no such run."""
    if run is None:
        return f'<div class="gap">{labels_text(labels)}: not run</div>'
    error = run.image_errors()[name]
    drawn = draw_image(run, name, PANEL_SIDE, opened, is_cropped=True)
    picture = html.image(drawn, f"x-ray {name}, {run.start}, {labels_text(labels)}")
    return f'<div class="panel">{picture}<span>{labels_text(labels)}: {error:.2f} {run.unit}</span></div>'


def draw_image(run: Run, name: str, longest: int, opened: dict[str, Manifest], *, is_cropped: bool = False) -> bytes:
    """JPEG of one test image in its native aspect with found and annotated points, whole or around the landmarks.

    Args:
        longest: the longer side in pixels before cropping; a whole image is never below its stored resolution.
        opened: the datasets of the runs before, by folder; those of this run are added.

    Raises:
        DataError: the packed data is not there, or is other data.
    """
    if run.home.cfg is None:
        raise DataError(f"{run.home.path} has no config.yaml, which says where its data is")
    # of a mixture, the dataset of this part
    for path in run.home.cfg.data.path:
        if path not in opened:
            opened[path] = Manifest.open(path)
    sets = [opened[path] for path in run.home.cfg.data.path]
    manifest = next((each for each in sets if each.dataset == run.results["dataset"]), sets[0])
    for row in manifest.rows([run.results["split"]]):
        record = manifest.read_record(int(row))
        if record.id == name:
            break
    else:
        raise DataError(f"{manifest.root} has no image {name}")
    native = np.array(record.native_size)
    scale = (longest if is_cropped else max(longest, manifest.stored_size)) / native.max()
    size = tuple(int(value) for value in np.maximum(1, np.rint(native * scale)))
    # the centre of the top-left pixel is (0, 0) in both frames, hence the halves
    to_shown = np.array([[scale, 0, 0.5 * scale - 0.5], [0, scale, 0.5 * scale - 0.5], [0, 0, 1]])
    from_stored = np.linalg.inv(np.vstack([record.to_stored, [0, 0, 1]]))
    matrix = (to_shown @ from_stored)[:2]
    stored = to_uint8(manifest.decode(int(row)))
    shown = cv2.warpAffine(stored, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    points, true = (
        (np.array([[float(line[x]), float(line[y])] for line in run.predictions[name]]) + 0.5) * scale - 0.5
        for x, y in (("x", "y"), ("true_x", "true_y"))
    )
    drawn = draw_overlay(shown, points, true=true, side=max(size))
    return encode_jpeg(_around(drawn, true) if is_cropped else drawn)


def _around(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The part of a picture `[H, W, 3]` that holds all points `[N, 2]`, with a margin."""
    margin = MARGIN * float(np.ptp(points, axis=0).max())
    low = np.maximum(points.min(0) - margin, 0).astype(int)
    high = np.minimum(points.max(0) + margin, picture.shape[1::-1]).astype(int)
    return np.ascontiguousarray(picture[low[1] : high[1] + 1, low[0] : high[0] + 1])


def calibration_plots(study: Study) -> str:
    """The run's own calibration.png of each start at its largest number of labels, with its temperatures."""
    drawn = []
    for start in study.starts:
        runs = [runs[0] for k in study.shots if (runs := [r for r in study.select(start, k) if _has_reliability(r)])]
        path = runs[-1].path / "calibration.png" if runs else None
        if path is None or not path.is_file():
            continue
        run = runs[-1]
        temperatures = ", ".join(f"{name.replace('_', ' ')} {t:.2f}" for name, t in fitted_temperatures(run).items())
        text = f"seed {run.seed}. " + (f"Temperatures: {temperatures}." if temperatures else "No temperatures.")
        title = f"{study.title(start)}, {labels_text(run.labels)}"
        picture = html.image(path.read_bytes(), f"expected and real errors of {title}", "png")
        drawn.append(html.figure(picture, escape(f"Each dot is a landmark; {text}"), title))
    return html.figures(drawn) if drawn else ""


def _has_reliability(run: Run) -> bool:
    return bool(run.results.get("reliability"))
