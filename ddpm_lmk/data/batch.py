"""What a loader hands to a task: one micro-batch of images, points and the way back to native pixels.

Nothing here knows where the pixels came from or what is learnt from them. Coordinates are (x, y), pixel centres lie at
integers, the centre of the top-left pixel is (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpm_lmk.system.accelerator import to_device

if TYPE_CHECKING:
    from ddpm_lmk.data.loading.bad_samples import BadSample


@dataclass(frozen=True)
class Batch:
    """Images that a device computes at once, `B` of them, each `S` pixels wide and high, with `N` landmarks.

    Attributes:
        images: `[B, 1, S, S]` float32 in [0, 1], channels-last memory.
        points: `[B, N, 2]` float32 network pixels, NaN where a sample has no label; None when the data has none.
        to_native: `[B, 2, 3]` float32, network pixels to native pixels (undoes augmentation and resizing).
        native_size: `[B, 2]` float32, (width, height) of the original file.
        mm_per_px: `[B]` float32, spacing of native pixels after the spec's rule, NaN where unknown.
        positions: `[B]` int64, place in the training stream, or in the evaluated split; always in host memory, since
            they are keys of randomness and reading them back from a device would make it wait.
        weight: `[B]` float32, 1 for a sample that counts, 0 for one repeated to fill the shape.
        ids: sample names, `B` of them.
        domain: `[B]` int64 in host memory, which part of a mixture's spec a sample belongs to; None: there is one.
        fine: `[B, 1, F, F]` grey values of the same squares with more pixels and not augmented, uint8, or uint16 bits
            as int16; None where `data.fine_size` is.
        to_fine: `[B, 2, 3]` float32, network pixels to pixels of `fine`.
    """

    images: Tensor
    points: Tensor | None
    to_native: Tensor
    native_size: Tensor
    mm_per_px: Tensor
    positions: Tensor
    weight: Tensor
    ids: tuple[str, ...]
    domain: Tensor | None = None
    fine: Tensor | None = None
    to_fine: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, all but `positions` and `domain`; memory layout is kept."""
        moved: dict[str, Any] = {
            field.name: to_device(value, device)
            for field in fields(self)
            # Both are read on the host at every step; on a device each reading would wait for its queue.
            if isinstance(value := getattr(self, field.name), Tensor) and field.name not in ("positions", "domain")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of an optimizer step.

    Attributes:
        size: images of the step over all ranks; what the summed loss is divided by.
        micro_batches: this rank's micro-batches, the same number and shape on every rank.
        wait_s: seconds the caller waited for the data.
        bad: samples this rank met that could not be read and were replaced.
    """

    size: int
    micro_batches: list[Batch]
    wait_s: float
    bad: tuple[BadSample, ...] = ()
