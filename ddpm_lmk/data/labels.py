"""Labels of packed samples: the record of each, and what cannot be right about them, to report all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_lmk.data.decoding import Packed
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.records import SampleRecord, to_stored_matrix
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError

_TOLERANCE_PX = 0.5  # a point may lie on the outer edge of a border pixel
_NAMED = 3


class Labels:
    """Makes records; `state` and `restore` carry what it has seen over an interruption."""

    def __init__(self, spec: DatasetSpec, settings: PackSettings) -> None:
        self._spec, self._settings = spec, settings
        self._outside: list[str] = []
        self._is_swap = True  # would exchanging x and y bring every outside point inside?
        self._without_mm: list[str] = []

    def state(self) -> dict[str, Any]:
        """What was wrong so far."""
        return {"outside": self._outside, "is_swap": self._is_swap, "without_mm": self._without_mm}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._outside, self._is_swap = list(state["outside"]), state["is_swap"]
        self._without_mm = list(state["without_mm"])

    def record(self, item: Packed) -> SampleRecord:
        """The record of one picture."""
        sample, points = item.sample, item.sample.points
        if points is not None:
            points = self._inside(sample.id, points, item.native)
        spacing = self._spec.resolve_spacing(points, sample.mm_per_px)
        if points is not None and spacing is None and self._spec.unit == "mm":
            self._without_mm.append(sample.id)
        return SampleRecord(
            id=sample.id,
            dataset=self._settings.name,
            split=sample.split,
            points=points,
            native_size=item.native,
            mm_per_px=spacing,
            group=sample.group,
            to_stored=to_stored_matrix(item.native, self._settings.size, self._settings.aspect),
            source=item.facts,
        )

    def _inside(self, sample_id: str, points: np.ndarray, native: tuple[int, int]) -> np.ndarray:
        size = np.array(native, dtype=np.float64)
        if self._settings.clip_landmarks:
            return np.clip(points, 0.0, size - 1)
        if not _all_inside(points, size):
            self._outside.append(sample_id)
            self._is_swap &= _all_inside(points[:, ::-1], size)
        return points

    def raise_if_wrong(self) -> None:
        """Raise DataError for points outside their image, or for millimetres that nobody can know."""
        if self._outside:
            hint = "x and y look exchanged" if self._is_swap else "correct them, or pass --clip-landmarks"
            raise DataError(f"{len(self._outside)} images have landmarks outside ({_some(self._outside)}); {hint}")
        if self._without_mm:
            raise DataError(
                f"{len(self._without_mm)} labelled images have no pixel spacing ({_some(self._without_mm)}), "
                f"but errors are wanted in mm; fill in mm_per_pixel, or use unit=px"
            )


def _all_inside(points: np.ndarray, size: np.ndarray) -> bool:
    return bool(((points >= -_TOLERANCE_PX) & (points <= size - 1 + _TOLERANCE_PX)).all())


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(sample_id) for sample_id in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
