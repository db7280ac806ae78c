"""`index.npy`: opened and checked, rebuilt from the shards, and which of its rows belong to which splits.

A pool may hold ten million samples, so rows are never listed. What stays in memory is a map of the file and one count
per shard and split; `SplitRows` looks up the rows of a shard when they are due. `ListedRows` holds the few rows of a
labelled set as they are given.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddpm_lmk.data.shards.records import INDEX_DTYPE, index_row, record_from_json
from ddpm_lmk.errors import DataError
from ddpm_lmk.system.files import write_bytes

Ints = NDArray[np.int64]
_ROWS_AT_ONCE = 1 << 17  # 7 MB of the file


@dataclass(frozen=True)
class Index:
    """An open index.

    Attributes:
        rows: the file itself, memory-mapped, `INDEX_DTYPE`, in order of shards.
        starts: `[S + 1]` first row of each of S shards, and the number of rows.
        per_split: `[S, K]` samples of each of K splits in every shard.
    """

    rows: np.memmap
    starts: Ints
    per_split: Ints


def open_index(root: Path, header: dict[str, Any]) -> Index:
    """Open the index that `header` (the content of manifest.json) belongs to; ten million rows take about a second.

    Raises:
        DataError: it is missing, changed, or not what the manifest says.
    """
    path = root / "index.npy"
    remedy = f"run `ddpm-lmk shards index {root}` to rebuild it from the shards"
    try:
        # What precedes the rows is a .npy header for other readers; it is covered by the digest and never parsed.
        offset = path.stat().st_size - header["count"] * INDEX_DTYPE.itemsize
        digest, per_split = _scan(path, offset, len(header["shards"]), len(header["splits"]))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except ValueError as error:
        raise DataError(f"{path} is not an index of this tool ({error}); {remedy}") from error
    if digest != header["index_sha256"]:
        raise DataError(f"{path} was changed after packing (sha256 differs); {remedy}")
    counts = per_split.sum(1)
    if counts.tolist() != [shard["count"] for shard in header["shards"]]:
        raise DataError(f"{path} and manifest.json disagree on the number of samples; pack again")
    rows = np.memmap(path, INDEX_DTYPE, "r", offset=offset, shape=(header["count"],))
    return Index(rows, np.concatenate([[0], np.cumsum(counts)]), per_split)


def _scan(path: Path, offset: int, num_shards: int, num_splits: int) -> tuple[str, Ints]:
    """The file's digest and `[S, K]` counts, from one pass over it."""
    if offset < 0:
        raise ValueError("too short")
    digest, last = hashlib.sha256(), 0
    counts = np.zeros(num_shards * num_splits, dtype=np.int64)
    with open(path, "rb") as file:  # read, not mapped: mapped pages would count as memory of this process
        digest.update(file.read(offset))
        while block := file.read(_ROWS_AT_ONCE * INDEX_DTYPE.itemsize):
            digest.update(block)
            part = np.frombuffer(block, INDEX_DTYPE, count=len(block) // INDEX_DTYPE.itemsize)
            shards, splits = part["shard"].astype(np.int64), part["split"]
            # Checked before the digest is known: an index of other numbers would make bincount allocate without bound.
            if len(part) and (shards[0] < last or (np.diff(shards) < 0).any() or shards[-1] >= num_shards):
                raise ValueError("shards out of order")
            if (splits >= num_splits).any():
                raise ValueError("unknown split")
            counts += np.bincount(shards * num_splits + splits, minlength=len(counts))
            last = int(shards[-1]) if len(part) else last
    return digest.hexdigest(), counts.reshape(num_shards, num_splits)


def rebuild_index(root: Path, header: dict[str, Any]) -> Path:
    """Write `index.npy` anew from the shards, byte for byte as it was packed.

    Raises:
        DataError: a shard is not as it was packed either, so the result would not be what the manifest describes.
    """
    rows, content = bytearray(), io.BytesIO()
    try:
        for number in range(len(header["shards"])):
            for row in _rows_of_shard(root, header, number):
                rows += row.tobytes()
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"a shard of {root} cannot be read ({error}); restore it or pack again") from error
    np.save(content, np.frombuffer(rows, INDEX_DTYPE), allow_pickle=False)
    if hashlib.sha256(content.getbuffer()).hexdigest() != header["index_sha256"]:
        raise DataError(
            f"the shards of {root} are not those its manifest was written for, so no index was written; "
            "restore the shards or pack again"
        )
    write_bytes(root / "index.npy", content.getvalue())
    return root / "index.npy"


