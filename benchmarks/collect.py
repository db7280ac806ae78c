"""Turn the result files of this folder into tables, and put them where the documents want them.

    python benchmarks/collect.py         # writes README.md, benchmarks/README.md and docs, between markers

No number in those documents is typed: each comes from a file under benchmarks/results, which names the machine, the
versions and the day it was measured. A marker whose result file is missing keeps what it has.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import _gpu_tables as gpu
import _tables as tables
from _tables import Table, newest
from _trial_tables import trials_table

from ddpm_lmk.report.tables import update_between_markers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
BENCHMARKS = HERE / "README.md"
START, RESULTS_PAGE, FAULTS, METHOD, RECIPE, HOUSE, WEBDATASETS, GPU = (
    HERE.parent / "docs" / f"{name}.md"
    for name in ("start", "results", "faults", "method", "recipe", "house", "webdatasets", "gpu")
)

PLACES: tuple[tuple[Path, str, Path, Table], ...] = (
    (README, "isbi", RESULTS / "table2_two_looks" / "cells.json", partial(tables.two_looks_table, without="adamw")),
    (README, "how-long", RESULTS / "two_commands.json", tables.how_long),
    (RESULTS_PAGE, "isbi", RESULTS / "table2_two_looks" / "cells.json", tables.two_looks_table),
    (RESULTS_PAGE, "isbi-one-look", RESULTS / "table2_small" / "report.csv", tables.methods_table),
    (START, "demo", RESULTS / "demo" / "report.md", Path.read_text),
    (START, "commands", RESULTS / "two_commands.json", tables.commands_table),
    (FAULTS, "survived", RESULTS / "soak.json", tables.survived_table),
    (BENCHMARKS, "pack", RESULTS / "pack_real.json", tables.pack_table),
    (BENCHMARKS, "pack-phantoms", RESULTS / "pack_phantoms.json", tables.pack_table),
    (BENCHMARKS, "packing", RESULTS / "packing_real.json", tables.packing_table),
    (BENCHMARKS, "fuzz", RESULTS / "fuzz.json", tables.fuzz_table),
    (BENCHMARKS, "device", newest(RESULTS, "device"), tables.device_table),
    (BENCHMARKS, "step", newest(RESULTS, "step", "tiny"), tables.step_table),
    (BENCHMARKS, "roofline", newest(RESULTS, "step", "width32"), tables.roofline_table),
    (BENCHMARKS, "switches", newest(RESULTS, "switches"), tables.switches_table),
    (BENCHMARKS, "train", newest(RESULTS, "train"), tables.train_table),
    (BENCHMARKS, "scaling", newest(RESULTS, "scaling"), tables.scaling_table),
    (BENCHMARKS, "sweep", RESULTS / "sweep-isbi_cpu-cpu-20261201-050149.json", tables.sweep_table),
    (BENCHMARKS, "memory", newest(RESULTS, "memory"), tables.memory_table),
    (BENCHMARKS, "loader", newest(RESULTS, "loader"), tables.loading_table),
    (BENCHMARKS, "loader-ways", newest(RESULTS, "loader"), tables.ways_table),
    (BENCHMARKS, "loader-training", newest(RESULTS, "loader"), tables.loader_training_table),
    (BENCHMARKS, "pool-scale", RESULTS / "pool_scale.json", tables.pool_scale_table),
    (BENCHMARKS, "dali-resize", RESULTS / "dali_resize.json", tables.dali_resize_table),
    (BENCHMARKS, "quarantine", RESULTS / "quarantine.json", tables.quarantine_table),
    (BENCHMARKS, "manifest", RESULTS / "manifest_10m.json", tables.manifest_table),
    (BENCHMARKS, "pool", RESULTS / "pool_duplicates.json", tables.pool_table),
    (BENCHMARKS, "save", RESULTS / "checkpoint_save-pretrain-isbi-cpu.json", tables.save_table),
    (BENCHMARKS, "exactness", RESULTS / "exactness_cpu.json", tables.exactness_table),
    (BENCHMARKS, "faults-checkpoint", RESULTS / "faults_checkpoint.json", tables.faults_table),
    (BENCHMARKS, "peers", newest(RESULTS, "peers", "width32_64px_fp32-cpu"), tables.peers_table),
    (METHOD, "radius", RESULTS / "radius_coverage.json", tables.radius_table),
    (METHOD, "radius-films", RESULTS / "table2_two_looks" / "radius.json", tables.radius_films_table),
    (GPU, "gpu-wanted", RESULTS, gpu.wanted_table),
    (GPU, "gpu-peaks", RESULTS, gpu.peaks_table),
    (GPU, "gpu-rates", RESULTS, gpu.rates_table),
    (GPU, "gpu-calls", RESULTS, gpu.calls_table),
    (WEBDATASETS, "in-place", newest(RESULTS, "in_place"), tables.in_place_table),
    (HOUSE, "house", RESULTS / "house_now.json", tables.house_table),
    (RECIPE, "parts", RESULTS / "table2_two_looks" / "cells.json", tables.parts_table),
    (RECIPE, "pools", RESULTS / "table2_two_looks" / "pools.json", tables.pools_table),
    (RECIPE, "time-to-accuracy", RESULTS / "table2_two_looks" / "time_to_accuracy.json", tables.time_to_accuracy_table),
    (RECIPE, "one-shot", RESULTS / "table2_two_looks" / "one_shot.json", tables.one_shot_table),
    (RECIPE, "optimizers", RESULTS / "optimizers.json", tables.optimizers_table),
    (RECIPE, "variants", RESULTS / "table2_two_looks" / "variants.json", tables.variants_table),
    (RECIPE, "tuning", RESULTS / "table2_two_looks" / "tuning.json", tables.variants_table),
    (RECIPE, "hand", RESULTS / "table2_two_looks" / "hand.json", tables.hand_table),
    (RECIPE, "second-look", RESULTS / "isbi_recipe" / "second_look.json", tables.second_look_table),
    (RECIPE, "trials", RESULTS / "isbi_recipe" / "trials.jsonl", trials_table),
)


def main() -> None:
    """Update every marker whose result file is there, and say which."""
    for document, marker, source, table in PLACES:
        if not source.exists():
            sys.stdout.write(f"{marker}: {source.relative_to(HERE)} is not there, left as it is\n")
            continue
        changed = update_between_markers(document, f"numbers:{marker}", table(source))
        sys.stdout.write(f"{marker}: {'updated' if changed else 'unchanged'}\n")


if __name__ == "__main__":
    main()
