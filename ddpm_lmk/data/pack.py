"""From a source to shards: `pack` reads labels, decodes in parallel, writes in order of id.

The bytes written depend on the source and the settings alone, not on the number of workers. A picture that cannot be
used is listed in `refused.jsonl` with the reason; labels that contradict themselves stop the packing (DataError),
because a wrong label is worse than a missing picture.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddpm_lmk.data.decode import Filter, Window
from ddpm_lmk.data.pack_settings import PackSettings, checked_settings
from ddpm_lmk.data.pool import Packed, Refused, available_cores, decoded
from ddpm_lmk.data.raw import Convention, Kind, RawDataset, RawSample, read_folder, read_phantom
from ddpm_lmk.data.raw_public import read_cephalometric, read_chest, read_hand
from ddpm_lmk.data.records import Aspect, Encoding, SampleRecord, to_stored_matrix
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.data.table import read_table
from ddpm_lmk.data.writer import ShardWriter, refuse_existing
from ddpm_lmk.errors import DataError

Progress = Callable[[int, int], None]
_FIRST_SPLITS = ("train", "val", "test")
PHANTOM_COUNTS = {"train": 400, "val": 40, "test": 100}
_TOLERANCE_PX = 0.5  # a point may lie on the outer edge of a border pixel


@dataclass
class PackSummary:
    """What was packed. `refused` are the lines of refused.jsonl."""

    out: Path
    packed: int = 0
    per_split: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    image_bytes: int = 0

    def count(self, record: SampleRecord, image_bytes: int) -> None:
        """Count one packed sample."""
        self.packed += 1
        self.image_bytes += image_bytes
        self.per_split[record.split] = self.per_split.get(record.split, 0) + 1


def pack(
    source: str | Path,
    kind: Kind,
    out: str | Path,
    *,
    name: str | None = None,
    size: int = 256,
    aspect: Aspect = "squeeze",
    filter: Filter = "area",  # noqa: A002 - the field's word
    bits: int = 8,
    window: Window = "percentile",
    encoding: Encoding = "raw",
    quality: int = 95,
    convention: Convention = "paper",
    split: str | None = None,
    val_fraction: float = 0.0,
    annotator: str = "mean",
    spec: str | None = None,
    unit: str | None = None,
    thresholds: Sequence[float] = (),
    spacing_pair: tuple[int, int] | None = None,
    clip_landmarks: bool = False,
    keep_unlabelled: bool = False,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack `source` (a folder; for kind phantom: chest, skull or hand) into the new folder `out`.

    Args:
        workers: decoding processes; null: one per core this process may use.
        progress: called with (images done, images in all).
    Other arguments are the fields of `PackSettings`.

    Raises:
        ConfigError: a setting that cannot be honoured.
        DataError: contradictory labels, or nothing left to pack.
        RunConflictError: `out` holds something already.
    """
    default = f"phantom-{source}" if kind == "phantom" else kind if kind in ("chest", "cephalometric", "hand") else None
    names = {"kind": kind, "name": name or default or _plain_name(Path(source)), "seed": seed}
    shape = {"size": size, "aspect": aspect, "filter": filter, "bits": bits, "window": window}
    stored = {"encoding": encoding, "quality": quality}
    splits = {"convention": convention, "split": split, "val_fraction": val_fraction}
    labels = {"annotator": annotator, "spec": spec, "unit": unit, "thresholds": tuple(thresholds)}
    points = {"spacing_pair": spacing_pair, "clip_landmarks": clip_landmarks, "keep_unlabelled": keep_unlabelled}
    phantoms = {"counts": counts or (PHANTOM_COUNTS if kind == "phantom" else {})}
    settings = checked_settings(names | shape | stored | splits | labels | points | phantoms)
    refuse_existing(Path(out))
    started = time.perf_counter()
    found = _read(Path(source) if kind != "phantom" else str(source), settings)
    summary = _write(found, settings, Path(out), available_cores() if workers is None else workers, progress)
    summary.seconds = time.perf_counter() - started
    return summary


