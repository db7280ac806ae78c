"""Result files of this folder as Markdown tables, one function per kind of file; `collect` puts them in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(result: dict[str, Any]) -> str:
    """One line on where and when a result was measured."""
    hardware = result.get("hardware") or result.get("device") or {}
    name = hardware.get("cpu") or hardware.get("name") or hardware.get("device")
    load = hardware.get("load_1_min", hardware.get("load_1min_at_end"))
    busy = "" if load is None else f", load {load:.1f} when measured"
    versions = ", ".join(f"{key} {value}" for key, value in result.get("versions", {}).items() if value != "None")
    cores, day = hardware.get("cores", hardware.get("cpus", "?")), result.get("date", result.get("when", ""))[:10]
    return f"{name}, {cores} cores{busy}; {versions}; {day}"


def pack_table(source: Path) -> str:
    """Packing and reading per encoding."""
    result = json.loads(source.read_text())
    heads = ["dataset", "encoding", "bytes/image", "packed images/CPU-s", "read images/CPU-s", "RMS error, grey levels"]
    rows = [
        [
            row["dataset"],
            f"{row['encoding']} {row['bits']} bit" + (f" q{row['quality']}" if row["quality"] else ""),
            f"{row['bytes_per_image']:,}",
            f"{row['pack_images_per_cpu_s']:.0f}",
            f"{row['read_images_per_cpu_s']:,.0f}",
            row["rms_levels"],
        ]
        for row in result["rows"]
    ]
    return f"{machine(result)}\n\n{markdown(heads, rows)}"


def loader_table(source: Path) -> str:
    """Images per second of the loader per size, residency and augmentation."""
    result = json.loads(source.read_text())
    heads = ["size, px", "residency", "share of images moved", "images/s", "images/CPU-s"]
    rows = [
        [
            row["image_size_px"],
            row["residency"],
            row["augmented_share"],
            f"{row['images_per_s']:,.0f}",
            f"{row['images_per_cpu_s']:,.0f}",
        ]
        for row in result["rows"]
    ]
    return f"{machine(result)}\n\n{markdown(heads, rows)}"


def picked(part: str, columns: dict[str, str]) -> Callable[[Path], str]:
    """A table of fields of the rows of a result: `columns` are heads and keys."""

    def table(source: Path) -> str:
        result = json.loads(source.read_text())
        rows = [list(map(row.get, columns.values())) for row in result[part]]
        return f"{machine(result)}\n\n{markdown([*columns], rows)}"

    return table


def save_table(source: Path) -> str:
    """What a save costs training."""
    results = [json.loads(path.read_text()) for path in sorted(source.parent.glob("checkpoint_save-*.json"))]
    heads = ["run file", "checkpoint, MiB", "step, ms", "wait, ms", "wait, % of a step (clock)", "(processor)"]
    heads += ["without the thread, % of a step", "cost at the interval, % of a step"]
    rows = [
        [
            Path(result["run_file"]).name,
            result["checkpoint_mib"],
            f"{result['step_ms']:.0f}",
            f"{result['wait_ms']:.0f}",
            f"{result['wait_pct_of_step']:.1f}",
            f"{result['wait_cpu_pct_of_step']:.1f}",
            f"{result['without_thread_pct_of_step']:.0f}",
            f"{result['cost_at_interval_pct_of_step']:.3f}",
        ]
        for result in results
    ]
    return f"{machine(results[0])}\n\n{markdown(heads, rows)}"


def fault_rows(result: dict[str, Any]) -> list[list[object]]:
    """What the campaign about checkpoints did, how often, and how it ended."""
    damage, calls = result["damage"], result["system_calls"]
    kinds = ("flipped", "truncated", "deleted", "emptied", "grown")
    done = ", ".join(f"{damage[kind]} {kind}" for kind in kinds)
    disks = ", ".join(f"{row['times']:g}: {'goes on' if row['exit'] == 0 else 'exit 6'}" for row in result["full_disk"])
    return [
        *(
            [["killed at a fail-point of saving", result["failpoints"]["kills"], "all continued with the same bits"]]
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


def manifest_table(source: Path) -> str:
    """Opening ten million samples."""
    result = json.loads(source.read_text())
    heads = ["samples", "shards", "index, MB", "open, s", "open, CPU-s", "highest memory, MB", "draw, µs/sample"]
    cells = [f"{result['samples']:,}", f"{result['shards']:,}", f"{result['index_mb']:.0f}"]
    cells += [f"{result['open_s']:.2f}", f"{result['open_cpu_s']:.2f}", f"{result['after_draw_mb']:.0f}"]
    cells.append(f"{result['draw_us_per_sample']:.1f}")
    return f"{machine(result)}\n\n{markdown(heads, [cells])}"


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


def copied(source: Path) -> str:
    """A table that a report wrote."""
    return source.read_text()


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


def exactness_table(source: Path) -> str:
    """Milliseconds per step of the exactness classes, by number of processes."""
    result = json.loads(source.read_text())
    heads = [
        "processes",
        "class",
        "step, ms",
        "against whole share",
        "processor time of a rank, ms",
        "against whole share",
    ]
    rows = [
        [count, name, f["step_ms"], f"{f['step_more_pct']:+} %", f["cpu_ms"], f"{f['cpu_more_pct']:+} %"]
        for count, variants in result["processes"].items()
        for name, f in variants.items()
    ]
    return f"{machine(result)}\n\n{markdown(heads, rows)}"


POOL_SCALE = {"films": "films", "s": "wall_s", "processor s": "cpu_s", "highest memory, MB": "highest_mb"}
POOL_SCALE |= {"planted": "planted", "found": "found", "others": "others_found"}
RESIZE = {"bits": "bits", "to, px": "size_px", "triangular: max": "triangular_max_levels"}
RESIZE |= {"mean": "triangular_mean_levels", "linear: max": "linear_max_levels"}
RESIZE |= {"linear: mean": "linear_mean_levels", "host, us": "host_us"}
QUARANTINE = {"processes": "processes", "damaged": "damaged_samples", "listed": "listed_samples"}
QUARANTINE |= {"healthy, listed": "healthy_and_listed", "trained on": "damaged_and_trained_on"}
QUARANTINE |= {"same if killed": "killed_run_agrees", "same as one process": "agrees_with_one_process"}
RATE = {"from": "from", "images/s": "images_per_s"}
WAYS = {"way": "way", **RATE, "images/CPU-s": "images_per_cpu_s", "cores for 4,000 images/s": "cores_for_4000_per_s"}
TRAINING = {"loader": "loader", **RATE, "waiting for data, %": "data_wait_pct"}
