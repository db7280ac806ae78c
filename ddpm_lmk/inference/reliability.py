"""How well a model knows its errors: expected against real radial errors, in numbers and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.system import files

PLOT_NAME = "calibration.png"
BINS = 10
PEAK_LIMIT = 0.15  # peaks of sharp maps of this size are rarely above it (paper.md, section 5)
INK, DOTS, LINE = "#1c2733", "#0b66b0", "#c4621b"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def write_reliability(folder: Path, spread: np.ndarray, error: np.ndarray, *, unit: str, title: str) -> dict[str, Any]:
    """Write the plot of expected and real errors, both `[M, N]` in `unit`, into `folder`; returns `reliability`."""
    facts = reliability(spread.ravel(), error.ravel())
    plot = reliability_plot(spread.ravel(), error.ravel(), facts, unit=unit, title=title)
    files.write_bytes(folder / PLOT_NAME, plot)
    return {"unit": unit, **facts}


def reliability(spread: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """How well expected errors `[K]` tell real ones `[K]`, both in the same unit.

    Returns:
        `bins` of equal counts in order of the expected error, each with both means; `correlation` of ranks
        (Spearman); `gap`, the mean distance of the two means, weighted by count: 0 for an honest model.
    """
    order = np.argsort(spread, kind="stable")
    bins = [
        {"count": len(part), "expected": float(spread[part].mean()), "error": float(error[part].mean())}
        for part in np.array_split(order, min(BINS, len(order)))
        if len(part)
    ]
    gap = sum(each["count"] * abs(each["expected"] - each["error"]) for each in bins) / max(len(order), 1)
    return {"bins": bins, "correlation": _spearman(spread, error), "gap": gap}


def calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """Expected calibration error of peak probabilities `[K]`, as McCouat and Voiculescu (CVPR 2022) compute it.

    The caller counts a point as right when it is within the circle that has the area of one pixel of the map.

    Returns:
        `ece_pct`, the mean distance of confidence and accuracy in per cent, weighted by count, and its bins: ten of
        equal width up to 0.15, the last one open.
    """
    edges = np.linspace(0, PEAK_LIMIT, BINS + 1)[1:-1]
    which = np.searchsorted(edges, confidence, side="right")
    bins = [
        {
            "count": int(part.sum()),
            "confidence": float(confidence[part].mean()),
            "accuracy": float(is_right[part].mean()),
        }
        for index in range(BINS)
        if (part := which == index).any()
    ]
    distance = sum(each["count"] * abs(each["confidence"] - each["accuracy"]) for each in bins)
    return {"ece_pct": 100 * distance / max(len(confidence), 1), "peaks": bins}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks; None where one side does not vary."""
    ranks = [_ranks(values) for values in (a, b)]
    spreads = [float(each.std()) if len(each) else 0.0 for each in ranks]
    if min(spreads) == 0.0:
        return None
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / (spreads[0] * spreads[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2.0)[inverse]


def reliability_plot(spread: np.ndarray, error: np.ndarray, facts: dict[str, Any], *, unit: str, title: str) -> bytes:
    """PNG of expected `[K]` and real errors `[K]` in `unit`; `facts` is `reliability` of them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.2), layout="constrained")
        cloud, bars = figure.subplots(1, 2)
        figure.suptitle(f"{title}: {spread.size:,} landmarks", x=0.01, ha="left", fontsize=11)
        floor = max(1e-3, 0.01 * float(np.median(error)))  # a sure map expects no error at all: drawn at the edge
        positive = np.maximum(np.stack([spread, error]), floor)
        cloud.loglog(*positive, ".", ms=3, alpha=0.35, color=DOTS, rasterized=True)
        low, high = float(positive.min()), float(positive.max())
        cloud.plot([low, high], [low, high], "--", lw=1, color=INK)
        rank = facts["correlation"]
        told = "not defined" if rank is None else f"{rank:.2f}"
        cloud.set(xlabel=f"expected radial error, {unit}", ylabel=f"radial error, {unit}")
        cloud.set_title(f"rank correlation {told}")
        expected = [each["expected"] for each in facts["bins"]]
        real = [each["error"] for each in facts["bins"]]
        bars.plot(expected, real, "o-", color=LINE, label=f"{len(expected)} bins of equal count")
        top = 1.05 * max([*expected, *real, 1e-3])
        bars.plot([0, top], [0, top], "--", lw=1, color=INK, label="honest")
        bars.set(xlim=(0, top), ylim=(0, top), xlabel=f"mean expected radial error, {unit}")
        bars.set_ylabel(f"mean radial error, {unit}")
        bars.set_title(f"reliability: mean gap {facts['gap']:.2f} {unit}")
        bars.legend(loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
