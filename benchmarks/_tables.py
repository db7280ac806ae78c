"""Result files of this folder as Markdown tables; `collect` puts them in place.

Most tables are columns of one kind of rows: heads, and for each a format string of what a row holds. The others need
more than one kind of row, or ratios between them.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ddpm_lmk.bench import Row, Stored, read_result, read_results
from ddpm_lmk.bench.result import quartiles

Table = Callable[[Path], str]


class Spread(list[float]):
    """Repeated values; `{values:1}` is their median and quartiles with one digit."""

    def __format__(self, digits: str) -> str:
        low, high = quartiles(self)
        return f"{median(self):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Blank:
    """Stands for what a row does not have; an empty cell in any format."""

    def __format__(self, spec: str) -> str:
        return ""


class Facts(dict[str, Any]):
    """What the format string of a cell may name."""

    def __missing__(self, key: str) -> Blank:
        return Blank()


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def columns(heads: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows; `heads` has a format string for each head."""
    return markdown([*heads], [[text.format_map(Facts(row)) for text in heads.values()] for row in rows])


def machine(result: dict[str, Any]) -> str:
    """One line on where and when a result was measured."""
    hardware = result.get("hardware") or result.get("device") or {}
    name = hardware.get("cpu") or hardware.get("name") or hardware.get("device")
    load = hardware.get("load_1_min", hardware.get("load_1min_at_end"))
    busy = "" if load is None else f", load {load:.1f} when measured"
    there = {key: value for key, value in result.get("versions", {}).items() if value not in (None, "None")}
    versions = ", ".join(f"{key} {value}" for key, value in there.items())
    cores, day = hardware.get("cores", hardware.get("cpus", "?")), result.get("date", result.get("when", ""))[:10]
    return f"{name}, {cores} core{'' if cores == 1 else 's'}{busy}; {versions}; {day}"


def of_rows(
    heads: Mapping[str, str],
    rows: Callable[[dict[str, Any]], Sequence[Mapping[str, Any]]] = lambda result: result["rows"],
) -> Table:
    """Columns of the rows of a result file of its own form."""

    def table(source: Path) -> str:
        result = json.loads(source.read_text())
        return f"{machine(result)}\n\n{columns(heads, rows(result))}"

    return table


def of_bench(what: str | None, heads: Mapping[str, str]) -> Table:
    """Columns of the rows of a result of the common form (`ddpm_lmk.bench`) that are about `what`."""

    def table(source: Path) -> str:
        found = read_result(source)
        return f"{bench_machine(found)}\n\n{columns(heads, [facts(row) for row in found.rows if row.what == what])}"

    return table


def facts(row: Row) -> dict[str, Any]:
    """Everything a row of the common form says, by name."""
    samples = {name: Spread(values) for name, values in row.samples.items()}
    return {
        "what": row.what,
        **row.conditions,
        **row.figures,
        **samples,
        "busy_ms": Spread(1e3 * s for s in row.busy_s),
    }


def bench_machine(found: Stored) -> str:
    """Where and when a result of the common form was measured."""
    return f"{machine(found.facts)}; {found.facts['hardware']['threads']} thread"


def newest(folder: Path, benchmark: str, label: str = "") -> Path:
    """The newest whole result of a benchmark and label on a CPU; a path that is not there where there is none."""
    found = [
        result.path
        for result in read_results(folder, benchmark)
        if f"{benchmark}-{label}" in result.path.name
        and result.facts["hardware"]["device"] == "cpu"
        and not result.facts.get("budget", {}).get("left_out")
    ]
    return found[-1] if found else folder / f"{benchmark}-{label}.json"


def _row(found: Stored, what: str) -> Row:
    return next(row for row in found.rows if row.what == what)


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


# Columns of one kind of rows

