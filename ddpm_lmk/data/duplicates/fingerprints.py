"""Image fingerprints: 64 bytes by which an image is found again after re-encoding, resizing or a change of its greys.

A digest of the packed pixels (the same pixels), the signs of 64 low frequencies of a cosine transform (a perceptual
hash: looks alike), the signs of the next 256 (two skulls may look alike in 64 bits, but no two images share their
details), and a digest of the patient's id. `prints.bin` lies beside the manifest of a dataset and is bound to it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import cv2
import numpy as np

from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import CorruptSampleError, SampleRecord, content_box
from ddpm_lmk.data.sources.ids import same_patient
from ddpm_lmk.errors import DataError
from ddpm_lmk.system.files import write_bytes

FINGERPRINT_DTYPE = np.dtype(
    [
        ("pixels", "<u8", (2,)),  # first half of the sha256 of shape, type and packed pixels; 0: cannot be read
        ("low", "<u8"),
        ("detail", "<u8", (4,)),
        ("patient", "<u8"),  # 0: unknown; odd: unique inside the dataset of this name only
    ]
)
FILE_NAME = "prints.bin"

_GRID = 32  # side of what is transformed; smaller images have no details to compare
_LOW, _DETAIL = 64, 256
_UNIQUE_ID = 6  # characters from which a patient's id means one person whatever the dataset; MIMIC-CXR's have 8
_VERSION = "ddpm-lmk-prints 2"  # 1 had other rules for patients, so such a file is computed anew
_OLDER_VERSION = b"ddpm-lmk-prints 1 "
_HEADER_BYTES = 256  # the rows after it stay aligned to 8 bytes when the file is mapped


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the frequencies used, from low to high; the mean is left out: it is brightness."""
    u, v = (axis.reshape(-1) for axis in np.mgrid[:_GRID, :_GRID])
    order = np.lexsort((u, u + v))[1 : 1 + _LOW + _DETAIL]
    # Dealt out in turn to three parts: the lowest frequencies say little (all chests look alike), and a part of the
    # hash made of them alone would let every image through as a candidate.
    dealt = np.argsort(np.arange(_LOW) % 3, kind="stable")
    order = np.concatenate([order[:_LOW][dealt], order[_LOW:]])
    return u[order], v[order]


_ROWS, _COLUMNS = _frequencies()


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """Five `<u8` that say how an image looks: 64 bits of low frequencies, then 256 bits of details.

    Signs, so brightness and contrast do not matter; the image is brought to 32 x 32 first, so its size does not either.
    """
    small = cv2.resize(pixels.astype(np.float32), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    return np.packbits(cv2.dct(small)[_ROWS, _COLUMNS] > 0, bitorder="little").view("<u8")


def fingerprint_of(pixels: np.ndarray, record: SampleRecord, size: int, aspect: str) -> np.ndarray:
    """The fingerprint `[1]` of a packed image; a padded one is hashed without its margin."""
    left, top, width, height = content_box(record.native_size, size, "pad" if aspect == "pad" else "squeeze")
    row = np.zeros(1, FINGERPRINT_DTYPE)
    shape = f"{pixels.shape}{pixels.dtype.str}".encode()
    row["pixels"] = np.frombuffer(hashlib.sha256(shape + pixels.tobytes()).digest()[:16], "<u8")
    hashed = perceptual_hash(pixels[top : top + height, left : left + width])
    row["low"], row["detail"] = hashed[0], hashed[1:]
    row["patient"] = _patient(record)
    return row


def _patient(record: SampleRecord) -> int:
    """Short ids ("0012") name a person inside their dataset only; long ones are taken to be unique everywhere.

    The last bit tells which, so that a comparison of two datasets can report which patients it could not compare.
    """
    patient = same_patient(record.group or "")
    if not patient:
        return 0
    is_scoped = len(patient) < _UNIQUE_ID
    scope = record.dataset if is_scoped else ""
    digest = hashlib.sha256(os.fsencode(f"{scope}\0{patient}")).digest()
    return (int.from_bytes(digest[:8], "little") | 1) ^ (0 if is_scoped else 1) or 2


def read_fingerprints(manifest: Manifest) -> np.ndarray:
    """The fingerprint of every row of a dataset: its file, mapped; computed where there is none (0.1 ms an image).

    Raises:
        DataError: the file is damaged or belongs to another dataset.
    """
    path = manifest.root / FILE_NAME
    if not _has_current_file(path):
        return _compute_all(manifest)
    check_fingerprints(manifest)
    return np.memmap(path, FINGERPRINT_DTYPE, "r", offset=_HEADER_BYTES, shape=(len(manifest),))


def check_fingerprints(manifest: Manifest) -> None:
    """Raise DataError unless the file of fingerprints is whole and of this dataset."""
    path = manifest.root / FILE_NAME
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; is the folder still there?") from error
    if header != _header(manifest.fingerprint, digest.hexdigest()):
        raise DataError(
            f"{path} is damaged or belongs to another dataset; delete it, and "
            f"`ddpm-lmk shards compare {manifest.root}` computes it again"
        )


def ensure_fingerprints(manifest: Manifest) -> None:
    """Write the fingerprints of a dataset that has none, where its folder may be written to."""
    if not _has_current_file(manifest.root / FILE_NAME) and os.access(manifest.root, os.W_OK):
        write_fingerprints(manifest)


def write_fingerprints(manifest: Manifest) -> Path:
    """Compute the fingerprints of a dataset and put them beside its manifest. Raises ResourceError."""
    path = manifest.root / FILE_NAME
    write_bytes(path, b"".join(prints_file(manifest.fingerprint, _compute_all(manifest).view(np.uint8).data)))
    return path


def prints_file(fingerprint: str, rows: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
    """Head and content of `prints.bin` of the dataset with this `fingerprint`, whose `rows` are `FINGERPRINT_DTYPE`."""
    return _header(fingerprint, hashlib.sha256(rows).hexdigest()), rows


def _has_current_file(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return not file.read(_HEADER_BYTES).startswith(_OLDER_VERSION)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # `check_fingerprints` reads it again, and reports what is wrong


def _header(fingerprint: str, digest: str) -> bytes:
    return f"{_VERSION} {fingerprint} {digest}\n".encode("ascii").ljust(_HEADER_BYTES)


def _compute_all(manifest: Manifest) -> np.ndarray:
    fingerprints = np.zeros(len(manifest), FINGERPRINT_DTYPE)
    for row in range(len(manifest)):
        try:
            pixels, record = manifest.decode(row), manifest.read_record(row)
            fingerprints[row] = fingerprint_of(pixels, record, manifest.stored_size, manifest.aspect)[0]
        except CorruptSampleError:
            continue  # stays empty; the loader reports and replaces such a sample when it is due
    return fingerprints
