"""Result files against one another: ratios with bounds, what makes two files differ, and a picture.

Only rows of the same benchmark with the same conditions are compared. A row without a partner is named with the
condition it differs in (another precision, another size), never compared all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ddpm_lmk.bench.ratio import Comparison, compare_samples
from ddpm_lmk.bench.result import Result, Row, Stored, quartiles, read_result, read_results
from ddpm_lmk.errors import ConfigError

# Clocks that other programs hardly disturb; those of the wall are only taken where there is none of these.
BUSY = ("device_s", "cpu_s", "images_per_cpu_s")
WALL = ("wall_s", "images_per_s")
PLACES = ("hardware", "versions", "settings", "code")
PASSING = ("load_1_min", "niceness")  # differ from one minute to the next
MOST_REMARKS = 12


@dataclass(frozen=True)
class Line:
    """One row of both sides: medians of `clock`, and the first over the second."""

    what: str
    conditions: str
    clock: str
    first: float
    second: float
    comparison: Comparison

    @property
    def is_better(self) -> bool:
        """Is the first side the faster one?"""
        ratio = self.comparison.ratio
        return ratio is not None and (ratio < 1) == self.clock.endswith("_s")


def open_side(path: Path) -> list[Stored]:
    """The result of a file, or all results in a folder; raises `ConfigError` where there is none."""
    if not Path(path).is_dir():
        return [read_result(path)]
    results = read_results(path)
    if not results:
        raise ConfigError(f"{path} holds no result of `ddpm-lmk bench`; give a result file or a folder with some")
    return results


def compare_sides(first: Sequence[Stored], second: Sequence[Stored]) -> tuple[list[Line], list[str]]:
    """Lines for what both sides measured alike, newest files first, and remarks on the rest."""
    ours, theirs = (
        {(file.benchmark, *row.key): (row, file) for file in side for row in file.rows} for side in (first, second)
    )
    lines, remarks = [], _differences(first[-1], second[-1])
    # files come oldest first, so that a later one has replaced the rows that both measured
    for key, (row, file) in ours.items():
        if key not in theirs:
            continue
        partner, other_file = theirs[key]
        is_same_device = file.facts["hardware"]["device"] == other_file.facts["hardware"]["device"]
        # processor time says nothing between a CPU and a GPU
        clocks = (*(BUSY if is_same_device else ()), *WALL)
        clock = next((clock for clock in clocks if clock in row.samples and clock in partner.samples), None)
        if clock is None:
            remarks.append(f"{_words(row)}: measured once, so its noise is not known: not compared")
            continue
        values = row.samples[clock], partner.samples[clock]
        comparison = _refusal(clock, file, other_file) or compare_samples(*values, anchor=_anchor(file, other_file))
        lines.append(Line(row.what, _conditions(row), clock, median(values[0]), median(values[1]), comparison))
    for side, others in ((ours, theirs), (theirs, ours)):
        remarks += [_why_alone(key, row, others) for key, (row, _) in side.items() if key not in others]
    return lines, list(dict.fromkeys(remarks))


def summarise(lines: Sequence[Line], remarks: Sequence[str]) -> str:
    """A comparison in one line: how many rows are faster, slower, or not to be told apart."""
    if not lines:
        return f"nothing was measured alike ({'; '.join(remarks[:2])})"
    faster = [line for line in lines if line.is_better]
    slower = [line for line in lines if line.comparison.is_distinguishable and not line.is_better]
    parts = []
    for name, some in (("faster", faster), ("slower", slower)):
        if some:
            clearest = max(some, key=lambda line: abs(1 - (line.comparison.ratio or 1)))
            most = f"{clearest.what} {clearest.conditions}, {clearest.comparison}"
            parts.append(f"{name} in {len(some)} rows (most: {most})")
    alike = len(lines) - len(faster) - len(slower)
    return "; ".join([*parts, *([f"{alike} rows not to be told apart"] if alike else [])])


def conclude(result: Result, folder: Path, label: str, *, earlier: Sequence[Path] = ()) -> Path:
    """Write a result, say how it compares with every earlier one of its kind, and draw them all.

    Args:
        earlier: folders with results besides `folder`.
    """
    from ddpm_lmk.system.console import print_status

    places = dict.fromkeys(Path(place).resolve() for place in (*earlier, folder))
    before = [old for place in places for old in read_results(place, result.benchmark)]
    path = result.write(folder, label)
    print_status(f"wrote {path}")
    result.budget.conclude("comparing with earlier results and drawing", lambda: _show(read_result(path), before))
    return path


def _show(new: Stored, before: Sequence[Stored]) -> None:
    """Say how a result compares with earlier ones, and draw them."""
    from ddpm_lmk.system.console import print_status

    others = 0
    for old in before:
        lines, remarks = compare_sides([new], [old])
        others += not lines
        if lines:
            print_status(f"against {old.path.name} ({old.machine}, {old.date[:10]}): {summarise(lines, remarks)}")
    if others:
        print_status(
            f"{others} earlier results measured something else; `ddpm-lmk bench --compare A B` says what differs"
        )
    if picture := draw([*before, new], new.path.with_suffix(".png")):
        print_status(f"drew {picture}")


def _refusal(clock: str, *files: Stored) -> Comparison | None:
    """A refusal where the clock of a CPU measured what else ran there, not what was measured."""
    on_cpu = [file.facts for file in files if file.facts["hardware"]["device"] == "cpu"]
    loads = [facts["load_1_min_before_and_after"][0] for facts in on_cpu]
    if clock not in WALL or not any(load > facts["hardware"]["cores"] for load, facts in zip(loads, on_cpu)):
        return None
    shown = " and ".join(f"{load:g}" for load in loads)
    return Comparison(None, None, None, f"not distinguishable: by the clock of a busy machine (load {shown})")


def _anchor(first: Stored, second: Stored) -> float:
    """How the same work went in both runs, where the machine is the same."""
    if first.machine != second.machine:
        return 1.0  # how the machines differ is what is compared
    return median(first.facts["anchor_s"]) / median(second.facts["anchor_s"])


def _differences(first: Stored, second: Stored) -> list[str]:
    """What two files were measured with that is not the same."""
    a, b = ({k: v for place in PLACES for k, v in _flat(side.facts.get(place, {}), place)} for side in (first, second))
    keys = [key for key in {**a, **b} if key.rsplit(".", 1)[-1] not in PASSING and a.get(key) != b.get(key)]
    lines = [f"differs: {key}: {a.get(key, 'not there')} | {b.get(key, 'not there')}" for key in keys[:MOST_REMARKS]]
    return lines + ([f"and {len(keys) - MOST_REMARKS} settings more"] if len(keys) > MOST_REMARKS else [])


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    """Dotted names and values of nested sections."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for part, inner in value.items() for leaf in _flat(inner, f"{name}.{part}")]


