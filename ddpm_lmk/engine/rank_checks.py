"""Do all ranks mean the same run, and have the same weights? Bit by bit, whatever the exactness class.

At the start they compare what they were given (failures.md, A16), on the way their weights (C11).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DivergedError, LaunchError


@torch.no_grad()
def checksum(model: nn.Module) -> Tensor:
    """64 bits over the bits of all parameters, int64 on their device; a single flipped bit changes them.

    Element i of the list of parameters is added with the odd factor 2 i + 1, so that exchanged parameters differ too.
    """
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in model.parameters()]
    factors = torch.arange(len(sums), device=sums[0].device) * 2 + 1
    return (torch.stack(sums) * factors).sum()


def want_same_facts(mine: Mapping[str, str], parallel: Parallel) -> None:
    """Raise `LaunchError` on all ranks, naming the first odd one and what it has, unless all have the same facts."""
    seen = parallel.gather(dict(mine))
    for key in mine:
        values = [facts[key] for facts in seen]
        common = max(values, key=values.count)
        odd = next((rank for rank, value in enumerate(values) if value != common), None)
        if odd is not None:
            error = LaunchError(
                f"rank {odd} has another {key} than most: {values[odd]}, wanted {common}; "
                "give all nodes the same installation, run file, data and checkpoints, and start again"
            )
            error.is_shared = True
            raise error


def want_same_weights(model: nn.Module, parallel: Parallel, *, step: int) -> None:
    """Raise `DivergedError` on all ranks, naming the odd ones, unless all have the same weights, bit by bit."""
    if parallel.world == 1:
        return
    sums = parallel.gather(checksum(model).item())
    common = max(sums, key=sums.count)
    odd = [rank for rank, value in enumerate(sums) if value != common]
    if not odd:
        return
    names = ", ".join(map(str, odd))
    who = f"rank {names} differ from the others" if sums.count(common) > 1 else "all ranks differ from each other"
    error = DivergedError(
        f"the weights of {who} after step {step}, though all made the same updates; "
        "nothing of it is saved; suspect the memory or the GPU of that rank, the same command continues from the last "
        "checkpoint"
    )
    error.is_shared = True
    raise error
