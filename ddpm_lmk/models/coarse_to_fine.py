"""Two networks of one kind in one module: one for whole images, one for crops of them (docs/method.md, section 9).

One call computes both, so that whatever is around a module that is trained (DeepSpeed, compilation, the average of
the weights, checkpoints) treats the two as one network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

PARTS = ("coarse", "fine")


class CoarseToFine(nn.Module):
    """`coarse` sees images, `fine` sees crops; both begin with the weights of the network that is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.coarse, self.fine = network, copy.deepcopy(network)

    def forward(
        self,
        images: Tensor | None,
        condition: Tensor | None = None,
        crops: Tensor | None = None,
        crops_condition: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Maps of images and of crops, each with what the network is conditioned on; None where there are none."""
        coarse = None if images is None else self.coarse(images, condition)
        return coarse, None if crops is None else self.fine(crops, crops_condition)


def parts_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each part, by its name; empty where they are those of one network."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, inner = name.partition(".")
        found.setdefault(part, {})[inner] = value
    return found if set(found) == set(PARTS) else {}
