"""How many processes a run uses, on which device, starting them and supervising them.

One process runs here, in this interpreter. Several are started by torchelastic, each `python -m ddpm_lmk.launcher.rank
JOB.json` with RANK and WORLD_SIZE in its environment; `accelerate launch --cpu` is not used, since it starts one
process, silently. What a run learns is in its run file; the two share no key. Torch is imported when it is needed.

    placement   where a run happens               supervise   ranks that hang, are slow or were lost
    preflight   checks before the first step      rank        the first lines of a rank
    start       starting and waiting              slurm       the batch script of a cluster
    agent       when ranks are started again      time_runs   timing steps before a run
"""

from __future__ import annotations

from ddpm_lmk.launcher.placement import Device, LaunchFile, Placement, place, visible_gpus
from ddpm_lmk.launcher.start import launch, run_ranks

__all__ = ["Device", "LaunchFile", "Placement", "launch", "place", "run_ranks", "visible_gpus"]
