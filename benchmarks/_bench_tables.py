"""Results of the common form (`ddpm_lmk.bench`) as Markdown tables; `collect` puts them in place."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from _tables import machine, markdown

from ddpm_lmk.bench import Row, Stored, read_result, read_results
from ddpm_lmk.bench.result import quartiles


def newest(folder: Path, benchmark: str, label: str = "") -> Path:
    """The newest result of a benchmark and label; a path that is not there where there is none."""
    found = [result.path for result in read_results(folder, benchmark) if f"{benchmark}-{label}" in result.path.name]
    return found[-1] if found else folder / f"{benchmark}-{label}.json"


def _head(found: Stored) -> str:
    return f"{machine(found.facts)}; {found.facts['hardware']['threads']} thread"


def _spread(values: list[float], factor: float = 1.0, digits: int = 1) -> str:
    """Median and quartiles."""
    low, high = (factor * q for q in quartiles(values))
    return f"{factor * median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _bounds(ratio: dict[str, Any], *, percent: bool = False) -> str:
    """A ratio with its bounds, or that there is none."""
    low, high = ratio["ratio_low"], ratio["ratio_high"]
    if low is None:
        return str(ratio["reason"])
    scale, shift, unit = (100, 100, " %") if percent else (1, 0, "")
    digits = 1 if percent else 2
    between = f"{scale * low - shift:.{digits}f} to {scale * high - shift:.{digits}f}{unit}"
    if ratio["ratio"] is None:
        return f"not distinguishable ({between})"
    return f"{scale * ratio['ratio'] - shift:.{digits}f}{unit} ({between})"


def device_rates_table(source: Path) -> str:
    """Peaks, bandwidths and the rate of the network's own convolutions."""
    found = read_result(source)
    rows: list[list[object]] = []
    for row in found.rows:
        if row.what in ("matrix product", "read", "write", "copy", "triad"):
            unit = "gflop_per_s" if "gflop_per_s" in row.samples else "gbyte_per_s"
            name = f"{row.what}, {row.conditions['precision']}" if row.what == "matrix product" else row.what
            shown = "GFLOP/s" if unit == "gflop_per_s" else "GB/s"
            rows.append([name, row.conditions["threads"], _spread(row.samples[unit]), shown])
        if row.what == "all convolutions of the network":
            for way, name in (("forward", "forward"), ("both", "forward and backward")):
                rows.append([f"3x3 convolutions as in {found.facts['settings']['name']}, {name}", 1])
                rows[-1] += [f"{row.figures[f'{way}_gflop_per_s']:.1f}", "GFLOP/s"]
    return f"{_head(found)}\n\n{markdown(['what', 'threads', 'median (quartiles)', 'unit'], rows)}"


def step_parts_table(source: Path) -> str:
    """A step, its parts and its levels."""
    found = read_result(source)
    rows = []
    for row in found.rows:
        share = row.figures.get("share_of_measured_peak_pct")
        level = row.figures.get("share_of_all_levels_pct")
        rows.append(
            [
                row.what,
                _spread(row.busy_s, 1e3),
                "" if share is None else f"{share:.0f}",
                "" if "model_gflop_per_s" not in row.figures else f"{row.figures['model_gflop_per_s']:.1f}",
                "" if level is None else f"{level:.0f}",
            ]
        )
    whole = _row(found, "train step")
    heads = ["what", "busy, ms (quartiles)", "share of measured peak, %", "model GFLOP/s", "share of levels, %"]
    memory = (
        f"Memory of training: {whole.figures['peak_memory_gib']:.2f} GiB measured, "
        f"{whole.figures['estimated_memory_gib']:.2f} GiB estimated."
    )
    words = ", ".join(f"{value} {key}" for key, value in whole.conditions.items() if key.endswith(("_px", "_images")))
    return f"{_head(found)}; {found.facts['settings']['name']}, {words}\n\n{markdown(heads, rows)}\n\n{memory}"


def training_table(source: Path) -> str:
    """Real runs: rate, waiting for data, and what the engine adds to a loop by hand."""
    results = list(
        {result.facts["settings"]["name"]: result for result in read_results(source.parent, "train")}.values()
    )
    rows = []
    for found in results:
        training = _row(found, "training")
        [overhead] = [ratio for ratio in found.facts["ratios"] if ratio["what"] == "engine step over bare step"]
        rows.append(
            [
                found.facts["settings"]["name"],
                training.conditions["image_size_px"],
                training.conditions["group_images"],
                _spread(training.samples["images_per_s"]),
                f"{training.figures['data_wait_share_pct']:.2f}",
                f"{1e3 * median(_row(found, 'bare step').busy_s):.0f}",
                _bounds(overhead, percent=True),
            ]
        )
    heads = ["run", "size, px", "group", "images/s (quartiles)", "waiting for data, %", "bare step, CPU-ms"]
    heads.append("engine's overhead")
    return f"{_head(results[-1])}\n\n{markdown(heads, rows)}"


def scaling_table(source: Path) -> str:
    """Efficiency by both clocks, and what explains it."""
    found = read_result(source)
    ratios: dict[tuple[int, str], dict[str, str]] = {}
    for ratio in found.facts["ratios"]:
        ratios.setdefault((ratio["processes"], ratio["what"]), {})[ratio["clock"]] = _bounds(ratio)
    rows = [
        [count, what, clocks.get("wall_s", ""), clocks.get("cpu_s", "")] for (count, what), clocks in ratios.items()
    ]
    heads = ["processes", "what", "by the clock (bounds)", "by processor time (bounds)"]
    return f"{_head(found)}; {found.facts['settings']['name']}\n\n{markdown(heads, rows)}"


