"""The index of a pack: `index.npy`, a fixed-width row per sample, checked against the manifest, rebuilt from shards.

Opening reads the file once, in pieces: for its digest, and to count the samples of every shard and split. What stays is
a memory map and those counts, so that ten million samples open in about a second and cost no memory of the process'
own. Rows are in order of shards; `Manifest` is what everybody else uses.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_lmk.data.shards.records import INDEX_DTYPE, index_row, record_from_json
from ddpm_lmk.data.shards.rows import Ints
from ddpm_lmk.errors import DataError
from ddpm_lmk.system.files import write_bytes

_ROWS_AT_ONCE = 1 << 17  # 7 MB of the file


@dataclass(frozen=True)
class Index:
    """An open index.

    Attributes:
        rows: the file itself, memory-mapped, `INDEX_DTYPE`.
        starts: `[S + 1]` first row of each of S shards, and the number of rows.
        per_split: `[S, K]` samples of each of K splits in every shard.
    """

    rows: np.memmap
    starts: Ints
    per_split: Ints


def open_index(root: Path, header: dict[str, Any]) -> Index:
    """Open the index that `header` (the content of manifest.json) belongs to.

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
    """The file's digest and `[S, K]` counts. Reads rather than maps: mapped pages would count as this process' own."""
    if offset < 0:
        raise ValueError("too short")
    digest, last = hashlib.sha256(), 0
    counts = np.zeros(num_shards * num_splits, dtype=np.int64)
    with open(path, "rb") as file:
        digest.update(file.read(offset))
        while block := file.read(_ROWS_AT_ONCE * INDEX_DTYPE.itemsize):
            digest.update(block)
            part = np.frombuffer(block, INDEX_DTYPE, count=len(block) // INDEX_DTYPE.itemsize)
            shards, splits = part["shard"].astype(np.int64), part["split"]
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
            for row in _shard_rows(root, header, number):
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


def _shard_rows(root: Path, header: dict[str, Any], number: int) -> Iterator[np.ndarray]:
    """Index rows of one shard, from its tar members."""
    size, aspect = header["stored_size"], header["aspect"]
    path = root / Path(header["shards"][number]["name"]).name
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
        members = list(tar)
        for image, text in zip(members[::2], members[1::2], strict=False):
            pixels, label = (_content(file, member) for member in (image, text))
            record = record_from_json(label, size=size, aspect=aspect)
            if record.split not in header["splits"]:
                raise DataError(
                    f"{path} holds a sample of split {record.split!r}, which the manifest lacks; pack again"
                )
            row = index_row(record, pixels, len(label), shard=number, split=header["splits"].index(record.split))
            row["offset"], row["json_offset"] = image.offset_data, text.offset_data
            yield row


def _content(file: Any, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)
