"""Mixtures: a task that learns several labelled sets at once has maps for the landmarks of all, set after set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    mixture: DatasetSpec
    index: int

    @classmethod
    def of(cls, mixture: DatasetSpec, spec: DatasetSpec) -> MixturePart:
        """The part whose landmarks `spec` lists.

        Raises:
            DataError: no dataset of the mixture has these landmarks.
        """
        for index, known in enumerate(mixture.domains):
            # By landmarks and not by name: the same kind of set from another hospital has another name and spacing.
            if known.landmark_names == spec.landmark_names:
                return cls(mixture, index)
        learnt = "; ".join(f"the {part.num_landmarks} of {part.name}" for part in mixture.domains)
        raise DataError(
            f"found the {spec.num_landmarks} landmarks of {spec.name}, but what was learnt is {learnt}; "
            "use a set with the same landmarks"
        )

    @property
    def spec(self) -> DatasetSpec:
        """What this dataset is."""
        return self.mixture.domains[self.index]

    def domain(self, count: int) -> Tensor:
        """The domain of `count` images of this part, `[B]` in host memory as in a batch."""
        return torch.full((count,), self.index)

    def own(self, maps: Tensor) -> Tensor:
        """Of maps `[B, all landmarks, h, w]` those of this part."""
        return maps[:, self.mixture.columns(self.index)]