def _rows_of_shard(root: Path, header: dict[str, Any], number: int) -> Iterator[np.ndarray]:
    path = root / Path(header["shards"][number]["name"]).name
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:

        def content(member: tarfile.TarInfo) -> bytes:
            file.seek(member.offset_data)
            return file.read(member.size)

        image = None  # of a dataset in place there is none: each record says where it is
        for member in tar:
            if not member.name.endswith(".json"):
                image = member
                continue
            label, pixels = content(member), b"" if image is None else content(image)
            record = record_from_json(label, size=header["stored_size"], aspect=header["aspect"])
            if record.split not in header["splits"]:
                raise DataError(f"{path} holds a sample of split {record.split!r}, unknown to the manifest; pack again")
            row = index_row(record, pixels, len(label), shard=number, split=header["splits"].index(record.split))
            if image is not None:
                row["offset"] = image.offset_data
            row["json_offset"] = member.offset_data
            yield row


class ByShard(Protocol):
    """Rows by shard: one group for each shard that has any."""

    @property
    def counts(self) -> Ints:
        """Rows of each group `[G]`, none of them 0."""

    def of(self, group: int) -> Ints:
        """Rows of one group, in order."""

    def __len__(self) -> int:
        """Rows in all."""


class ListedRows:
    """Rows given one by one, with the shard of each; inside a shard they keep their order."""

    def __init__(self, rows: np.ndarray, shards: np.ndarray) -> None:
        by_shard = np.argsort(shards, kind="stable")
        self._rows = np.asarray(rows, dtype=np.int64)[by_shard]
        _, self._first, self.counts = np.unique(shards[by_shard], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, group: int) -> Ints:
        """Rows of one group."""
        return self._rows[self._first[group] : self._first[group] + self.counts[group]]


class SplitRows:
    """The ascending rows of some splits, but for those left out. Behaves like an array that is never made.

    Args:
        index: rows of the index; only the column `split` is read, a shard at a time.
        starts: `[S + 1]` first row of every shard, and the number of rows.
        per_shard: `[S]` rows of these splits in every shard.
        splits: codes of the splits.
        without: rows that are left out; others than those of the splits do not matter.
    """

    def __init__(
        self,
        index: np.ndarray,
        starts: Ints,
        per_shard: Ints,
        splits: list[int],
        without: np.ndarray | None = None,
    ) -> None:
        self._index, self._starts, self._splits = index, starts, splits
        self._left = per_shard
        self._without = np.zeros(0, dtype=np.int64)
        if without is not None and len(without):
            rows = np.unique(np.asarray(without, dtype=np.int64))
            self._without = rows[np.isin(index["split"][rows], splits)]
            shards = np.searchsorted(starts, self._without, side="right") - 1
            self._left = per_shard - np.bincount(shards, minlength=len(per_shard))
        self._groups = np.flatnonzero(self._left)
        self.counts: Ints = self._left[self._groups]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def of(self, group: int) -> Ints:
        """Rows of one group, ascending."""
        shard = self._groups[group]
        first, end = int(self._starts[shard]), int(self._starts[shard + 1])
        is_whole = self._left[shard] == end - first  # the usual case, in which the index need not be read
        return np.arange(first, end, dtype=np.int64) if is_whole else self.within(first, end)

    def within(self, first: int, end: int) -> Ints:
        """The rows that are at least `first` and less than `end`, ascending."""
        rows = first + np.flatnonzero(np.isin(self._index["split"][first:end], self._splits))
        if isinstance(self._index, np.memmap):
            # Mapped pages count as this process' memory; the page cache keeps them for whoever comes next.
            self._index._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        low, high = np.searchsorted(self._without, (first, end))
        return rows if low == high else np.setdiff1d(rows, self._without[low:high], assume_unique=True)

    def __getitem__(self, places: Any) -> Any:
        """The row at a place, or an array of the rows at several (numbers, a slice or a mask)."""
        wanted = np.asarray(np.arange(len(self))[places] if isinstance(places, slice) else places)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        flat = np.where(wanted < 0, wanted + len(self), wanted).reshape(-1).astype(np.int64)
        if len(flat) and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"place {flat.max()} of {len(self)} rows")
        groups = np.searchsorted(self._ends, flat, side="right")
        out = np.empty_like(flat)
        for group in np.unique(groups):  # a shard at a time, so that each part of the index is read once
            here = groups == group
            out[here] = self.of(int(group))[flat[here] - (self._ends[group] - self.counts[group])]
        return out.reshape(wanted.shape) if wanted.ndim else int(out[0])

    def __iter__(self) -> Iterator[int]:
        for group in range(len(self.counts)):
            yield from self.of(group).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = [self.of(group) for group in range(len(self.counts))]
        return np.concatenate(parts or [np.zeros(0, np.int64)]).astype(dtype or np.int64, copy=False)

    def tolist(self) -> list[int]:
        """All rows as a list: for small sets."""
        return np.asarray(self).tolist()
