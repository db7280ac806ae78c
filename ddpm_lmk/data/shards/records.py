"""The format of shards: a sample's row in `index.npy`, its JSON member, the map from native to stored pixels."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.parse
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ddpm_lmk.errors import DataError

FORMAT = "ddpm-lmk-shards"
# Of datasets in place the second: a tool that knows packed ones only would look for the pixels in the wrong tars.
FORMAT_VERSION, IN_PLACE_VERSION = 1, 2

Aspect = Literal["squeeze", "pad"]
Encoding = Literal["raw", "png", "jpeg"]
Stored = Encoding | Literal["in_place"]  # in place: images stay in the tars of others, as they are (`in_place`)

EXTENSIONS: dict[str, str] = {"raw": "npy", "png": "png", "jpeg": "jpg"}

# Fixed width, so that ten million samples are one memory map and no Python objects.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the image member's content
        ("size", "<u4"),
        ("json_offset", "<u8"),
        ("json_size", "<u4"),
        ("sha256", "u1", (16,)),  # first half of the image member's digest
        ("split", "u1"),  # index into Manifest.splits
        ("width", "<u4"),  # native
        ("height", "<u4"),
    ]
)

_SEAL = b', "sha256": "'
_SEAL_SIZE = len(_SEAL) + 16 + 2  # 16 hex digits and `"}`
_MAX_KEY = 88  # with an extension this fits the 100 bytes of a plain tar header


@dataclass(frozen=True)
class InTar:
    """An image in a tar of others: where its bytes begin there, how many they are, and their digest."""

    offset: int
    size: int
    sha256: str  # the first 32 hex digits


class CorruptSampleError(DataError):
    """A sample whose bytes are not those that were packed."""


@dataclass(frozen=True)
class SampleRecord:
    """Everything known about a sample but its pixels. `points` are native px; `to_stored` takes native to stored px."""

    id: str
    dataset: str
    split: str
    points: np.ndarray | None  # [N, 2] float64
    native_size: tuple[int, int]  # width, height
    mm_per_px: float | None
    group: str | None  # the patient, where known
    to_stored: np.ndarray  # [2, 3] float64
    source: dict[str, Any] | None = None  # technical facts of the file: format, bits, what was applied to its values
    in_tar: InTar | None = None  # None: the image is packed beside this record


def index_row(record: SampleRecord, image: bytes, json_size: int, *, shard: int, split: int) -> np.ndarray:
    """The row `[1]` of a sample in the index, but for its offsets here; `image` does not matter if it is `in_tar`."""
    row = np.zeros(1, INDEX_DTYPE)
    row["shard"], row["split"] = shard, split
    row["width"], row["height"] = record.native_size
    row["json_size"] = json_size
    if (at := record.in_tar) is not None:
        row["offset"], row["size"], digest = at.offset, at.size, bytes.fromhex(at.sha256)
    else:
        row["size"], digest = len(image), hashlib.sha256(image).digest()[:16]
    row["sha256"] = np.frombuffer(digest, np.uint8)
    return row


def to_stored_matrix(native_size: tuple[int, int], size: int, aspect: Aspect) -> np.ndarray:
    """The `[2, 3]` matrix from native to stored px: `squeeze` fills the square, `pad` keeps the aspect ratio, centred.

    Half-pixel centres: x -> (x + 0.5) * sx - 0.5 + left.
    """
    left, top, width, height = content_box(native_size, size, aspect)
    sx, sy = width / native_size[0], height / native_size[1]
    return np.array([[sx, 0.0, 0.5 * sx - 0.5 + left], [0.0, sy, 0.5 * sy - 0.5 + top]])


def content_box(native_size: tuple[int, int], size: int, aspect: Aspect) -> tuple[int, int, int, int]:
    """Where the image lies inside the stored square: left, top, width, height in whole pixels."""
    if aspect == "squeeze":
        return 0, 0, size, size
    factor = size / max(native_size)
    width, height = (max(1, min(size, round(side * factor))) for side in native_size)
    return (size - width) // 2, (size - height) // 2, width, height


def member_key(sample_id: str) -> str:
    """A tar member name for an id: no dots (WebDataset cuts there), no slashes, ASCII, short, one per id."""
    quoted = urllib.parse.quote(os.fsencode(sample_id), safe="").replace(".", "%2E")
    if len(quoted) <= _MAX_KEY:
        return quoted
    return f"{quoted[: _MAX_KEY - 17]}-{hashlib.sha256(os.fsencode(sample_id)).hexdigest()[:16]}"


def record_to_json(record: SampleRecord) -> bytes:
    """The JSON member. Its last field is a digest of the bytes before it, so that a changed coordinate is noticed."""
    fields: dict[str, Any] = {
        "id": record.id,
        "dataset": record.dataset,
        "split": record.split,
        "points": None if record.points is None else [[float(x), float(y)] for x, y in record.points],
        "native_size": [int(side) for side in record.native_size],
        "mm_per_px": record.mm_per_px,
        "group": record.group,
    }
    if record.source is not None:
        fields["source"] = record.source
    if record.in_tar is not None:
        fields["in_tar"] = asdict(record.in_tar)
    body = json.dumps(fields, allow_nan=False).encode("ascii")[:-1]
    return body + _SEAL + _digest(body) + b'"}'


def record_from_json(data: bytes, *, size: int, aspect: Aspect) -> SampleRecord:
    """Parse a JSON member; CorruptSampleError where its digest does not fit."""
    body, seal = data[:-_SEAL_SIZE], data[-_SEAL_SIZE:]
    if seal != _SEAL + _digest(body) + b'"}':
        raise CorruptSampleError("a sample's JSON is not what was packed; run `ddpm-lmk shards verify` and pack again")
    fields = json.loads(data)
    native_size = (fields["native_size"][0], fields["native_size"][1])
    return SampleRecord(
        id=fields["id"],
        dataset=fields["dataset"],
        split=fields["split"],
        points=None if fields["points"] is None else np.asarray(fields["points"], dtype=np.float64),
        native_size=native_size,
        mm_per_px=fields["mm_per_px"],
        group=fields["group"],
        to_stored=to_stored_matrix(native_size, size, aspect),
        source=fields.get("source"),  # absent in shards of before format, bits and spacing were noted
        in_tar=InTar(**fields["in_tar"]) if "in_tar" in fields else None,
    )


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode("ascii")


def fingerprint_of(header: dict[str, Any]) -> str:
    """sha256 over settings, spec, index and shard digests: equal for equal data, whoever packed it."""
    covered = {key: value for key, value in header.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode("ascii")).hexdigest()