def memory_table(source: Path) -> str:
    """Estimated against measured memory, by what fills it."""
    found = read_result(source)
    rows = []
    for row in found.rows:
        where = row.conditions
        again = {True: "all", False: "none"}.get(where["checkpointing"], "some")
        shape = [where["name"], where["task"], where["image_size_px"], where["batch_images"], where["precision"], again]
        ratio = f"{row.figures['estimate_over_measured']:.2f}"
        rows.append([*shape, _gib(row, "estimated_memory_gib"), _gib(row, "peak_memory_gib"), ratio])
    heads = ["network", "task", "size, px", "images", "precision", "levels computed again"]
    return f"{_head(found)}\n\n{markdown([*heads, 'estimated, GiB', 'measured, GiB', 'ratio'], rows)}"


def sweep_table(source: Path) -> str:
    """A sweep and its cells run one by one, round by round; a ratio only where there are enough rounds for one."""
    found = read_result(source)
    rows = []
    for row in found.rows:
        walls, busy = (", ".join(f"{value:.0f}" for value in row.samples[clock]) for clock in ("wall_s", "cpu_s"))
        name = f"{row.what}, {row.conditions['workers']} workers" if row.what == "sweep" else row.what
        rows.append([name, walls, busy, f"{row.figures['images_per_s']:.2f}"])
    sweep = _row(found, "sweep").figures
    equal = f"{sweep['cells_equal_bit_by_bit']} of {sweep['cells_compared']} cells compared are equal bit by bit"
    ratios = "; ".join(f"{ratio['what']}: {_bounds(ratio)}" for ratio in found.facts["ratios"])
    heads = ["", "wall time of a round of 5 cells, s", "processor time, s", "training images/s"]
    head = f"{machine(found.facts)}; {found.facts['settings']['run_file']}"
    return f"{head}\n\n{markdown(heads, rows)}\n\n{equal}; {ratios}."


def loading_table(source: Path) -> str:
    """Images per second of the loader per size, residency and augmentation."""
    found = read_result(source)
    rows = [
        [*(row.conditions[key] for key in ("image_size_px", "residency", "augmented_share")), *_rates(row)]
        for row in found.rows
        if row.what == "loading"
    ]
    return f"{_head(found)}\n\n{markdown(['size, px', 'residency', 'share of images moved', *RATES], rows)}"


def ways_table(source: Path) -> str:
    """The same images read in other ways and from other places."""
    found = read_result(source)
    rows = [
        [row.conditions["way"], row.conditions["from"], *_rates(row), f"{row.figures['cores_for_4000_per_s']:.1f}"]
        for row in found.rows
        if row.what == "way"
    ]
    return f"{_head(found)}\n\n{markdown(['way', 'from', *RATES, 'cores for 4,000 images/s'], rows)}"


def loader_training_table(source: Path) -> str:
    """Short real runs from every place."""
    found = read_result(source)
    rows = [
        [
            row.conditions["loader"],
            row.conditions["from"],
            _spread(row.samples["images_per_s"]),
            _spread(row.samples["data_wait_pct"], digits=2),
        ]
        for row in found.rows
        if row.what == "training"
    ]
    heads = ["loader", "from", "images/s (quartiles)", "waiting for data, % (quartiles)"]
    return f"{_head(found)}\n\n{markdown(heads, rows)}"


def switches_table(source: Path) -> str:
    """Time of a step with each switch, against the first of as many micro-batches, and what one keeps."""
    found = read_result(source)
    ratios = {ratio["what"].partition(" over ")[0]: _ratio(ratio) for ratio in found.facts["ratios"]}
    rows = [
        [
            row.conditions["switch"],
            f"{row.conditions['micro_batches']} x {row.conditions['batch_images']}",
            _spread(row.busy_s, 1e3),
            ratios.get(row.conditions["switch"], ""),
            f"{row.figures['kept_mib']:.1f}" if "kept_mib" in row.figures else "",
        ]
        for row in found.rows
    ]
    head = f"{_head(found)}; {found.rows[0].conditions['image_size_px']} pixels"
    heads = ["switch", "images", "step, busy ms (quartiles)", "time over the first", "kept by a micro-batch, MiB"]
    return f"{head}\n\n{markdown(heads, rows)}"


def _ratio(facts: dict[str, Any]) -> str:
    """A ratio with its bounds, or why there is none."""
    if facts["ratio"] is None:
        return str(facts["reason"])
    return f"{facts['ratio']:.2f} ({facts['ratio_low']:.2f} to {facts['ratio_high']:.2f})"


RATES = ("images/s (quartiles)", "images/CPU-s (quartiles)")


def _rates(row: Row) -> list[str]:
    return [_spread(row.samples[key], digits=0) for key in ("images_per_s", "images_per_cpu_s")]


def _gib(row: Row, key: str) -> str:
    return f"{row.figures[key]:.2f}" if key in row.figures else ""


def _row(found: Stored, what: str) -> Row:
    return next(row for row in found.rows if row.what == what)