def _why_alone(key: tuple[str, str, str], row: Row, others: Mapping[tuple[str, str, str], tuple[Row, Stored]]) -> str:
    """The condition in which the nearest row of the other side differs."""
    if key[0] not in {other[0] for other in others}:
        return f"only one side has results of {key[0]}"
    gaps: list[list[str]] = [
        [f"{k} {v} and {other.conditions.get(k)}" for k, v in row.conditions.items() if other.conditions.get(k) != v]
        for other, _ in others.values()
        if other.what == row.what
    ]
    if not gaps:
        return f"{_words(row)}: only one side measured it"
    nearest = min(gaps, key=len)
    return f"{row.what}: not the same thing ({', '.join(nearest) or 'more conditions on one side'}): not compared"


def _words(row: Row) -> str:
    return f"{row.what} ({_conditions(row)})"


def _conditions(row: Row) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in row.conditions.items()
    )


# A row is drawn by the first of these that it has.
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
    """Draw the rows of the newest file, a panel per unit, beside those of older files that measured some of them.

    Quartiles are bars. None where the newest file holds nothing that was repeated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: `--compare` draws nothing
    from matplotlib.figure import Figure

    newest = results[-1]
    panels: dict[str, dict[tuple[str, str], Row]] = {}
    for row in newest.rows:
        unit = next((unit for unit in UNITS if unit in row.samples), None)
        if unit is not None and len(panels.setdefault(unit, {})) < MOST_ROWS:
            panels[unit].setdefault(row.key, row)
    if not panels:
        return None
    keys = {row.key for row in newest.rows if row.samples}
    alike = [result for result in results[:-1] if keys & {row.key for row in result.rows}]
    shown = [*alike[1 - MOST_FILES :], newest]
    heights = [max(2, len(rows)) for rows in panels.values()]
    figure = Figure(figsize=(11, 1.6 + 0.26 * sum(heights) + 0.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (unit, rows) in zip(axes, panels.items()):
        _draw_panel(axis, unit, rows, shown)
    figure.suptitle(f"bench {newest.benchmark}: {newest.machine}, {newest.date[:16].replace('T', ' ')}", fontsize=11)
    if len(shown) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=7, ncols=1)
    figure.savefig(path, dpi=120)
    return path


def _draw_panel(axis: Any, unit: str, rows: dict[tuple[str, str], Row], results: Sequence[Stored]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter

    places = {key: place for place, key in enumerate(rows)}
    for number, result in enumerate(results):
        points = [row for row in result.rows if row.key in rows and unit in row.samples]
        middles = [median(row.samples[unit]) for row in points]
        spread = [quartiles(row.samples[unit]) for row in points]
        is_newest = number == len(results) - 1  # large and red; the others are the darker the older
        axis.errorbar(
            middles,
            [places[row.key] + 0.6 * ((number + 0.5) / len(results) - 0.5) for row in points],
            xerr=[[abs(m - q[end]) for m, q in zip(middles, spread)] for end in (0, 1)],
            label=f"{result.path.name} ({result.machine})",
            fmt="o",
            capsize=2,
            color="tab:red" if is_newest else colormaps["viridis"](0.8 * number / max(1, len(results) - 1)),
            markersize=5 if is_newest else 3.5,
        )
    axis.set_yticks(range(len(rows)), [_label(row, list(rows.values())) for row in rows.values()], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", which="both", alpha=0.3)
    axis.set_xlabel(UNITS[unit], fontsize=9)


def _label(row: Row, rows: Sequence[Row]) -> str:
    """What a row measured, with the conditions in which rows of that kind differ."""
    alike = [other.conditions for other in rows if other.what == row.what]
    varied = [name for name in row.conditions if len({str(other.get(name)) for other in alike}) > 1]
    words = ", ".join(f"{name.removesuffix('_px').removesuffix('_images')} {row.conditions[name]}" for name in varied)
    return f"{row.what} ({words})" if words else row.what
