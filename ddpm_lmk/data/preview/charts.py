"""Statistics of packs as one PNG: native sizes, bit depths, spacings, intensities, and the mean film of each."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_lmk.data.preview.samples import BINS, Look
from ddpm_lmk.data.preview.sheet import hues

COLOURS = ("#0b66b0", "#d07300", "#2f9e44", "#7d4fa3", "#b3261e", "#00838f", "#6d4c41", "#5f6b78")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#1c2733",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5f6b78",
    "ytick.color": "#5f6b78",
    "legend.frameon": False,
}
_MEANS_A_ROW = 6


def statistics(looks: Sequence[Look]) -> bytes:
    """The charts of all packs together."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = -(-len(looks) // _MEANS_A_ROW)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 3.4 + 2.5 * rows), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.4, 2.5 * rows])
        above, below = parts
        sizes, depths, spacings, greys = above.subplots(1, 4)
        _sizes(sizes, looks)
        _depths(depths, looks)
        _spacings(spacings, looks)
        _greys(greys, looks)
        places = below.subplots(rows, _MEANS_A_ROW, squeeze=False).ravel()
        for axes in places:
            axes.set_axis_off()
        for axes, look in zip(places, looks):
            _mean(axes, look)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _named(looks: Sequence[Look]) -> list[tuple[Look, str, str]]:
    return [(look, COLOURS[n % len(COLOURS)], look.manifest.dataset) for n, look in enumerate(looks)]


def _sizes(axes: Any, looks: Sequence[Look]) -> None:
    for look, colour, name in _named(looks):
        native = np.array([record.native_size for record in look.records])
        axes.scatter(native[:, 0], native[:, 1], s=14, alpha=0.45, linewidths=0, color=colour, label=name)
    axes.set(xlabel="width, px", ylabel="height, px", title="native size", xlim=(0, None), ylim=(0, None))
    for handle in axes.legend(fontsize=7.5, loc="best", handletextpad=0.2).legend_handles:
        handle.set_alpha(1)


def _depths(axes: Any, looks: Sequence[Look]) -> None:
    """Stacked bars: films for each number of bits of their file."""
    found = [Counter("?" if bits is None else str(bits) for bits in look.source_bits) for look in looks]
    kinds = sorted({bits for counts in found for bits in counts}, key=lambda bits: (bits == "?", bits.zfill(2)))
    below = np.zeros(len(kinds))
    for (_, colour, _), counts in zip(_named(looks), found, strict=True):
        heights = np.array([counts[bits] for bits in kinds])
        axes.bar(kinds, heights, bottom=below, width=0.55, color=colour)
        below += heights
    axes.set(xlabel="bits per pixel of the file (?: not noted)", ylabel="sampled images", title="bit depth")
    axes.margins(x=0.6 / len(kinds) + 0.1)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _spacings(axes: Any, looks: Sequence[Look]) -> None:
    known = [(look.spacings, colour) for look, colour, _ in _named(looks)]
    axes.set(title="pixel spacing", xlabel="mm per native px", ylabel="sampled images")
    if not any(values for values, _ in known):
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes.text(0.5, 0.5, "unknown", ha="center", va="center", color="#5f6b78", transform=axes.transAxes)
        return
    everything = np.concatenate([values for values, _ in known])
    low, high = everything.min(), everything.max()
    bins = np.linspace(low, high, 25) if high > low else np.linspace(0, 2 * high, 26)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.hist([values for values, _ in known], bins=bins, stacked=True, color=[colour for _, colour in known])
    unknown = sum(len(look.records) - len(look.spacings) for look in looks)
    if unknown:
        axes.text(0.98, 0.95, f"{unknown} unknown", ha="right", va="top", color="#5f6b78", transform=axes.transAxes)


def _greys(axes: Any, looks: Sequence[Look]) -> None:
    for look, colour, _ in _named(looks):
        axes.step((np.arange(BINS) + 0.5) / BINS, 100 * look.histogram, where="mid", color=colour, linewidth=1.2)
    axes.set(xlabel="stored intensity, share of the range", ylabel="pixels, %", title="intensities", xlim=(0, 1))
    axes.set_ylim(0, None)


def _mean(axes: Any, look: Look) -> None:
    """The mean film, and over it the mean shape with one standard deviation."""
    axes.imshow(look.mean_image, cmap="gray", vmin=0)
    axes.set_title(f"mean of {look.manifest.dataset}", fontsize=9, fontweight="normal")
    if len(look.points):
        mean, spread = look.points.mean(0), look.points.std(0)
        for (x, y), (sx, sy), colour in zip(mean, spread, hues(len(mean))):
            shade = tuple(part / 255 for part in colour)
            axes.errorbar(x, y, yerr=sy, xerr=sx, fmt="o", ms=2.5, lw=1, color=shade)
