"""Results of one benchmark as a picture: a panel per unit, a line per row, a colour per file, quartiles as bars.

Rows are those of the newest file; an older one is drawn where it measured some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ddpm_lmk.bench.result import Row, Stored, quartiles

UNITS = {
    "gflop_per_s": "GFLOP/s (right is better)",
    "gbyte_per_s": "GB/s (right is better)",
    "device_s": "seconds on the device (left is better)",
    "cpu_s": "processor seconds (left is better)",
    "images_per_s": "images/s (right is better)",
    "wall_s": "seconds (left is better)",
}
MOST_FILES, MOST_ROWS = 8, 40


def draw(results: Sequence[Stored], path: Path) -> Path | None:
    """Draw the newest files, the last one strongest; None where they hold nothing that was repeated."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    newest = results[-1]
    keys = {row.key for row in newest.rows if row.samples}
    alike = [found for found in results[:-1] if keys & {row.key for row in found.rows}]
    shown, panels = [*alike[1 - MOST_FILES :], newest], _panels(newest)
    if not panels:
        return None
    heights = [max(2, len(rows)) for rows in panels.values()]
    figure = Figure(figsize=(11, 1.6 + 0.26 * sum(heights) + 0.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (unit, rows) in zip(axes, panels.items()):
        _fill(axis, unit, rows, shown)
    figure.suptitle(f"bench {newest.benchmark}: {newest.machine}, {newest.date[:16].replace('T', ' ')}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(shown) > 1:
        figure.legend(handles, labels, loc="outside lower left", fontsize=7, ncols=1)
    figure.savefig(path, dpi=120)
    return path


def _panels(newest: Stored) -> dict[str, list[tuple[str, str]]]:
    """Keys of rows by unit."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for row in newest.rows:
        unit = _unit(row)
        rows = panels.setdefault(unit, []) if unit else []
        if row.key not in rows and len(rows) < MOST_ROWS:
            rows.append(row.key)
    return panels


def _unit(row: Row) -> str | None:
    return next((unit for unit in UNITS if unit in row.samples), None)


def _fill(axis: Any, unit: str, keys: list[tuple[str, str]], results: Sequence[Stored]) -> None:
    """One panel."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows: dict[tuple[str, str], Row] = {}
    for number, result in enumerate(results):
        points = [row for row in result.rows if row.key in keys and unit in row.samples]
        rows.update({row.key: row for row in points})
        offset = 0.6 * ((number + 0.5) / len(results) - 0.5)
        middles = [median(row.samples[unit]) for row in points]
        spread = [quartiles(row.samples[unit]) for row in points]
        axis.errorbar(
            middles,
            [keys.index(row.key) + offset for row in points],
            xerr=[[abs(m - q[end]) for m, q in zip(middles, spread)] for end in (0, 1)],
            label=f"{result.path.name} ({result.machine})",
            **_look(number, len(results)),
        )
    axis.set_yticks(range(len(keys)), [_label(rows[key], list(rows.values())) for key in keys], fontsize=8)
    axis.set_ylim(len(keys) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.set_xlabel(UNITS[unit], fontsize=9)


def _look(number: int, count: int) -> dict[str, Any]:
    """The newest file is red and large; the others are the darker the older."""
    from matplotlib import colormaps

    is_newest = number == count - 1
    colour = "tab:red" if is_newest else colormaps["viridis"](0.8 * number / max(1, count - 1))
    return {"fmt": "o", "capsize": 2, "color": colour, "markersize": 5 if is_newest else 3.5}


def _label(row: Row, rows: Sequence[Row]) -> str:
    """What a row measured, with the conditions in which rows of that kind differ."""
    alike = [other.conditions for other in rows if other.what == row.what]
    varied = [name for name in row.conditions if len({str(other.get(name)) for other in alike}) > 1]
    words = ", ".join(f"{name.removesuffix('_px').removesuffix('_images')} {row.conditions[name]}" for name in varied)
    return f"{row.what} ({words})" if words else row.what
