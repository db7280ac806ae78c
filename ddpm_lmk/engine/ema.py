"""Exponential moving average of the weights (paper.md, section 2: decay 0.995, from the first step, no warm-up)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm_lmk.config import EmaConfig
from ddpm_lmk.engine.collectives import is_running
from ddpm_lmk.errors import CheckpointError

LARGEST_SHARE_OF_START = 0.1


class Ema:
    """The average of one model's parameters and running statistics; what is frozen, and other buffers, as they are.

    Without settings it holds and does nothing. Parameters that do not learn are their own average to the bit, so none
    is kept: freeze before the average is made. Statistics are averaged with the weights that made them: those of the
    present weights would not fit the maps of averaged ones.
    """

    def __init__(self, cfg: EmaConfig | None, model: nn.Module) -> None:
        self.cfg = cfg
        self._model = model
        self._average = {name: value.detach().clone() for name, value in self._followed()} if cfg is not None else {}

    def __bool__(self) -> bool:
        return self.cfg is not None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after the update that ended `step` (1 is the first)."""
        if self.cfg is None:
            return
        decay = min(self.cfg.decay, (1 + step) / (10 + step)) if self.cfg.warmup else self.cfg.decay
        torch._foreach_lerp_(list(self._average.values()), [value for _, value in self._followed()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averaged weights inside, or as it is where there is no average.

        The storages change places and back: nothing is copied, and a compiled model stays compiled.
        """
        self._swap()
        try:
            yield self._model
        finally:
            self._swap()

    def weights(self) -> dict[str, Tensor]:
        """State of the model with the average in place of its parameters; empty where there is no average."""
        if self.cfg is None:
            return {}
        return {name: self._average.get(name, value) for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put saved weights back, in the memory layout of the parameters."""
        for name, place in self._average.items():
            if name not in weights or weights[name].shape != place.shape:
                raise CheckpointError(
                    f"the moving average of {name} is missing or of another shape; wanted {list(place.shape)}"
                )
            place.copy_(weights[name])

    def warning(self, total: int) -> str | None:
        """What is wrong with this decay in a run of `total` steps, if anything."""
        if self.cfg is None or self.cfg.warmup or self.cfg.decay**total <= LARGEST_SHARE_OF_START:
            return None
        share = self.cfg.decay**total
        return (
            f"train.ema.decay={self.cfg.decay} over {total} steps leaves {share:.0%} of the starting weights in the "
            "average; lower it, or set train.ema.warmup=true"
        )

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._followed():
            if name in self._average:
                value.data, self._average[name] = self._average[name], value.data

    def _followed(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)
        yield from ((name, buffer) for name, buffer in self._model.named_buffers() if is_running(name))
