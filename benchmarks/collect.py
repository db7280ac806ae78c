"""Turn the result files of this folder into tables, and put them where the documents want them.

    python benchmarks/collect.py         # writes README.md, benchmarks/README.md and docs, between markers

No number in those documents is typed: each comes from a file under benchmarks/results, which names the machine, the
versions and the day it was measured. A marker whose result file is missing keeps what it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from _ablation_tables import ablations_table
from _bench_tables import (
    device_rates_table,
    loader_training_table,
    loading_table,
    memory_table,
    newest,
    scaling_table,
    step_parts_table,
    sweep_table,
    switches_table,
    training_table,
    ways_table,
)
from _method_tables import methods_table
from _peer_tables import peers_table
from _tables import (
    POOL_SCALE,
    QUARANTINE,
    RESIZE,
    TRAINING,
    WAYS,
    commands_table,
    copied,
    exactness_table,
    faults_table,
    fuzz_table,
    loader_table,
    manifest_table,
    pack_table,
    packing_table,
    picked,
    pool_table,
    save_table,
    survived_table,
)
from _trial_tables import trials_table

from ddpm_lmk.report.tables import update_between_markers

Table = Callable[[Path], str]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main() -> None:
    """Update every marker whose result file is there, and say which."""
    for document, marker, source, table in PLACES:
        if not source.exists():
            sys.stdout.write(f"{marker}: {source.relative_to(HERE)} is not there, left as it is\n")
            continue
        changed = update_between_markers(document, f"numbers:{marker}", table(source))
        sys.stdout.write(f"{marker}: {'updated' if changed else 'unchanged'}\n")


README = HERE.parent / "README.md"
BENCHMARKS = HERE / "README.md"
RECIPE = HERE.parent / "docs" / "recipe.md"


def newer(old: str, table: Table, old_table: Table) -> tuple[Path, Table]:
    """The newest result of the loader, or the one of the form before, each with its table."""
    found = newest(RESULTS, "loader", "phantom")
    return (found, table) if found.exists() else (RESULTS / f"{old}.json", old_table)


PLACES: tuple[tuple[Path, str, Path, Table], ...] = (
    (README, "isbi", RESULTS / "table2_small" / "report.csv", methods_table),
    (README, "demo", RESULTS / "demo" / "report.md", copied),
    (README, "commands", RESULTS / "two_commands.json", commands_table),
    (README, "survived", RESULTS / "soak.json", survived_table),
    (BENCHMARKS, "pack", RESULTS / "pack_real.json", pack_table),
    (BENCHMARKS, "pack-phantoms", RESULTS / "pack_phantoms.json", pack_table),
    (BENCHMARKS, "packing", RESULTS / "packing_real.json", packing_table),
    (BENCHMARKS, "fuzz", RESULTS / "fuzz.json", fuzz_table),
    (BENCHMARKS, "device", newest(RESULTS, "device"), device_rates_table),
    (BENCHMARKS, "step", newest(RESULTS, "step", "tiny"), step_parts_table),
    (BENCHMARKS, "switches", newest(RESULTS, "switches"), switches_table),
    (BENCHMARKS, "train", newest(RESULTS, "train"), training_table),
    (BENCHMARKS, "scaling", newest(RESULTS, "scaling"), scaling_table),
    (BENCHMARKS, "sweep", newest(RESULTS, "sweep"), sweep_table),
    (BENCHMARKS, "memory", newest(RESULTS, "memory"), memory_table),
    (BENCHMARKS, "loader", *newer("loader-isbi2015_ceph", loading_table, loader_table)),
    (BENCHMARKS, "loader-ways", *newer("loader", ways_table, picked("ways", WAYS))),
    (BENCHMARKS, "loader-training", *newer("loader", loader_training_table, picked("training", TRAINING))),
    (BENCHMARKS, "pool-scale", RESULTS / "pool_scale.json", picked("rows", POOL_SCALE)),
    (BENCHMARKS, "dali-resize", RESULTS / "dali_resize.json", picked("rows", RESIZE)),
    (BENCHMARKS, "quarantine", RESULTS / "quarantine.json", picked("rows", QUARANTINE)),
    (BENCHMARKS, "manifest", RESULTS / "manifest_10m.json", manifest_table),
    (BENCHMARKS, "pool", RESULTS / "pool_duplicates.json", pool_table),
    (BENCHMARKS, "save", RESULTS / "checkpoint_save-pretrain-isbi-cpu.json", save_table),
    (BENCHMARKS, "exactness", RESULTS / "exactness_cpu.json", exactness_table),
    (BENCHMARKS, "faults-checkpoint", RESULTS / "faults_checkpoint.json", faults_table),
    (RECIPE, "trials", RESULTS / "isbi_recipe" / "trials.jsonl", trials_table),
    (RECIPE, "ablations", RESULTS / "isbi_ablations" / "results.csv", ablations_table),
    (BENCHMARKS, "peers", newest(RESULTS, "peers", "width32_64px_fp32-cpu"), peers_table),
)

if __name__ == "__main__":
    main()