RATES = {"images/s (quartiles)": "{images_per_s:0}", "images/CPU-s (quartiles)": "{images_per_cpu_s:0}"}
loading_table = of_bench(
    "loading",
    {"size, px": "{image_size_px}", "residency": "{residency}", "share of images moved": "{augmented_share}", **RATES},
)
ways_table = of_bench(
    "way", {"way": "{way}", "from": "{from}", **RATES, "cores for 4,000 images/s": "{cores_for_4000_per_s:.1f}"}
)
loader_training_table = of_bench(
    "training",
    {
        "loader": "{loader}",
        "from": "{from}",
        "images/s (quartiles)": "{images_per_s:1}",
        "waiting for data, % (quartiles)": "{data_wait_pct:2}",
    },
)
pack_table = of_rows(
    {
        "dataset": "{dataset}",
        "encoding": "{encoding} {bits} bit{quality_words}",
        "bytes/image": "{bytes_per_image:,}",
        "packed images/CPU-s": "{pack_images_per_cpu_s:.0f}",
        "read images/CPU-s": "{read_images_per_cpu_s:,.0f}",
        "RMS error, grey levels": "{rms_levels}",
    },
    lambda result: [row | {"quality_words": f" q{row['quality']}" if row["quality"] else ""} for row in result["rows"]],
)
manifest_table = of_rows(
    {
        "samples": "{samples:,}",
        "shards": "{shards:,}",
        "index, MB": "{index_mb:.0f}",
        "open, s": "{open_s:.2f}",
        "open, CPU-s": "{open_cpu_s:.2f}",
        "highest memory, MB": "{after_draw_mb:.0f}",
        "draw, µs/sample": "{draw_us_per_sample:.1f}",
    },
    lambda result: [result],
)
save_table = of_rows(
    {
        "run file": "{file}",
        "checkpoint, MiB": "{checkpoint_mib}",
        "step, ms": "{step_ms:.0f}",
        "wait, ms": "{wait_ms:.0f}",
        "wait, % of a step (clock)": "{wait_pct_of_step:.1f}",
        "(processor)": "{wait_cpu_pct_of_step:.1f}",
        "without the thread, % of a step": "{without_thread_pct_of_step:.0f}",
        "cost at the interval, % of a step": "{cost_at_interval_pct_of_step:.3f}",
    },
    lambda result: [result | {"file": Path(result["run_file"]).name}],
)
pool_scale_table = of_rows(
    {
        "films": "{films}",
        "s": "{wall_s}",
        "processor s": "{cpu_s}",
        "highest memory, MB": "{highest_mb}",
        "planted": "{planted}",
        "found": "{found}",
        "others": "{others_found}",
    }
)
dali_resize_table = of_rows(
    {
        "bits": "{bits}",
        "to, px": "{size_px}",
        "triangular: max": "{triangular_max_levels}",
        "mean": "{triangular_mean_levels}",
        "linear: max": "{linear_max_levels}",
        "linear: mean": "{linear_mean_levels}",
        "host, us": "{host_us}",
    }
)
quarantine_table = of_rows(
    {
        "processes": "{processes}",
        "damaged": "{damaged_samples}",
        "listed": "{listed_samples}",
        "healthy, listed": "{healthy_and_listed}",
        "trained on": "{damaged_and_trained_on}",
        "same if killed": "{killed_run_agrees}",
        "same as one process": "{agrees_with_one_process}",
    }
)
exactness_table = of_rows(
    {
        "processes": "{count}",
        "class": "{name}",
        "step, ms": "{step_ms}",
        "against whole share": "{step_more_pct:+} %",
        "processor time of a rank, ms": "{cpu_ms}",
        "processor time against whole share": "{cpu_more_pct:+} %",
    },
    lambda result: [
        {"count": count, "name": name, **found}
        for count, variants in result["processes"].items()
        for name, found in variants.items()
    ],
)


# Tables of several kinds of rows


def in_place_table(source: Path) -> str:
    """Processor time of an image for each reader of a WebDataset, and the ratio to packed shards."""
    found = read_result(source)
    ratios = {(ratio["source"], ratio["reader"]): _bounds(ratio) for ratio in found.facts["ratios"]}
    prepare = {
        (row.conditions["source"], row.conditions["way"]): row.figures for row in found.rows if row.what == "prepare"
    }
    rows = []
    for row in (row for row in found.rows if row.what == "read"):
        key = row.conditions["source"], row.conditions["reader"]
        once = prepare.get(key, {})
        cells = [f"{once['cpu_ms_per_image']:.1f}", f"{once['disk_bytes_per_image'] / 1e3:.1f}"] if once else ["", ""]
        speed = Spread(row.samples["images_per_cpu_s"])
        rows.append([*key, f"{row.figures['cpu_ms_per_image']:.2f}", f"{speed:0}", ratios.get(key, ""), *cells])
    heads = ["images in the tars", "read", "CPU-ms/image", "images/CPU-s (quartiles)", "times the packed (bounds)"]
    heads += ["once: CPU-ms/image", "on disk, kB/image"]
    return f"{bench_machine(found)}\n\n{markdown(heads, rows)}"


def radius_table(source: Path) -> str:
    """What the radius holds in simulated films, beside what it would hold with points or films counted alone."""
    rows = json.loads(source.read_text())["rows"]

    def cell(found: dict[str, dict[str, Any]]) -> str:
        means = ["–" if each["mean_pct"] is None else f"{each['mean_pct']:.1f}" for each in found.values()]
        without = found["ours"]["without_pct"]
        more = f" ({without:.0f} % none)" if without >= 1 else ""
        return f"{means[0]} ± {found['ours']['std_pct']:.1f}{more} / {' / '.join(means[1:])}"

    kinds = [key for key in rows[0] if key != "films"]
    return markdown(["films", *kinds], [[row["films"], *(cell(row[kind]) for kind in kinds)] for row in rows])


def radius_films_table(source: Path) -> str:
    """What the radius held on test films, and what a constant one from the same folds did."""
    heads = [
        "labels",
        "seed",
        "folds",
        "factor",
        "points within, %",
        "mean radius, mm",
        "a constant one: within, %",
        "mm",
    ]
    keys = ("labels", "seed", "folds", "factor", "within_pct", "mean_mm", "constant_within_pct", "constant_mean_mm")
    return markdown(heads, [[row[key] for key in keys] for row in json.loads(source.read_text())])


def one_shot_table(source: Path) -> str:
    """One labelled film that was chosen, and the others without labels."""
    heads = ["film", "chosen as", "MRE, mm", "SDR 2 mm, %"]
    rows = json.loads(source.read_text())
    body = [[row["film"], row["chosen"], f"{row['mre_mm']:.2f}", f"{row['sdr_2mm_pct']:.1f}"] for row in rows]
    return markdown(heads, body)


