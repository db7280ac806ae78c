"""MRE and SDR as torchmetrics classes: sums and counts that add up over batches and processes.

For use inside a training or evaluation loop, on the device. The numbers of results and reports come from
`inference.scoring`, which has the two protocols and the errors for users; both agree on the same points
(tests/tasks/test_validation_metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def radial_errors(predicted: Tensor, true: Tensor, mm_per_px: Tensor | None = None) -> Tensor:
    """Euclidean distances `[B, N]` between points `[B, N, 2]`, in pixels or, with `mm_per_px` `[B]`, in millimetres."""
    distance = (predicted - true).norm(dim=-1)
    return distance if mm_per_px is None else distance * mm_per_px[:, None]


class _PerLandmark(Metric):
    """Sums per landmark; a landmark without a label (NaN) or with weight 0 (padding) counts nowhere."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_landmarks: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(num_landmarks, dtype=torch.float64), dist_reduce_fx="sum")

    def _errors(
        self, predicted: Tensor, true: Tensor, mm_per_px: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Errors `[B, N]` (0 where nothing counts) and what they count `[B, N]`, both float64."""
        labelled = ~true.isnan().any(-1)
        counts = labelled.double() if weight is None else labelled.double() * weight.double()[:, None]
        errors = radial_errors(predicted, true.nan_to_num(), mm_per_px).double()
        return torch.where(counts > 0, errors, 0.0), counts


class MeanRadialError(_PerLandmark):
    """Mean radial error, overall (`compute`) and per landmark; pixels, or millimetres where `mm_per_px` is given.

    A prediction that is not finite makes the mean not finite: nothing is dropped.
    """

    higher_is_better = False

    def __init__(self, num_landmarks: int) -> None:
        super().__init__(num_landmarks)
        self.add_state("total", torch.zeros(num_landmarks, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, predicted: Tensor, true: Tensor, mm_per_px: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Add points `[B, N, 2]`, spacings `[B]` and weights `[B]` (0 for padding)."""
        errors, counts = self._errors(predicted, true, mm_per_px, weight)
        self.total += (errors * counts).sum(0)
        self.count += counts.sum(0)

    def compute(self) -> Tensor:
        """Mean over all images and landmarks, a scalar."""
        return self.total.sum() / self.count.sum()

    def per_landmark(self) -> Tensor:
        """Mean per landmark `[N]` of what this process has seen."""
        return self.total / self.count


class SuccessDetectionRate(_PerLandmark):
    """Share of landmarks, in per cent, whose error is at or below each threshold (same unit as the errors)."""

    higher_is_better = True

    def __init__(self, num_landmarks: int, *, thresholds: Sequence[float]) -> None:
        super().__init__(num_landmarks)
        self.thresholds = tuple(thresholds)
        shape = (len(self.thresholds), num_landmarks)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, predicted: Tensor, true: Tensor, mm_per_px: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Add points `[B, N, 2]`, spacings `[B]` and weights `[B]` (0 for padding)."""
        errors, counts = self._errors(predicted, true, mm_per_px, weight)
        within = torch.stack([errors <= threshold for threshold in self.thresholds])  # [T, B, N]
        self.total += (within * counts).sum(1)
        self.count += counts.sum(0)

    def compute(self) -> Tensor:
        """Per cent for each threshold `[T]`, over all images and landmarks."""
        return 100.0 * self.total.sum(1) / self.count.sum()

    def per_landmark(self) -> Tensor:
        """Per cent `[T, N]` of what this process has seen."""
        return 100.0 * self.total / self.count
