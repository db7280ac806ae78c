"""A table of runs: how it is written (`file`), which runs these are (`plan`, shown by `table`), whether they
can run (`check`), running them.

`run` starts pre-training (`stages`) and then cells (`worker`), `view` shows them on a terminal, `summary` writes how
they stand.
"""

from __future__ import annotations

from ddpm_lmk.sweep.expand import Cell, StageRun, Sweep, cell_folder, is_done, load_sweep, state_of
from ddpm_lmk.sweep.file import SweepFile
from ddpm_lmk.sweep.progress import listed_shots, plan_table

__all__ = [
    "Cell",
    "StageRun",
    "Sweep",
    "SweepFile",
    "cell_folder",
    "is_done",
    "listed_shots",
    "load_sweep",
    "plan_table",
    "state_of",
]