TWO_LOOKS = {  # rows of configs/sweep/table2.yaml, in the order of the table
    "ddpm-contour": "DDPM, contour-hugging",
    "ddpm-disc": "DDPM, discs (the paper's method)",
    "gu2net": "GU2Net",
    "encoder": "U-Net, random weights",
    "mocov3": "U-Net, MoCo v3",
    "simclrv2": "U-Net, SimCLR v2",
    "dino": "U-Net, DINO",
    "scratch-adamw": "ours with AdamW, random weights",
    "ours-adamw": "ours with AdamW, DDPM pre-training",
    "ours-adamw-tuned": "ours, DDPM pre-training, fine-tuned with AdamW",
    "scratch-adamw-pool": "ours with AdamW, random weights, and images without labels",
    "ours-adamw-pool": "ours with AdamW, DDPM pre-training, and images without labels",
    "scratch": "ours, random weights",
    "ours": "ours, DDPM pre-training",
    "scratch-pool": "ours, random weights, and images without labels",
    "ours-pool": "ours, DDPM pre-training, and images without labels",
}
POOLS = {  # rows of configs/sweep/pool_cpu.yaml; those that table2 has too under its names
    "scratch-adamw": "none (random weights)",
    "chest-1500": "chests, 1,500",
    "chest-6000": "chests, 6,000",
    "chest-24000": "chests, 24,000",
    "isbi-1500": "cephalograms, 1,500",
    "isbi-6000": "cephalograms, 6,000",
    "ours-adamw": "cephalograms, 24,000",
    "both-6000": "both, 6,000",
    "both-24000": "both, 24,000",
    "both-72000": "both, 72,000",
}
Cells = dict[str, dict[int, list[dict[str, Any]]]]


def _by_labels(rows: list[dict[str, Any]]) -> Cells:
    """The runs of each start by number of labels; of one that was trained for two lengths, the longer."""
    found: Cells = {}
    for row in rows:
        runs = found.setdefault(row["start"], {}).setdefault(row["labels"], [])
        if runs and runs[0]["steps"] < row["steps"]:
            runs.clear()
        if not runs or runs[0]["steps"] == row["steps"]:
            runs.append(row)
    return found


def two_looks_table(source: Path, *, without: str | None = None) -> str:
    """Mean radial error in mm with two looks; mean and deviation over the seeds, the best of a column in bold.

    Args:
        without: leaves out the rows whose names have this in them.
    """
    rows = json.loads(source.read_text())
    found = _by_labels([row for row in rows if without is None or without not in row["start"]])
    labels = sorted({count for runs in found.values() for count in runs})
    means = {(s, k): statistics.mean(run["mre_mm"] for run in runs[k]) for s, runs in found.items() for k in runs}
    best = {count: min(mean for (_, k), mean in means.items() if k == count) for count in labels}

    def cell(start: str, count: int) -> str:
        runs = found[start].get(count, [])
        if not runs:
            return ""
        mean, errors = means[start, count], [run["mre_mm"] for run in runs]
        text = f"{mean:.2f} ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else f"{mean:.2f} (one seed)"
        return f"**{text}**" if mean == best[count] else text

    heads = ["start, and what it learns from", *(f"{count} label{'s' if count > 1 else ''}" for count in labels)]
    shown = [start for start in TWO_LOOKS if start in found]
    return markdown(heads, [[TWO_LOOKS[start], *(cell(start, count) for count in labels)] for start in shown])


def pools_table(source: Path) -> str:
    """Both looks after pre-training on pools of several kinds and sizes, with the same draws of shots."""
    rows = json.loads(source.read_text())
    asked = {(row["labels"], row["seed"], row["steps"]) for row in rows}
    rows += [
        row
        for row in json.loads((source.parent / "cells.json").read_text())
        if row["start"] in POOLS and (row["labels"], row["seed"], row["steps"]) in asked
    ]
    found, labels = _by_labels(rows), sorted({count for count, _, _ in asked})

    def cell(runs: list[dict[str, Any]]) -> str:
        return " → ".join(f"{statistics.mean(run[key] for run in runs):.2f}" for key in ("first_look_mm", "mre_mm"))

    body = [
        [POOLS[start], *(cell(found[start][count]) if count in found[start] else "" for count in labels)]
        for start in POOLS
        if start in found
    ]
    heads = ["images of pre-training", *(f"{count} label{'s' if count > 1 else ''}" for count in labels)]
    return markdown(heads, body)


def time_to_accuracy_table(source: Path) -> str:
    """Processor seconds of both recipes, and what they reach."""
    found = json.loads(source.read_text())
    rows = [
        [
            row["labels"],
            "one, pre-trained" if row["looks"] == 1 else "two, random weights",
            f"{row['mre_mm']:.2f} ({row['seeds']} seed{'s' if row['seeds'] > 1 else ''})",
            *(f"{row[key]:.0f}" for key in ("pretraining_s", "tuning_s")),
            f"{row['pretraining_s'] + row['tuning_s']:.0f}",
        ]
        for row in found["rows"]
    ]
    heads = ["labels", "looks", "MRE, mm", "pre-training, s", "fine-tuning, s", "together, s"]
    return f"{found['hardware']['cpu']}, one core; {found['date'][:10]}\n\n{markdown(heads, rows)}"


