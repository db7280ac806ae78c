"""Labels of packed samples: the record of each, and what cannot be right about them, to report all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.records import SampleRecord, to_stored_matrix
from ddpm_lmk.data.sources.base import RawSample
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError

_TOLERANCE_PX = 0.5  # a point may lie on the outer edge of a border pixel
_MOST_CLIPPED = 0.05  # of the longer side: an annotator's slip over the edge; what lies further out is another mistake
_CORNER = 0.4  # share of both sides; landmarks of whole sets reach further
_FEW = 5  # images, of which nothing is concluded
_NAMED = 3


@dataclass
class Findings:
    """What is known of the labels so far; it is noted with every finished shard, so that packing can be resumed."""

    outside: list[str] = field(default_factory=list)
    is_swap: bool = True  # would exchanging x and y bring every outside point inside?
    is_near: bool = True  # would clipping move none of them far?
    furthest: list[float] = field(default_factory=lambda: [1.0, 0, 0, 0, 0])  # excess, points' x and y, width, height
    without_mm: list[str] = field(default_factory=list)
    clipped_images: int = 0
    clipped_points: int = 0
    longest_clip_px: float = 0.0
    labelled: int = 0
    reach: list[float] = field(default_factory=lambda: [0.0, 0.0])  # shares of width and height that points reach


class Labels:
    """Makes records, and keeps `findings` about all labels together."""

    def __init__(self, spec: DatasetSpec, settings: PackSettings) -> None:
        self._spec, self._settings = spec, settings
        self.findings = Findings()

    def record(self, sample: RawSample, native_size: tuple[int, int], facts: dict[str, Any] | None) -> SampleRecord:
        """The record of a sample, with what its file says: its size and technical facts."""
        points = sample.points
        if points is not None:
            points = self._placed(sample, points, native_size)
        spacing = self._spec.resolve_spacing(points, sample.mm_per_px)
        if points is not None and spacing is None and self._spec.unit == "mm":
            self.findings.without_mm.append(sample.id)
        return SampleRecord(
            id=sample.id,
            dataset=self._settings.name,
            split=sample.split,
            points=points,
            native_size=native_size,
            mm_per_px=spacing,
            group=sample.group,
            to_stored=to_stored_matrix(native_size, self._settings.size, self._settings.aspect),
            source=facts,
        )

    def _placed(self, sample: RawSample, points: np.ndarray, native_size: tuple[int, int]) -> np.ndarray:
        """The points, clipped if that was asked for and moves them little; what lies outside is noted."""
        noted, size = self.findings, np.array(native_size, dtype=np.float64)
        reach = points.max(0) / size
        noted.labelled += 1
        noted.reach = [max(old, float(new)) for old, new in zip(noted.reach, reach)]
        clipped = np.clip(points, 0.0, size - 1)
        if _all_inside(points, size):
            return clipped if self._settings.clip_landmarks else points
        way = np.abs(points - clipped).max(1)  # [N] px to the image
        is_near = bool(way.max() <= _MOST_CLIPPED * size.max())
        if self._settings.clip_landmarks and is_near:
            noted.clipped_images += 1
            noted.clipped_points += int((way > _TOLERANCE_PX).sum())
            noted.longest_clip_px = max(noted.longest_clip_px, float(way.max()))
            return clipped
        noted.outside.append(sample.id)
        noted.is_swap &= _all_inside(points[:, ::-1], size)
        noted.is_near &= is_near
        if reach.max() > noted.furthest[0] and sample.native_size is None:
            noted.furthest = [float(reach.max()), *map(float, points.max(0)), *native_size]
        return points

    def warnings(self) -> list[str]:
        """What was done to labels, and what looks odd about all of them together."""
        lines, noted = [], self.findings
        if noted.clipped_images:
            lines.append(
                f"--clip-landmarks moved {noted.clipped_points} points of {noted.clipped_images} images, "
                f"by up to {noted.longest_clip_px:.1f} px"
            )
        right, bottom = noted.reach
        # All in one corner: coordinates of a smaller copy, or shares of something else than the sides.
        if noted.labelled >= _FEW and max(right, bottom) < _CORNER:
            lines.append(
                f"no landmark of {noted.labelled} images lies beyond {right:.0%} of the width and {bottom:.0%} of the "
                "height; if these are not pixels of the files, fill in orig_width and orig_height"
            )
        return lines

    def raise_if_wrong(self) -> None:
        """Raise DataError for points outside their image, or for millimetres that nobody can know.

        A wrong label is worse than a missing image, so these stop the packing instead of being listed as refused.
        """
        outside, without_mm = self.findings.outside, self.findings.without_mm
        if outside:
            raise DataError(f"{len(outside)} images have landmarks outside ({_first_of(outside)}); {self._advice()}")
        if without_mm:
            raise DataError(
                f"{len(without_mm)} labelled images have no pixel spacing ({_first_of(without_mm)}), "
                "but errors are wanted in mm; fill in mm_per_pixel, or use unit=px"
            )

    def _advice(self) -> str:
        """What to do about points outside: clipping only where it would move them a little."""
        if self.findings.is_near:
            swap = "see whether x and y are exchanged; " if self.findings.is_swap else ""
            return f"{swap}correct them, or pass --clip-landmarks"
        if self.findings.is_swap:
            return "x and y look exchanged"
        _, x, y, width, height = self.findings.furthest
        if width and self._settings.kind == "table":
            return (
                f"points reach {x:.0f} x {y:.0f}, the file is {width:.0f} x {height:.0f}: "
                "fill in orig_width and orig_height, the size that was annotated, or correct the points"
            )
        return f"correct them; they are too far out to be clipped (over {_MOST_CLIPPED:.0%} of the longer side)"


def _all_inside(points: np.ndarray, size: np.ndarray) -> bool:
    return bool(((points >= -_TOLERANCE_PX) & (points <= size - 1 + _TOLERANCE_PX)).all())


def _first_of(ids: Sequence[str]) -> str:
    return ", ".join(repr(sample_id) for sample_id in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
