"""Result files against one another: ratios with bounds, refusals with reasons, and what makes two files differ.

Only rows of the same benchmark with the same conditions are compared. A row without a partner is named with the
condition it differs in (another precision, another size), never compared all the same.

Results of one benchmark as a picture: a panel per unit, a line per row, a colour per file, quartiles as bars.

Rows are those of the newest file; an older one is drawn where it measured some of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ddpm_lmk.bench.ratio import Comparison, compare_samples
from ddpm_lmk.bench.result import Result, Row, Stored, quartiles, read_result, read_results
from ddpm_lmk.errors import ConfigError

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
    found = read_results(path)
    if not found:
        raise ConfigError(f"{path} holds no result of `ddpm-lmk bench`; give a result file or a folder with some")
    return found


def compare_sides(first: Sequence[Stored], second: Sequence[Stored]) -> tuple[list[Line], list[str]]:
    """Lines for what both sides measured alike, newest files first, and remarks on the rest."""
    ours, theirs = _newest(first), _newest(second)
    lines, remarks = [], _differences(first[-1], second[-1])
    for key, (row, source) in ours.items():
        if key not in theirs:
            remarks.append(_why_alone(key, row, [other for other, _ in theirs.values()], other_keys=theirs))
            continue
        other, partner = theirs[key]
        clock = _clock(
            row, other, same_device=source.facts["hardware"]["device"] == partner.facts["hardware"]["device"]
        )
        if clock is None:
            remarks.append(f"{_words(row)}: measured once, so its noise is not known: not compared")
            continue
        values = row.samples[clock], other.samples[clock]
        found = _while_busy(clock, source, partner) or compare_samples(*values, anchor=_anchor(source, partner))
        lines.append(Line(row.what, _condition_words(row), clock, median(values[0]), median(values[1]), found))
    remarks += [
        _why_alone(key, row, [mine for mine, _ in ours.values()], other_keys=ours)
        for key, (row, _) in theirs.items()
        if key not in ours
    ]
    return lines, list(dict.fromkeys(remarks))


def summarise(lines: Iterable[Line], remarks: Sequence[str]) -> str:
    """A comparison in one line: how many rows are faster, slower, or not to be told apart."""
    lines = list(lines)
    faster = [line for line in lines if line.is_better]
    slower = [line for line in lines if line.comparison.is_distinguishable and not line.is_better]
    alike = len(lines) - len(faster) - len(slower)
    if not lines:
        return f"nothing was measured alike ({'; '.join(remarks[:2])})"
    parts = [f"{name} {_best(found)}" for name, found in (("faster", faster), ("slower", slower)) if found]
    return "; ".join([*parts, *([f"{alike} rows not to be told apart"] if alike else [])])


def conclude(result: Result, folder: Path, label: str, *, earlier: Sequence[Path] = ()) -> Path:
    """Write a result, say how it compares with every earlier one of its kind, and draw them all.

    Args:
        earlier: folders with results besides `folder`.
    """
    from ddpm_lmk.system.console import say

    places = dict.fromkeys(Path(place).resolve() for place in (*earlier, folder))
    before = [found for place in places for found in read_results(place, result.benchmark)]
    path = result.write(folder, label)
    new = read_result(path)
    others = 0
    for old in before:
        lines, remarks = compare_sides([new], [old])
        others += not lines
        if lines:
            say(f"against {old.path.name} ({old.machine}, {old.date[:10]}): {summarise(lines, remarks)}")
    if others:
        say(f"{others} earlier results measured something else; `ddpm-lmk bench --compare A B` says what differs")
    picture = draw([*before, new], path.with_suffix(".png"))
    say(f"wrote {path}" + (f" and {picture.name}" if picture else ""))
    return path


def _best(lines: Sequence[Line]) -> str:
    """How many rows, and the clearest of them."""
    clearest = max(lines, key=lambda line: abs(1 - (line.comparison.ratio or 1)))
    return f"in {len(lines)} rows (most: {clearest.what} {clearest.conditions}, {clearest.comparison})"


def _newest(side: Sequence[Stored]) -> dict[tuple[str, ...], tuple[Row, Stored]]:
    return {(found.benchmark, *row.key): (row, found) for found in side for row in found.rows}


def _clock(first: Row, second: Row, *, same_device: bool) -> str | None:
    """What both rows have repeated values of; processor time says nothing between a CPU and a GPU."""
    candidates = (*(BUSY if same_device else ()), *WALL)
    return next((clock for clock in candidates if clock in first.samples and clock in second.samples), None)


def _while_busy(clock: str, first: Stored, second: Stored) -> Comparison | None:
    """A refusal where the clock of a CPU measured what else ran there, not what was measured."""
    loads = {found: found.facts["load_1_min_before_and_after"][0] for found in (first, second) if found.is_on_cpu}
    if clock not in WALL or not any(load > found.facts["hardware"]["cores"] for found, load in loads.items()):
        return None
    seen = " and ".join(f"{load:g}" for load in loads.values())
    return Comparison(None, None, None, f"not distinguishable: by the clock of a busy machine (load {seen})")


def _anchor(first: Stored, second: Stored) -> float:
    """How the same work went in both runs, where the machine is the same."""
    if first.machine != second.machine:
        return 1.0
    return median(first.facts["anchor_s"]) / median(second.facts["anchor_s"])


def _differences(first: Stored, second: Stored) -> list[str]:
    """What two files were measured with that is not the same."""
    found = []
    for place in PLACES:
        a, b = _flat(first.facts.get(place, {}), place), _flat(second.facts.get(place, {}), place)
        keys = [key for key in {**a, **b} if key.rsplit(".", 1)[-1] not in PASSING and a.get(key) != b.get(key)]
        found += [f"differs: {key}: {a.get(key, 'not there')} | {b.get(key, 'not there')}" for key in keys]
    more = [f"and {len(found) - MOST_REMARKS} settings more"] if len(found) > MOST_REMARKS else []
    return found[:MOST_REMARKS] + more


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}").items()}


def _why_alone(key: tuple[str, ...], row: Row, others: Sequence[Row], *, other_keys: Iterable[tuple[str, ...]]) -> str:
    """The condition in which the nearest row of the other side differs."""
    if key[0] not in {other[0] for other in other_keys}:
        return f"only one side has results of {key[0]}"
    alike = [other for other in others if other.what == row.what]
    if not alike:
        return f"{_words(row)}: only one side measured it"
    gaps = [
        {
            name: (value, other.conditions.get(name))
            for name, value in row.conditions.items()
            if other.conditions.get(name) != value
        }
        for other in alike
    ]
    smallest = min(gaps, key=len)
    apart = ", ".join(f"{name} {mine} and {theirs}" for name, (mine, theirs) in smallest.items())
    return f"{row.what}: not the same thing ({apart or 'more conditions on one side'}): not compared"


def _words(row: Row) -> str:
    return f"{row.what} ({_condition_words(row)})"


def _condition_words(row: Row) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in row.conditions.items()
    )


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