def optimizers_table(source: Path) -> str:
    """Loss on films left out by optimizer, rate and length, and the time to the best of AdamW."""
    found = json.loads(source.read_text())
    step_s = found["cost"]["step_cpu_s"]
    rows = []
    for run in sorted(found["runs"], key=lambda run: (run["images"], run["kind"], run["lr"])):
        alike = [other for other in found["runs"] if other["images"] == run["images"] and other["kind"] == "adamw"]
        best = min(alike, key=lambda other: other["losses"][-1]["loss"])
        reached = [point["images"] for point in run["losses"] if point["loss"] <= best["losses"][-1]["loss"]]
        share = "never" if not reached else f"{reached[0] / best['images'] * step_s[run['kind']] / step_s['adamw']:.2f}"
        loss = f"{run['losses'][-1]['loss']:.4f}"
        rows.append([f"{run['images']:,}", run["kind"], run["lr"], loss, share])
    cost = found["cost"]["muon_over_adamw"]
    heads = ["images", "optimizer", "rate", "loss", "processor time to AdamW's best loss"]
    ratio = f"A step with Muon takes {_bounds(cost)} times that with AdamW, by processor time."
    return f"{found['hardware']['cpu']}, one core; {found['date'][:10]}. {ratio}\n\n{markdown(heads, rows)}"


