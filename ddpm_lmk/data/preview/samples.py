"""An even sample of a dataset for its statistics, and what was refused when it was packed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import SampleRecord

BINS = 64
_MOST_SAMPLED = 512  # enough for shares to a few percent, and read in seconds
_MOST_LISTED = 200  # refused files in full, on a page that a browser opens at once


@dataclass(frozen=True)
class DatasetSample:
    """A dataset and an even sample of its images.

    Attributes:
        records: of the sampled images.
        points: in stored px, `[K, N, 2]`, of those with labels.
        histogram: `[64]` shares of pixels, over the full range of the type.
        mean_image: `[S, S]` in [0, 1].
        refusals: how many files were refused, by code.
        refused: the first of those files.
    """

    manifest: Manifest
    records: list[SampleRecord]
    points: np.ndarray
    histogram: np.ndarray
    mean_image: np.ndarray
    refusals: Counter[str]
    refused: list[dict[str, str]]

    @property
    def source_bits(self) -> list[int | None]:
        """Bits per pixel of the sampled files; None where that was not noted."""
        return [None if record.source is None else record.source.get("bits") for record in self.records]

    @property
    def spacings(self) -> list[float]:
        """Known pixel spacings, mm per native px."""
        return [record.mm_per_px for record in self.records if record.mm_per_px is not None]

    def lines(self) -> list[tuple[str, str]]:
        """The facts of the dataset, as (label, value)."""
        manifest, spec = self.manifest, self.manifest.spec
        index, splits = manifest.index, manifest.count_per_split()
        encoding = manifest.encoding.replace("_", " ")
        megabytes = sum(shard.get("tar", shard)["size"] for shard in manifest.shards) / 1e6
        patients = {record.group for record in self.records if record.group is not None}
        sampled = f"{len(self.records)} images, {len(self.points)} with labels, {len(patients)} patients named"
        return [
            ("dataset", manifest.dataset),
            ("images", f"{len(manifest)} ({', '.join(f'{name} {number}' for name, number in splits.items())})"),
            ("refused files", str(self.refusals.total())),
            ("stored as", f"{manifest.stored_size} px, {manifest.aspect}, {manifest.bits} bit, {encoding}"),
            ("size", f"{megabytes:.1f} MB, {len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"),
            ("native size", f"{_range(index['width'])} x {_range(index['height'])} px"),
            ("pixel spacing", self._spacing()),
            ("landmarks", f"{spec.num_landmarks}, unit {spec.unit}" if spec.num_landmarks else "none"),
            ("sampled", sampled),
            ("fingerprint", manifest.fingerprint[:16]),
        ]

    def _spacing(self) -> str:
        known = self.spacings
        if not known:
            return "unknown"
        spread = f"{min(known):.3f}" if min(known) == max(known) else f"{min(known):.3f} to {max(known):.3f}"
        return f"{spread} mm per native px" + (f", known for {len(known)}" if len(known) < len(self.records) else "")


def sample_dataset(manifest: Manifest) -> DatasetSample:
    """Sample up to 512 images evenly. Raises CorruptSampleError where one is damaged."""
    records, points = [], []
    counts = np.zeros(BINS)
    total = np.zeros((manifest.stored_size, manifest.stored_size))
    rows = evenly_spaced(len(manifest), _MOST_SAMPLED)
    for row in rows.tolist():
        record, pixels = manifest.read_record(row), to_unit_range(manifest.decode(row))
        records.append(record)
        if record.points is not None:
            points.append(stored_points(record))
        counts += np.histogram(pixels, bins=BINS, range=(0, 1))[0]
        total += pixels
    shapes = np.array(points).reshape(len(points), manifest.spec.num_landmarks, 2)
    return DatasetSample(manifest, records, shapes, counts / counts.sum(), total / len(rows), *_refused(manifest))


def _refused(manifest: Manifest) -> tuple[Counter[str], list[dict[str, str]]]:
    refusals: Counter[str] = Counter()
    listed: list[dict[str, str]] = []
    path = manifest.beside("refused.jsonl")
    if path is not None:
        with path.open(encoding="ascii") as file:
            for line in map(json.loads, file):
                line.setdefault("code", "REFUSED")  # datasets of the first version gave a reason only
                refusals[line["code"]] += 1
                if len(listed) < _MOST_LISTED:
                    listed.append(line)
    return refusals, listed


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def stored_points(record: SampleRecord) -> np.ndarray:
    """Landmarks in stored px, `[N, 2]`."""
    assert record.points is not None
    return record.points @ record.to_stored[:, :2].T + record.to_stored[:, 2]


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [0, 1] of the range of their type."""
    return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """At most `count` numbers below `total`, as far apart as they can be."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))
