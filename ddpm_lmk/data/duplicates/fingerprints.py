"""The print of a film: what is needed to know it again after re-encoding, resizing or a change of its greys.

64 bytes a sample: a digest of the packed pixels (the same pixels), the signs of 64 low frequencies of a cosine
transform (looks alike: a perceptual hash), the signs of the next 256 (is the same film: two heads may look alike in 64
bits, but no two films share their details), and a digest of the patient's id. `prints.bin` lies beside the manifest and
is bound to it. Finding copies with them is `copies`'.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import CorruptSampleError, SampleRecord, content_box
from ddpm_lmk.data.sources.ids import same_patient
from ddpm_lmk.errors import DataError, ResourceError
from ddpm_lmk.system.files import flush

PRINT_DTYPE = np.dtype(
    [
        ("pixels", "<u8", (2,)),  # first half of the sha256 of shape, type and packed pixels; 0: cannot be read
        ("low", "<u8"),
        ("detail", "<u8", (4,)),
        ("patient", "<u8"),  # 0: unknown; odd: means somebody inside the dataset of this name only
    ]
)
FILE_NAME = "prints.bin"

_GRID = 32  # side of what is transformed; smaller films than this have no details to compare
_LOW, _DETAIL = 64, 256
_UNIQUE_ID = 6  # characters from which a patient's id means one person whatever the dataset; MIMIC-CXR's have 8
_VERSION = "ddpm-lmk-prints 2"
_OLDER = (b"ddpm-lmk-prints 1 ",)  # other rules for patients; whole, and made anew
_AT_ONCE = 4096
_HEADER_BYTES = 256


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the frequencies used, from low to high; the mean is left out.

    The low ones are dealt out to three parts of the hash: the lowest say little (all chests look alike), and a part
    made of them alone would find everything.
    """
    u, v = (axis.reshape(-1) for axis in np.mgrid[:_GRID, :_GRID])
    order = np.lexsort((u, u + v))[1 : 1 + _LOW + _DETAIL]
    dealt = np.argsort(np.arange(_LOW) % 3, kind="stable")
    order = np.concatenate([order[:_LOW][dealt], order[_LOW:]])
    return u[order], v[order]


_ROWS, _COLUMNS = _frequencies()


def look(pixels: np.ndarray) -> np.ndarray:
    """The looks of a film, five `<u8`: 64 bits of low frequencies, then 256 bits of details.

    Signs, so brightness and contrast do not matter; the film is brought to 32 x 32 first, so its size does not either.
    """
    small = cv2.resize(pixels.astype(np.float32), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    return np.packbits(cv2.dct(small)[_ROWS, _COLUMNS] > 0, bitorder="little").view("<u8")


def print_of(pixels: np.ndarray, record: SampleRecord, size: int, aspect: str) -> np.ndarray:
    """The print `[1]` of a packed picture; a padded one is compared without its margin."""
    left, top, width, height = content_box(record.native_size, size, "pad" if aspect == "pad" else "squeeze")
    row = np.zeros(1, PRINT_DTYPE)
    shape = f"{pixels.shape}{pixels.dtype.str}".encode()
    row["pixels"] = np.frombuffer(hashlib.sha256(shape + pixels.tobytes()).digest()[:16], "<u8")
    looks = look(pixels[top : top + height, left : left + width])
    row["low"], row["detail"] = looks[0], looks[1:]
    row["patient"] = _patient(record)
    return row


def _patient(record: SampleRecord) -> int:
    """Short ids ("0012") name a person inside their dataset only; long ones are taken to be unique everywhere.

    The last bit tells which, so that whoever compares two sets can say what was not compared.
    """
    patient = same_patient(record.group or "")
    if not patient:
        return 0
    is_scoped = len(patient) < _UNIQUE_ID
    scope = record.dataset if is_scoped else ""
    digest = hashlib.sha256(os.fsencode(f"{scope}\0{patient}")).digest()
    return (int.from_bytes(digest[:8], "little") | 1) ^ (0 if is_scoped else 1) or 2


def prints_of(manifest: Manifest) -> np.ndarray:
    """The prints of every row of a pack: from its file, mapped, or computed where it has none (a tenth of a ms each).

    Raises:
        DataError: the file is damaged or belongs to another pack.
    """
    path = manifest.root / FILE_NAME
    if not _is_here(path):
        return np.concatenate(list(_computed(manifest)))
    check_prints(manifest)
    return np.memmap(path, PRINT_DTYPE, "r", offset=_HEADER_BYTES, shape=(len(manifest),))


def _is_here(path: Path) -> bool:
    """Is there a file of prints, of this version?"""
    try:
        with open(path, "rb") as file:
            return not file.read(_HEADER_BYTES).startswith(_OLDER)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # whoever reads it says what is wrong


def check_prints(manifest: Manifest) -> None:
    """Raise DataError unless the file of prints is whole and of this pack."""
    path = manifest.root / FILE_NAME
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            found = file.read(_HEADER_BYTES)
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; is the folder still there?") from error
    if found != _header(manifest, digest.hexdigest()):
        raise DataError(
            f"{path} is damaged or belongs to another pack; delete it, and "
            f"`ddpm-lmk shards compare {manifest.root}` makes it anew"
        )


def keep_prints(manifest: Manifest) -> None:
    """Write the prints of a pack that has none, where its folder may be written; elsewhere they are made every time."""
    if not _is_here(manifest.root / FILE_NAME) and os.access(manifest.root, os.W_OK):
        write_prints(manifest)


def write_prints(manifest: Manifest) -> Path:
    """Compute the prints of a pack and put them beside its manifest, whole or not at all.

    Raises:
        ResourceError: the folder cannot be written.
    """
    path = manifest.root / FILE_NAME
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(bytes(_HEADER_BYTES))
                digest = hashlib.sha256()
                for block in _computed(manifest):
                    digest.update(block.tobytes())
                    file.write(block.tobytes())
                file.seek(0)
                file.write(_header(manifest, digest.hexdigest()))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; unlock or free the disk") from error
    return path


def _header(manifest: Manifest, digest: str) -> bytes:
    return f"{_VERSION} {manifest.fingerprint} {digest}\n".encode("ascii").ljust(_HEADER_BYTES)


def _computed(manifest: Manifest) -> Iterator[np.ndarray]:
    """Prints in blocks. A sample that cannot be read has an empty print: reading it is the loader's worry."""
    for start in range(0, len(manifest), _AT_ONCE):
        block = np.zeros(min(_AT_ONCE, len(manifest) - start), PRINT_DTYPE)
        for place in range(len(block)):
            try:
                pixels, record = manifest.decode(start + place), manifest.read_record(start + place)
                block[place] = print_of(pixels, record, manifest.stored_size, manifest.aspect)[0]
            except CorruptSampleError:
                continue
        yield block