def hand_table(source: Path) -> str:
    """Landmark errors on phantoms of hands, by the recipe for one's own films: first look and both, mean and median."""
    rows = sorted(json.loads(source.read_text()), key=lambda row: (row["labels"], row["start"] != "scratch"))
    starts = {"scratch": "random weights", "pretrained": "24,000 images of pre-training"}
    cells = [
        [
            row["labels"],
            starts[row["start"]],
            f"{row['first_look_mm']:.2f} → {row['mre_mm']:.2f}",
            f"{row['median_mm']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["labels", "start", "first look → both, MRE, mm", "median, mm"], cells)


VARIANTS = {  # of pre-training, then of fine-tuning
    "adamw": "the recipe (AdamW, rate 0.001); films 131-150 without labels among its images",
    "tmax250": "timesteps up to 250 of 500 (`task.t_max`), else the recipe",
    "lognormal": "timesteps with log-normal noise around 0.3, else the recipe (not a setting)",
    "adamw4e-3": "AdamW, rate 0.004; films 001-130 alone",
    "muon": "Muon, rate 0.004; films 001-130 alone",
    "tune-adamw": "AdamW, rate 0.002",
    "tune-adamw-400": "AdamW, rate 0.002, 400 steps",
    "tune-muon-1e-3": "Muon, rate 0.001",
    "tune-muon-2e-3": "Muon, rate 0.002",
    "tune-muon-4e-3": "Muon, rate 0.004",
    "tune-muon-8e-3": "Muon, rate 0.008",
    "tune-muon-16e-3": "Muon, rate 0.016",
}


def variants_table(source: Path) -> str:
    """Landmark errors on validation films after variants of pre-training or of fine-tuning, a number for each seed."""
    found = _by_labels(json.loads(source.read_text()))
    labels = sorted({count for runs in found.values() for count in runs})

    def errors(start: str, count: int) -> str:
        runs = sorted(found[start].get(count, []), key=lambda run: run["seed"])
        return " / ".join(f"{run['mre_mm']:.2f}" for run in runs)

    heads = ["recipe", *(f"{count} label{'s' if count > 1 else ''}" for count in labels)]
    shown = [start for start in VARIANTS if start in found]
    return markdown(heads, [[VARIANTS[start], *(errors(start, count) for count in labels)] for start in shown])


def parts_table(source: Path) -> str:
    """What each part of the recipe gives on test films with the same labels, and the operations of its training."""
    cells = json.loads(source.read_text())
    found = _by_labels(cells)
    rows = []
    for count, pool in sorted(found["ours-pool"].items()):
        seeds = {run["seed"] for run in pool}
        alone = [run for run in cells if run["start"] == "ours" and run["labels"] == count]
        alone = [run for run in alone if run["seed"] in seeds and run["steps"] == pool[0]["steps"]]
        if not alone:
            continue
        columns = [(alone, "first_look_mm"), (alone, "mre_mm"), (pool, "mre_mm")]
        errors = [f"{statistics.mean(run[key] for run in runs):.2f}" for runs, key in columns]
        errors[1] += f" ({alone[0]['tflop']:.1f})"
        errors[2] += f" ({pool[0]['tflop']:.1f})"
        accepted = statistics.mean(run["accepted_pct"] for run in pool)
        rows.append([count, len(alone), *errors, f"{accepted:.0f}"])
    heads = ["labels", "seeds", "first look", "and a second", "and images without labels", "points accepted, %"]
    return markdown(heads, rows)


def second_look_table(source: Path) -> str:
    """What was tried of a second look and of pseudo-labels on validation films, and what their labels were worth."""
    found = json.loads(source.read_text())

    def both(trial: dict[str, Any], end: str) -> str:
        return " / ".join(f"{value:.2f}" for value in trial[f"mre_mm_{end}"])

    def seconds(trial: dict[str, Any]) -> str:
        if trial["processor_s_from"] is None:
            return ""
        return f"{trial['processor_s_from']} → {trial['processor_s_to']}"

    trials = [
        [
            *(trial[key] for key in ("what", "from", "to", "labels")),
            f"{both(trial, 'from')} → {both(trial, 'to')}",
            seconds(trial),
        ]
        for trial in found["trials"]
    ]
    labels = [list(row.values()) for row in found["pseudo_labels"]]
    words = [
        f"{found['hardware']['cpu']}, {found['hardware']['cores']} cores; {found['date']}; {found['films']}; "
        f"{found['program']}. Seeds side by side.",
        markdown(["what", "from", "to", "labels", "MRE, mm", "processor, s"], trials),
        "Points of pool films where both looks agree:",
        markdown(["labels", "seed", "accepted, %", "their error, mm", "off by over 10 mm, %", "round"], labels),
        "One film's points found in the others by the features alone, nothing fine-tuned: "
        + ", ".join(f"{row['one_shot_mm']} mm after {row['weights']} ({row['best']})" for row in found["matching"])
        + ".",
        "A pre-training too short to help: after {images} images the first look was off by {first_look_mm:.2f} mm with "
        "{labels} labels (seed {seed}, {films}), from random weights by {from_random_mm:.2f}. The demo's 8,000 images "
        "helped (README). What is in between stands in the table of pools.".format_map(found["short"]),
    ]
    return "\n\n".join(words)


def step_table(source: Path) -> str:
    """A step and its parts."""
    found = read_result(source)
    heads = {
        "what": "{what}",
        "busy, ms (quartiles)": "{busy_ms:1}",
        "share of measured peak, %": "{share_of_measured_peak_pct:.0f}",
        "model GFLOP/s": "{model_gflop_per_s:.1f}",
    }
    whole = _row(found, "train step")
    memory = "Memory of training: {peak_memory_gib:.2f} GiB measured, {estimated_memory_gib:.2f} GiB estimated."
    words = ", ".join(f"{value} {key}" for key, value in whole.conditions.items() if key.endswith(("_px", "_images")))
    head = f"{bench_machine(found)}; {found.facts['settings']['name']}, {words}"
    rows = [facts(row) for row in found.rows if "threads" in row.conditions and "group" not in row.conditions]
    return f"{head}\n\n{columns(heads, rows)}\n\n{memory.format_map(whole.figures)}"


LEAST_SHARE_PCT = 1  # of a step; what takes less is one row


def roofline_table(source: Path) -> str:
    """The operations of a step by level and group, beside the least they can take."""
    found = read_result(source)
    rows = [row for row in found.rows if row.what == "operations"]
    large = [row for row in rows if row.figures["share_of_step_pct"] >= LEAST_SHARE_PCT]
    sizes = dict.fromkeys(row.conditions["level_px"] for row in rows)
    lines = [_operations([row], str(row.conditions["level_px"] or ""), row.conditions["group"]) for row in large]
    lines.append(_operations([row for row in rows if row not in large], "", "all others"))
    lines += [
        _operations(
            [row for row in rows if row.conditions["level_px"] == size], str(size or "none"), "all of the level"
        )
        for size in sizes
    ]
    lines.append(_operations(rows, "", "all"))
    head = (
        "level, px",
        "operations",
        "calls",
        "GFLOP",
        "in the step, ms",
        "alone, ms",
        "least, ms",
        "least over step, %",
    )
    ratios = [ratio for ratio in found.facts["ratios"] if ratio["what"].startswith("train step over")]
    words = "; ".join(f"{ratio['what']} {_bounds(ratio)}" for ratio in ratios)
    where = _row(found, "train step").conditions
    shape = f"{where['image_size_px']} px, {where['batch_images']} images, {where['precision']}"
    return f"{bench_machine(found)}; {found.facts['settings']['name']}, {shape}\n\n{markdown(head, lines)}\n\n{words}."


def _operations(rows: Sequence[Row], level: str, group: str) -> list[object]:
    """One line of the roofline: sums over rows, round by round."""
    times = [
        median(1e3 * sum(values) for values in zip(*(row.samples[clock] for row in rows)))
        for clock in ("device_s" if "device_s" in rows[0].samples else "cpu_s", "alone_s", "least_s")
    ]
    calls, gflop = (sum(row.figures[name] for row in rows) for name in ("calls", "gflop"))
    return [level, group, calls, f"{gflop:.2f}", *(f"{ms:.1f}" for ms in times), f"{100 * times[2] / times[0]:.0f}"]


def switches_table(source: Path) -> str:
    """Time of a step with each switch, against the first of as many micro-batches, and what one keeps."""
    found = read_result(source)
    ratios = {ratio["what"].partition(" over ")[0]: ratio for ratio in found.facts["ratios"]}
    over = {
        name: "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format_map(ratio)
        if ratio["ratio"] is not None
        else str(ratio["reason"])
        for name, ratio in ratios.items()
    }
    heads = {
        "switch": "{switch}",
        "images": "{micro_batches} x {batch_images}",
        "step, busy ms (quartiles)": "{busy_ms:1}",
        "time over the first": "{over}",
        "kept by a micro-batch, MiB": "{kept_mib:.1f}",
    }
    rows = [facts(row) | {"over": over.get(row.conditions["switch"], "")} for row in found.rows]
    head = f"{bench_machine(found)}; {found.rows[0].conditions['image_size_px']} pixels"
    return f"{head}\n\n{columns(heads, rows)}"


def memory_table(source: Path) -> str:
    """Estimated against measured memory, by what fills it."""
    found = read_result(source)
    heads = {
        "network": "{name}",
        "task": "{task}",
        "size, px": "{image_size_px}",
        "images": "{batch_images}",
        "precision": "{precision}",
        "levels computed again": "{again}",
        "estimated, GiB": "{estimated_memory_gib:.2f}",
        "measured, GiB": "{peak_memory_gib:.2f}",
        "ratio": "{estimate_over_measured:.2f}",
    }
    again = {True: "all", False: "none"}
    rows = [facts(row) | {"again": again.get(row.conditions["checkpointing"], "some")} for row in found.rows]
    return f"{bench_machine(found)}\n\n{columns(heads, rows)}"


def train_table(source: Path) -> str:
    """Real runs: rate, waiting for data, and what the engine adds to a loop by hand."""
    newest_of = {result.facts["settings"]["name"]: result for result in read_results(source.parent, "train")}
    rows = []
    for name, found in newest_of.items():
        [overhead] = [ratio for ratio in found.facts["ratios"] if ratio["what"] == "engine step over bare step"]
        bare_ms = 1e3 * median(_row(found, "bare step").busy_s)
        more = {"run": name, "bare_ms": bare_ms, "overhead": _bounds(overhead, percent=True)}
        rows.append(facts(_row(found, "training")) | more)
    heads = {
        "run": "{run}",
        "size, px": "{image_size_px}",
        "group": "{group_images}",
        "images/s (quartiles)": "{images_per_s:1}",
        "waiting for data, %": "{data_wait_share_pct:.2f}",
        "bare step, CPU-ms": "{bare_ms:.0f}",
        "engine's overhead": "{overhead}",
    }
    return f"{bench_machine([*newest_of.values()][-1])}\n\n{columns(heads, rows)}"


def device_table(source: Path) -> str:
    """Peaks, bandwidths and the rate of the network's own convolutions."""
    found = read_result(source)
    rows: list[list[object]] = []
    for row in found.rows:
        if row.what in ("matrix product", "read", "write", "copy", "triad"):
            unit = "gflop_per_s" if "gflop_per_s" in row.samples else "gbyte_per_s"
            name = f"{row.what}, {row.conditions['precision']}" if row.what == "matrix product" else row.what
            shown = "GFLOP/s" if unit == "gflop_per_s" else "GB/s"
            rows.append([name, row.conditions["threads"], f"{Spread(row.samples[unit]):1}", shown])
        if row.what == "all convolutions of the network":
            for way, name in (("forward", "forward"), ("both", "forward and backward")):
                rows.append([f"3x3 convolutions as in {found.facts['settings']['name']}, {name}", 1])
                rows[-1] += [f"{row.figures[f'{way}_gflop_per_s']:.1f}", "GFLOP/s"]
    return f"{bench_machine(found)}\n\n{markdown(['what', 'threads', 'median (quartiles)', 'unit'], rows)}"


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
    return f"{bench_machine(found)}; {found.facts['settings']['name']}\n\n{markdown(heads, rows)}"


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
    cells = found.rows[0].conditions["cells_a_round"]
    heads = ["", f"wall time of a round of {cells} cells, s", "processor time, s", "training images/s"]
    head = f"{machine(found.facts)}; {found.facts['settings']['run_file']}"
    return f"{head}\n\n{markdown(heads, rows)}\n\n{equal}; {ratios}."


def packing_table(source: Path) -> str:
    """Films per core of packing, with and without isolation, and memory of a large tree."""
    result = json.loads(source.read_text())
    heads = ["source", "films", "refused", "films/CPU-s", "source MB/CPU-s", "without isolation, films/CPU-s"]
    heads += ["isolation, ms/film", "start of a process, CPU-s"]
    keys = ["dataset", "films", "refused", "isolated_films_per_cpu_s", "isolated_source_mb_per_cpu_s"]
    keys += ["in_this_process_films_per_cpu_s", "isolation_ms_per_film", "start_of_a_process_cpu_s"]
    rows = [[row[key] for key in keys] for row in result["rows"]]
    tree = result["tree"]
    small, large = (f"{count:,}" for count in tree["files"])
    peaks = " and ".join(f"{peak / 1e6:.0f} MB" for peak in tree["peak_rss_bytes"])
    memory = f"Trees of {small} and {large} files: at most {peaks}, {tree['bytes_per_file']} bytes for each more file."
    return f"{machine(result)}\n\n{markdown(heads, rows)}\n\n{memory}"


def pool_table(source: Path) -> str:
    """Planted copies found, real ones found, and how far from a copy the nearest different films are."""
    result = json.loads(source.read_text())
    planted = [
        [kind.replace("_", " ").replace("fresh", "other films, not copies"), row["planted"], row["found"]]
        for kind, row in result["planted"].items()
    ]
    alike = [
        [row["dataset"], row["films"], row["near_pairs"], row["copies"], row["fewest_detail_bits_of_others"]]
        for row in result["looks_alike"]
    ]
    pairs = [[*what.split(": ", 1), count] for what, count in result["found"]["pairs"].items()]
    most = result["settings"]["detail_bits"]
    trained = result["pre_training"]
    found = result["found"]
    return "\n\n".join(
        [
            machine(result),
            markdown(["planted", "films", "found"], planted),
            markdown(["set", "films", "pairs alike in 64 bits", "of them copies", f"nearest others ({most})"], alike),
            markdown(["found in the pool", "which", "films"], pairs),
            f"Of all pairs, {found['not_confirmed']} were not confirmed by correlating their pixels (weakest "
            f"{found['weakest_correlation']}). Pre-training on the pool left out {trained['left_out_images']} of "
            f"{trained['offered_images']} images.",
        ]
    )


def fuzz_table(source: Path) -> str:
    """How mutated inputs ended, by kind."""
    result = json.loads(source.read_text())
    rows = []
    for kind, outcomes in result["outcomes"].items():
        total, same = sum(outcomes.values()), outcomes.get("identical", 0)
        other = sum(count for name, count in outcomes.items() if name.startswith("another"))
        refused = ", ".join(f"{name} {count}" for name, count in outcomes.items() if not name.startswith(("id", "an")))
        told = outcomes.get("identical samples, verify tells", 0)
        rows.append([kind, total, same + told, other, refused or "–"])
    heads = ["kind", "inputs", "read as they were", "read as something else", "refused with"]
    limits = f"seed {result['seed']}, limit {result['limit_bytes'] >> 30} GiB, {result['wall_s']:.0f} s"
    peak = max(result["peak_rss_bytes"], result["peak_rss_of_decoding_bytes"]) / 1e6
    return f"{machine(result)}; {limits}, at most {peak:.0f} MB used\n\n{markdown(heads, rows)}"


def fault_rows(result: dict[str, Any]) -> list[list[object]]:
    """What the campaign about checkpoints did, how often, and how it ended."""
    damage, calls = result["damage"], result["system_calls"]
    kinds = ("flipped", "truncated", "deleted", "emptied", "grown")
    done = ", ".join(f"{damage[kind]} {kind}" for kind in kinds)
    disks = ", ".join(f"{row['times']:g}: {'goes on' if row['exit'] == 0 else 'exit 6'}" for row in result["full_disk"])
    return [
        *(
            [["killed at a chosen call of saving", result["failpoints"]["kills"], "all continued with the same bits"]]
            if "failpoints" in result
            else []
        ),
        ["killed at a system call of a save", calls["killed"], "all continued with the same bits"],
        ["a system call of a save refused", calls["refused"], "no step lost, same bits"],
        [
            "killed with two processes, continued with one",
            result["two_processes"]["kills"],
            "the same bits, class exact",
        ],
        ["killed at a random moment", result["random_kills"]["kills"], "all continued with the same bits"],
        [
            "newest checkpoint damaged",
            sum(damage[kind] for kind in kinds),
            f"{done}; {damage['loaded_silently']} loaded",
        ],
        ["disk of so many checkpoints", len(result["full_disk"]), f"{disks}; same bits after room was made"],
        [
            "killed while results were written",
            result["results"]["kills"],
            f"{result['results']['half_files_seen']} half files",
        ],
    ]


def faults_table(source: Path) -> str:
    """The campaign about checkpoints, and where it ran."""
    result = json.loads(source.read_text())
    return f"{machine(result)}\n\n{markdown(['what', 'times', 'outcome'], fault_rows(result))}"


def survived_table(source: Path) -> str:
    """What runs and sweeps were put through, and how they ended: two soaks and the campaign of faults in saving."""
    soak = json.loads(source.read_text())
    sweep = json.loads(source.with_name("soak_sweep.json").read_text())
    signals = json.loads(source.with_name("faults_signals.json").read_text())
    lost = ", ".join(
        f"{what.replace('_', ' ')}: {signals[f'{what}_s']:.0f} s" for what in ("rank_killed", "rank_stopped")
    )
    worlds = ", ".join(f"{count} with {number}" for number, count in soak["starts_by_processes"].items())
    bits = {True: "the same bits of weights, average and optimizer", False: "other bits"}[soak["equal"]]
    table = {True: "the same table, byte for byte", False: "another table"}[sweep["equal"]]
    rows: list[list[object]] = [
        ["a pre-training killed at random, processes redrawn", f"{soak['kills']} ({worlds} processes)", bits],
        ["a sweep killed at random", f"{sweep['kills']} over {sweep['cells']} cells", table],
        [
            "asked to stop by a signal, in every phase",
            len(signals["stops"]),
            f"saved and gone after {signals['stop_s_max']:.0f} s at most",
        ],
        *_asked_anywhere(source.with_name("signals_anywhere.json")),
        ["a rank lost, until training goes on", 2, lost],
        *fault_rows(json.loads(source.with_name("faults_checkpoint.json").read_text())),
    ]
    return markdown(["what happened", "times", "how it ended"], rows)


def _asked_anywhere(source: Path) -> list[list[object]]:
    """The row of the soak that asks every command to stop, whenever."""
    if not source.exists():
        return []
    found = json.loads(source.read_text())
    what = f"any of {found['commands']} commands and waits asked to stop at a random moment from its start"
    right = sum(row["is_right"] for row in found["rows"])
    ended = f"{right} of {found['signals']} gone, with all they had started, after {found['seconds_max']:.0f} s at most"
    return [[what, found["signals"], ended]]


def commands_table(source: Path) -> str:
    """The README's two commands in fresh clones: how long, how they ended, what they said last."""
    result = json.loads(source.read_text())
    keys = ("python", "wall_s", "load_15_min_at_end", "exit_code", "said")
    shown = [row | {"wall_s": f"{row['wall_s'] / 60:.1f} min"} for row in result["rows"]]
    rows = [[f"`{row['command']}`", *(row[key] for key in keys)] for row in shown]
    heads = ["command", "Python", "time, with installing", "load, mean of 15 min", "exit code", "it said at the end"]
    return f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores\n\n{markdown(heads, rows)}"


def how_long(source: Path) -> str:
    """A sentence: minutes of the README's two commands, installing included, over the Pythons that were tried."""
    result = json.loads(source.read_text())
    minutes: dict[str, list[float]] = {}
    for row in result["rows"]:
        minutes.setdefault(row["command"], []).append(row["wall_s"] / 60)
    told = " and ".join(f"`{name}` took {min(each):.0f} to {max(each):.0f} minutes" for name, each in minutes.items())
    return f"On {result['hardware']['cores']} cores of an {result['hardware']['cpu']} {told}, with installing.\n"


def house_table(source: Path) -> str:
    """Size and shape of the package before it was rebuilt, after, and now (`python -m tests.house --json`)."""
    names = ("house_before.json", "house_after.json", source.name)
    before, after, now = (json.loads(source.with_name(name).read_text()) for name in names)
    rows = [
        [what, *(f"{each['measured'][what]:,}" for each in (before, after, now)), now["wanted"].get(what, "")]
        for what in now["measured"]
    ]
    return markdown(["what", "0.1.0", "rebuilt", "now", "wanted"], rows)


def methods_table(source: Path) -> str:
    """Mean radial error in mm of every method; mean and deviation over the seeds, the best of a column in bold.

    Args:
        source: report.csv of a sweep, with its sweep.json beside it.
    """
    rows = [row for row in csv.DictReader(source.read_text().splitlines()) if row["mre"]]
    texts = json.loads((source.parent / "sweep.json").read_text())["rows"]
    labels = sorted({int(row["labels_training"]) for row in rows})
    ours = {(row["start"], int(row["labels_training"])): row for row in rows if row["protocol"] == "original"}
    # By the largest number of labels that all have.
    common = [count for count in labels if all((start, count) in ours for start, _ in ours)][-1]
    methods = sorted({start for start, _ in ours}, key=lambda start: -float(ours[start, common]["mre"]))
    best = {count: min(float(row["mre"]) for (_, found), row in ours.items() if found == count) for count in labels}

    def cell(start: str, count: int) -> str:
        if (start, count) not in ours:
            return ""
        mean, spread = float(ours[start, count]["mre"]), float(ours[start, count]["mre_std"])
        text = f"{mean:.2f} ± {spread:.2f}"
        return f"**{text}**" if mean == best[count] else text

    heads = ["start and method", *(f"{count} label{'s' if count > 1 else ''}" for count in labels)]
    return markdown(
        heads,
        [[texts.get(start, {}).get("title", start), *(cell(start, count) for count in labels)] for start in methods],
    )


PEERS = {
    "ours": "ours",
    "ours, checkpointing": "ours, checkpointing",
    "released": "as released, without checkpointing",
    "released, checkpointing": "as released",
    "diffusers": "diffusers UNet2DModel",
    "lucidrains": "denoising-diffusion-pytorch",
    "monai": "MONAI DiffusionModelUNet",
}
PEER_STEPS = {"plain": "", "ours": ", our step", "released": ", its own step"}


def peers_table(source: Path) -> str:
    """What every network took, ours against the others, by group, and the picture of the file."""
    result = json.loads(source.read_text())
    settings = result["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in settings["packages"].items() if name != "python")
    size = f"{settings['size']} px, {settings['precision']}, {settings['threads']} thread"
    parts = [f"{machine(result)}; {packages}; {size}"]
    for group in settings["groups"]:
        rows = [_peer(row) for row in result["rows"] if row["conditions"].get("group") == group]
        ratios = [_peer_ratio(ratio) for ratio in result["ratios"] if ratio["group"] == group and "ratio" in ratio]
        parts += [columns(PEER_HEADS, rows), markdown(("ours over", "of", "ratio", "95 %"), ratios)]
    picture = source.with_suffix(".png")
    if picture.exists():
        parts.append(f"![time and memory of a step, by network](results/{picture.name})")
    return "\n\n".join(parts)


PEER_HEADS = {
    "network": "{title}",
    "layout": "{layout}",
    "channels": "{channels}",
    "parameters, M": "{millions:.2f}",
    "GFLOP/image": "{forward_gflop_per_image_as_run:.2f}",
    "step, ms": "{wall_ms:.0f}",
    "processor, ms": "{cpu_ms:.0f}",
    "images/s": "{images_per_s:.1f}",
    "memory, MiB": "{peak_mib:.0f}",
    "µs/MFLOP of the function": "{busy_us_per_forward_mflop_of_the_function:.1f}",
    "µs/MFLOP run": "{busy_us_per_forward_mflop_as_run:.1f}",
}


def _peer(row: dict[str, Any]) -> dict[str, Any]:
    where, middle = row["conditions"], row["median"]
    title = f"{PEERS[where['network']]}{PEER_STEPS[where['way']]}{', saving' if where['saves'] else ''}"
    more = {"title": title, "channels": "-".join(map(str, where["channels"]))}
    more |= {"millions": row["figures"]["params"] / 1e6, "wall_ms": 1e3 * middle["wall_s"]}
    return where | row["figures"] | more | {"cpu_ms": 1e3 * middle["cpu_s"]}


def _peer_ratio(ratio: dict[str, Any]) -> list[object]:
    bounds = "" if ratio["ratio_low"] is None else f"{ratio['ratio_low']:.2f} to {ratio['ratio_high']:.2f}"
    said = ratio["reason"].split(" (")[0] if ratio["ratio"] is None else f"{ratio['ratio']:.2f}"
    return [ratio["second"], ratio["of"], said, bounds]
