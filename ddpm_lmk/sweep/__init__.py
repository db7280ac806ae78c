"""A table of runs: which ones (`plan`), running them (`run`, `worker`), and what a terminal shows (`view`)."""

from __future__ import annotations

from ddpm_lmk.sweep.plan import Cell, Sweep, SweepFile, cell_folder, is_done, load_sweep, plan_table, state_of

__all__ = ["Cell", "Sweep", "SweepFile", "cell_folder", "is_done", "load_sweep", "plan_table", "state_of"]
