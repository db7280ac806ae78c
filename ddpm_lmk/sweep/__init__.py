"""A table of runs: read it (`file`), expand it (`expand`), check it (`check`), time it (`forecast`), run it (`run`).

`worker` is what a child process does, `progress` what is shown and written of how the sweep stands.
"""

from __future__ import annotations

from ddpm_lmk.sweep.expand import Cell, StageRun, Sweep, cell_folder, load_sweep
from ddpm_lmk.sweep.file import SweepFile
from ddpm_lmk.sweep.progress import plan_table

__all__ = ["Cell", "StageRun", "Sweep", "SweepFile", "cell_folder", "load_sweep", "plan_table"]
