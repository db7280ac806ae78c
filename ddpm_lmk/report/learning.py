"""The learning curves of a report: fine-tuning at one number of labels, and the runs the weights came from.

Error against the length of pre-training (figure 2 of the paper): starts that are snapshots of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ddpm_lmk.report.collect import Study, parents_of
from ddpm_lmk.report.figures import MARKERS, NARROW, PALETTE, STYLE, WIDE, blank, looks, to_svg, unit_name
from ddpm_lmk.rundir.log import METRICS, read_lines
from ddpm_lmk.system.files import read_json

LOSSES = {
    "denoise": "noise prediction loss",
    "mocov3": "MoCo v3 loss",
    "simclrv2": "SimCLR v2 loss",
    "dino": "DINO loss",
}


def fine_tuning_curves(study: Study, labels: int) -> str | None:
    """Training loss of every run at one number of labels; None where no run has metrics."""
    with mpl.rc_context(STYLE):
        figure, axes = blank(NARROW)
        for start in study.starts:
            look = looks(study)[start]
            for run in study.select(start, labels):
                steps, losses = _series(run.metrics(), "loss")
                if len(steps) > 1:
                    axes.plot(steps, losses, color=look.colour, linestyle=look.dash, linewidth=1.1, alpha=0.85)
        if not axes.lines:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("fine-tuning loss")
        return to_svg(figure, f"tuning-{study.dataset}-{labels}", f"Fine-tuning loss with {labels} labels")


def pre_training_curves(study: Study) -> dict[str, str]:
    """Loss of the runs the starting weights came from, by kind of loss: different kinds do not share an axis."""
    parents: dict[str, dict[Path, str]] = {}
    for start in study.starts:
        for parent in parents_of(study, start):
            kind = (read_json(parent / "results.json") or {}).get("kind", "denoise")
            parents.setdefault(LOSSES.get(kind, f"{kind} loss"), {}).setdefault(parent, start)
    curves = {loss: _pre_training_curve(study, loss, starts) for loss, starts in parents.items()}
    return {loss: svg for loss, svg in curves.items() if svg is not None}


def _pre_training_curve(study: Study, loss: str, starts: dict[Path, str]) -> str | None:
    with mpl.rc_context(STYLE):
        figure, axes = blank(NARROW)
        for parent, start in starts.items():
            look = looks(study)[start]
            images, losses = _series(read_lines(parent / METRICS), "loss", against="images")
            if len(images) > 1:
                axes.plot(images, losses, color=look.colour, linewidth=0.8, alpha=0.35)
                axes.plot(images, _smooth(losses), color=look.colour, linestyle=look.dash, linewidth=1.6)
        if not axes.lines:
            return None
        _log_if_positive(axes)
        axes.set_xlabel("images seen")
        axes.set_ylabel(loss)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return to_svg(figure, f"pretraining-{study.dataset}-{loss}", f"Pre-training: {loss}")


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


Source = tuple[str, str]  # run directory and kind of weights


def by_step(study: Study) -> dict[Source, dict[int, str]]:
    """Starts by step of the pre-training run they come from; only runs that several steps were taken of."""
    found: dict[Source, dict[int, str]] = {}
    for start in study.starts:
        run = next(run for run in study.runs if run.start == start)
        parent: dict[str, Any] = (read_json(run.home / "run.json") or {}).get("parent") or {}
        if parent.get("step") is not None and parent.get("path"):
            folder = Path(parent["path"])
            root = folder.parents[1] if folder.parent.name == "snapshots" else folder
            found.setdefault((str(root), str(parent.get("use"))), {}).setdefault(int(parent["step"]), start)
    return {source: dict(sorted(starts.items())) for source, starts in found.items() if len(starts) > 1}


def curve(study: Study, shots: Sequence[int]) -> str | None:
    """MRE (protocol original) against pre-training steps, a line per number of labels; None without such starts."""
    sources = by_step(study)
    if not sources:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = blank(WIDE)
        for (folder, use), starts in sources.items():
            for index, labels in enumerate(shots):
                scores = [(step, study.score(start, labels, "original")) for step, start in starts.items()]
                steps = [step for step, score in scores if score is not None]
                means = np.array([score.mre[0] for _, score in scores if score is not None])
                spread = np.array([score.mre[1] or 0.0 for _, score in scores if score is not None])
                colour = PALETTE[index % len(PALETTE)]
                name = f"{labels} {'label' if labels == 1 else 'labels'}"
                name += f", {Path(folder).name} {use}" if len(sources) > 1 else ""
                axes.fill_between(steps, means - spread, means + spread, color=colour, alpha=0.13, linewidth=0)
                axes.plot(steps, means, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pre-training, optimizer steps")
        axes.set_ylabel(f"mean radial error, {unit_name(study, 'original')}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, f"steps-{study.dataset}", "Mean radial error by length of pre-training")
