"""What a task is to the engine: a loss per image, sums to report, and a few hooks with empty defaults.

The engine never asks which task it runs. Randomness inside a task is a function of the run's seed and the batch's
positions, so that any number of processes and any micro-batch see the same draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ddpm_lmk.config import Network
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.models import ModelCost, model_cost


class OneRank:
    """The ranks that a loss over all of them sees, where there is one process; `engine.collectives` has several.

    Attributes:
        rank: place of this process among all.
    """

    rank = 0

    def all_gather(self, mine: Tensor) -> Tensor:
        """`[B, D]` of every rank, in rank order, as `[W B, D]`; gradients come back from all ranks."""
        return mine


class Task(ABC):
    """What is learnt from a batch, and how it is scored."""

    out_channels: int
    full_size: bool = True
    domains: tuple[int, ...] = ()  # outputs of each dataset, where a network has layers of their own for them

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per image `[B]`; the engine weighs, sums and divides."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums and counts of one batch as scalars, padding left out; the engine adds them over batches and ranks."""

    @abstractmethod
    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures from added-up sums; `score` is what selection looks at, lower is better."""

    def cost(self, network: Network, image_size: int) -> ModelCost:
        """What one training image costs; by default a pass of the network and back."""
        return model_cost(network, image_size, self.out_channels, full_size=self.full_size, domains=self.domains)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that is trained, around the network; by default the network itself."""
        return model

    def prepare(self, ranks: OneRank, *, total_steps: int) -> None:
        """Called once, before training, with all ranks and the number of steps of the run."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after every optimizer step."""

    def export(self) -> dict[str, Any]:
        """Facts another program needs to use the weights; written to a snapshot's meta.json."""
        return {}
