"""How many processes a run uses, on which device, starting them and looking after them.

One process runs here, in this interpreter. Several are started by torchelastic, each `python -m ddpm_lmk.launcher.rank
JOB.json` with RANK and WORLD_SIZE in its environment; `accelerate launch --cpu` is not used, since it starts one
process, silently. What a run learns is in its run file; the two share no key. Torch is imported when it is needed.

    placement   where a run happens              agent   when ranks are started again, and with which code a run ends
    start       starting and waiting             watch   ranks that hang, are slow or were lost
    rank        the first lines of a rank        alone   one process, without an agent
    slurm       the batch script of a cluster
"""

from __future__ import annotations

from ddpm_lmk.launcher.placement import Device, LaunchFile, Placement, place, visible_gpus
from ddpm_lmk.launcher.start import launch, run_ranks

__all__ = ["Device", "LaunchFile", "Placement", "launch", "place", "run_ranks", "visible_gpus"]
