"""Labels of packed samples: the record of each, and what cannot be right about them, to report all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_lmk.data.shards.decoding import Packed
from ddpm_lmk.data.shards.pack_settings import PackSettings
from ddpm_lmk.data.shards.records import SampleRecord, to_stored_matrix
from ddpm_lmk.data.sources.base import RawSample
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError

_TOLERANCE_PX = 0.5  # a point may lie on the outer edge of a border pixel
_MOST_CLIPPED = 0.05  # of the longer side: an annotator's slip over the edge; what lies further out is another mistake
_CORNER = 0.4  # share of both sides; landmarks of whole sets reach further
_FEW = 5  # images, of which nothing is concluded
_NAMED = 3


class Labels:
    """Makes records; `state` and `restore` carry what it has seen over an interruption."""

    def __init__(self, spec: DatasetSpec, settings: PackSettings) -> None:
        self._spec, self._settings = spec, settings
        self._outside: list[str] = []
        self._is_swap = True  # would exchanging x and y bring every outside point inside?
        self._is_near = True  # would clipping move none of them far?
        self._furthest: list[float] = [1.0, 0, 0, 0, 0]  # by the largest excess: factor, points' x and y, width, height
        self._without_mm: list[str] = []
        self._clipped: list[float] = [0, 0, 0.0]  # images, points, longest way in px
        self._reach: list[float] = [0, 0.0, 0.0]  # labelled images, shares of width and height that points reach

    def state(self) -> dict[str, Any]:
        """What was wrong so far."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        for name in _STATE:
            setattr(self, f"_{name}", state[name])

    def record(self, item: Packed) -> SampleRecord:
        """The record of one picture."""
        sample, points = item.sample, item.sample.points
        if points is not None:
            points = self._inside(sample, points, item.native)
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

    def _inside(self, sample: RawSample, points: np.ndarray, native: tuple[int, int]) -> np.ndarray:
        size = np.array(native, dtype=np.float64)
        reach = points.max(0) / size
        self._reach = [self._reach[0] + 1, *(max(old, float(new)) for old, new in zip(self._reach[1:], reach))]
        if _all_inside(points, size):
            return np.clip(points, 0.0, size - 1) if self._settings.clip_landmarks else points
        way = np.abs(points - np.clip(points, 0.0, size - 1)).max(1)  # [N] px to the image
        if self._settings.clip_landmarks and way.max() <= _MOST_CLIPPED * size.max():
            images, moved, longest = self._clipped
            self._clipped = [images + 1, moved + int((way > _TOLERANCE_PX).sum()), max(longest, float(way.max()))]
            return np.clip(points, 0.0, size - 1)
        self._outside.append(sample.id)
        self._is_swap &= _all_inside(points[:, ::-1], size)
        self._is_near &= bool(way.max() <= _MOST_CLIPPED * size.max())
        if reach.max() > self._furthest[0] and sample.native_size is None:
            self._furthest = [float(reach.max()), *map(float, points.max(0)), *native]
        return points

    def warnings(self) -> list[str]:
        """What was done to labels, and what looks odd about all of them together."""
        said = []
        images, moved, longest = self._clipped
        if images:
            said.append(f"--clip-landmarks moved {moved} points of {images} images, by up to {longest:.1f} px")
        count, right, bottom = self._reach
        if count >= _FEW and max(right, bottom) < _CORNER:
            said.append(
                f"no landmark of {count} images lies beyond {right:.0%} of the width and {bottom:.0%} of the height; "
                "if these are not pixels of the files, fill in orig_width and orig_height"
            )
        return said

    def raise_if_wrong(self) -> None:
        """Raise DataError for points outside their image, or for millimetres that nobody can know."""
        if self._outside:
            found = f"{len(self._outside)} images have landmarks outside ({_some(self._outside)})"
            raise DataError(f"{found}; {self._advice()}")
        if self._without_mm:
            raise DataError(
                f"{len(self._without_mm)} labelled images have no pixel spacing ({_some(self._without_mm)}), "
                f"but errors are wanted in mm; fill in mm_per_pixel, or use unit=px"
            )

    def _advice(self) -> str:
        """What to do about points outside: clipping only where it would move them a little."""
        if self._is_near:
            swap = "see whether x and y are exchanged; " if self._is_swap else ""
            return f"{swap}correct them, or pass --clip-landmarks"
        if self._is_swap:
            return "x and y look exchanged"
        _, x, y, width, height = self._furthest
        if width and self._settings.kind == "table":
            return (
                f"points reach {x:.0f} x {y:.0f}, the file is {width:.0f} x {height:.0f}: "
                "fill in orig_width and orig_height, the size that was annotated, or correct the points"
            )
        return f"correct them; they are too far out to be clipped (over {_MOST_CLIPPED:.0%} of the longer side)"


_STATE = ("outside", "is_swap", "is_near", "furthest", "without_mm", "clipped", "reach")


def _all_inside(points: np.ndarray, size: np.ndarray) -> bool:
    return bool(((points >= -_TOLERANCE_PX) & (points <= size - 1 + _TOLERANCE_PX)).all())


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(sample_id) for sample_id in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