def _read(source: Path | str, settings: PackSettings) -> RawDataset:
    if isinstance(source, str):
        return read_phantom(source, counts=settings.counts, seed=settings.seed, size=settings.size)
    if settings.kind == "folder":
        return read_folder(
            source,
            name=settings.name,
            split=settings.split or "train",
            val_fraction=settings.val_fraction,
            seed=settings.seed,
        )
    if settings.kind == "chest":
        return read_chest(source, convention=settings.convention)
    if settings.kind == "cephalometric":
        return read_cephalometric(source, convention=settings.convention, annotator=settings.annotator)
    if settings.kind == "hand":
        return read_hand(source, spacing_pair=settings.spacing_pair)
    return read_table(
        source,
        name=settings.name,
        split=settings.split,
        annotator=settings.annotator,
        spec=settings.spec,
        unit=settings.unit,
        thresholds=settings.thresholds,
        spacing_pair=settings.spacing_pair,
        keep_unlabelled=settings.keep_unlabelled,
    )


def _write(
    found: RawDataset, settings: PackSettings, out: Path, workers: int, progress: Progress | None
) -> PackSummary:
    summary = PackSummary(out, refused=list(found.refused), warnings=list(found.warnings))
    labels = _Labels(found.spec, settings)
    seen: set[bytes] = set()
    with ShardWriter(
        out,
        dataset=settings.name,
        spec=found.spec,
        splits=_ordered_splits(found.samples),
        encoding=settings.encoding,
        bits=settings.bits,
        stored_size=settings.size,
        aspect=settings.aspect,
        settings=settings.model_dump(mode="json"),
    ) as writer:
        for done, item in enumerate(decoded(found.samples, settings, workers), 1):
            digest = hashlib.sha256(item.image).digest()[:16] if isinstance(item, Packed) else b""
            if isinstance(item, Refused):
                summary.refused.append({"id": item.id, "reason": item.reason})
            elif digest in seen and item.sample.points is None:
                summary.refused.append({"id": item.sample.id, "reason": "the same picture as an earlier one"})
            else:
                seen.add(digest)
                record = labels.record(item)
                writer.add(record, item.image)
                summary.count(record, len(item.image))
            if progress is not None:
                progress(done, len(found.samples))
        labels.raise_if_wrong()
        _raise_if_empty(summary)
        summary.refused.sort(key=lambda line: line["id"])
        writer.refuse(summary.refused)
    return summary


class _Labels:
    """Makes records, and collects the labels that cannot be right, to report all of them at once."""

    def __init__(self, spec: DatasetSpec, settings: PackSettings) -> None:
        self._spec, self._settings = spec, settings
        self._outside: list[str] = []
        self._is_swap = True  # would exchanging x and y bring every outside point inside?
        self._without_mm: list[str] = []

    def record(self, item: Packed) -> SampleRecord:
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
    return ", ".join(repr(sample_id) for sample_id in ids[:3]) + (", ..." if len(ids) > 3 else "")


def _raise_if_empty(summary: PackSummary) -> None:
    if summary.packed:
        return
    first = f": {summary.refused[0]['id']!r}: {summary.refused[0]['reason']}" if summary.refused else ""
    raise DataError(f"nothing to pack: {len(summary.refused)} images were refused{first}; give other images")


def _ordered_splits(samples: Iterable[RawSample]) -> tuple[str, ...]:
    names = {sample.split for sample in samples}
    return tuple(name for name in _FIRST_SPLITS if name in names) + tuple(sorted(names.difference(_FIRST_SPLITS)))


def _plain_name(source: Path) -> str:
    """A dataset name from a folder's."""
    return re.sub("[^A-Za-z0-9._-]+", "-", source.absolute().name)[:80] or "dataset"
