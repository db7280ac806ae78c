"""Reads packed shards by offset: `Manifest` is the one door.

A folder of shards holds WebDataset tars (`KEY.npy|png|jpg` + `KEY.json`), `manifest.json` (what was packed and how,
with a digest per shard) and `index.npy` (one fixed-width row per sample, memory-mapped: ten million samples cost no
Python objects; see `index`). Order, sampling and augmentation belong to the loader.

The index of a pack: `index.npy`, a fixed-width row per sample, checked against the manifest, rebuilt from shards.

Opening reads the file once, in pieces: for its digest, and to count the samples of every shard and split. What stays is
a memory map and those counts, so that ten million samples open in about a second and cost no memory of the process'
own. Rows are in order of shards; `Manifest` is what everybody else uses.

Reads pieces of shards in a local folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.images.image import RefusedImageError
from ddpm_lmk.data.images.sandbox import decode_sandboxed
from ddpm_lmk.data.shards import signing
from ddpm_lmk.data.shards.records import (
    INDEX_DTYPE,
    Aspect,
    CorruptSampleError,
    Encoding,
    SampleRecord,
    index_row,
    record_from_json,
)
from ddpm_lmk.data.shards.remote import CacheSettings, Origin, RemoteShards, fetch_index, fetch_manifest, is_remote
from ddpm_lmk.data.shards.rows import Ints, SplitRows
from ddpm_lmk.data.shards.writer import FORMAT, FORMAT_VERSION, fingerprint_of
from ddpm_lmk.data.sources.walk import walk
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError
from ddpm_lmk.system.files import write_bytes

_MAX_OPEN = 256


class LocalShards:
    """The shards of a folder; safe from many threads. `RemoteShards` answers the same calls."""

    is_remote = False

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._handles: dict[int, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._handles)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on; fewer where it was cut off."""
        handle = self._handles.get(shard)
        if handle is not None:
            return os.pread(handle, size, offset)
        path = self.path(shard)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; is the folder still there?") from error
        keep = len(self._handles) < _MAX_OPEN
        try:
            return os.pread(handle, size, offset)
        finally:
            if not keep or self._handles.setdefault(shard, handle) != handle:
                os.close(handle)

    def read_origin(self, shard: int, offset: int, size: int) -> bytes | None:
        """The same bytes from where they come from, if `read` gives a copy; None: it does not."""
        return None

    def forget(self, shard: int) -> None:
        """Drop the copy of a shard, which is damaged."""

    def expect(self, shards: Iterable[int]) -> None:
        """These will be read soon; the kernel needs no telling."""

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._folder / self._shards[shard]["name"]

    def beside(self, name: str) -> Path | None:
        """A file beside the shards, where there is one."""
        path = self._folder / name
        return path if path.is_file() else None

    def names(self) -> set[str] | None:
        """What lies in the folder; None: that cannot be told."""
        return {path.name for path in self._folder.iterdir()}

    def close(self) -> None:
        """Close the files."""
        _close_all(self._handles)


def _close_all(handles: dict[int, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


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


_NPY_HEADER = 128
_LOOKED_AT = 10_000  # files of a folder that is not packed

Parsed = TypeVar("Parsed")


class Manifest:
    """A folder of shards, opened. Rows are in ascending order of sample id; reading is safe from many threads."""

    def __init__(self, root: Path, header: dict[str, Any], index: Index, source: LocalShards | RemoteShards) -> None:
        self.root = root
        self.dataset: str = header["dataset"]
        self.spec = DatasetSpec.model_validate(header["spec"])
        self.splits: tuple[str, ...] = tuple(header["splits"])
        self.encoding: Encoding = header["encoding"]
        self.bits: int = header["bits"]
        self.stored_size: int = header["stored_size"]
        self.aspect: Aspect = header["aspect"]
        self.settings: dict[str, Any] = header["settings"]
        self.shards: list[dict[str, Any]] = header["shards"]
        self.fingerprint: str = header["fingerprint"]
        self.refused_sha256: str | None = header.get("refused_sha256")  # None: packed before it was noted
        self.format_version: int = header["format_version"]
        self.index, self.starts, self.per_split = index.rows, index.starts, index.per_split
        self._source = source

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def open(cls, path: str | Path, cache: CacheSettings | None = None) -> Manifest:
        """Open a folder or URL written by `shards pack`; checks header, index and every shard's presence and size.

        Raises:
            DataError: not such a folder, written by a newer version, or a shard is missing or has another size.
            StoppedError: a server does not answer. ConfigError, LaunchError, ResourceError: see `remote`.
        """
        root, header, index, source = _open_remote(str(path), cache) if is_remote(path) else _open_local(Path(path))
        try:
            return cls(root, header, index, source)
        except (KeyError, TypeError, ValidationError) as error:
            raise DataError(f"{root / 'manifest.json'} is damaged ({type(error).__name__}); pack again") from error

    def rows(self, splits: Sequence[str], *, without: np.ndarray | None = None) -> SplitRows:
        """Index numbers of the samples of these splits, in order of id, but for the rows in `without`.

        Raises:
            DataError: a split does not exist here.
        """
        unknown = [name for name in splits if name not in self.splits]
        if unknown:
            raise DataError(f"{self.root} has no split {unknown[0]!r}; it has {', '.join(self.splits)}")
        codes = sorted({self.splits.index(name) for name in splits})
        return SplitRows(self.index, self.starts, self.per_split[:, codes].sum(1), codes, without)

    def count_per_split(self) -> dict[str, int]:
        """Samples of each split."""
        return dict(zip(self.splits, self.per_split.sum(0).tolist(), strict=True))

    def shard_of(self, rows: Any) -> np.ndarray:
        """The number of the shard each row lies in, the shape of `rows`."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read_bytes(self, row: int) -> bytes:
        """The encoded image of a row, exactly as packed.

        Raises:
            CorruptSampleError: the bytes changed.
        """
        entry = self.index[row]
        wanted = entry["sha256"].tobytes()

        def want_same(data: bytes) -> bytes:
            if hashlib.sha256(data).digest()[:16] != wanted:
                raise CorruptSampleError(f"row {row} of {self.root}: the image is not what was packed (sha256 differs)")
            return data

        return self._read(int(entry["shard"]), int(entry["offset"]), int(entry["size"]), want_same)

    def read_record(self, row: int) -> SampleRecord:
        """The labels and facts of a row.

        Raises:
            CorruptSampleError: the bytes changed.
        """
        entry = self.index[row]

        def parse(data: bytes) -> SampleRecord:
            return record_from_json(data, size=self.stored_size, aspect=self.aspect)

        return self._read(int(entry["shard"]), int(entry["json_offset"]), int(entry["json_size"]), parse)

    def decode(self, row: int) -> np.ndarray:
        """Pixels of a row, uint8 or uint16 `[H, W]`; read-only where they are stored raw."""
        return self.decode_bytes(self.read_bytes(row))

    def decode_bytes(self, data: bytes) -> np.ndarray:
        """Pixels of what `read_bytes` returned, uint8 or uint16 `[H, W]`.

        Raises:
            CorruptSampleError: they are not an image of the stored size and type.
        """
        dtype = np.dtype(np.uint8 if self.bits == 8 else "<u2")
        shape = (self.stored_size, self.stored_size)
        if self.encoding == "raw":
            # A .npy header is text; its shape and type are known here, so it is skipped, never interpreted.
            if len(data) != _NPY_HEADER + shape[0] * shape[1] * dtype.itemsize:
                raise CorruptSampleError(f"a raw image of {self.root} has {len(data)} bytes; pack again")
            return np.frombuffer(data, dtype, offset=_NPY_HEADER).reshape(shape)
        try:
            return decode_sandboxed(data, size=self.stored_size, bits=self.bits)
        except RefusedImageError as error:
            raise CorruptSampleError(f"an image of {self.root}: {error}; pack again") from error

    def close(self) -> None:
        """Close the shard files."""
        self._source.close()

    @property
    def is_remote(self) -> bool:
        """Do the shards come over a network?"""
        return self._source.is_remote

    def expect(self, shards: Iterable[int]) -> None:
        """Say which shards will be read soon."""
        self._source.expect(shards)

    def shard_path(self, shard: int) -> Path:
        """The file of a shard, or a copy of it on this disk."""
        return self._source.path(shard)

    def beside(self, name: str) -> Path | None:
        """A file beside the shards, or a copy of it; None where there is none."""
        return self._source.beside(name)

    def names(self) -> set[str] | None:
        """What lies where the pack is; None: a web server does not tell."""
        return self._source.names()

    def forget(self, shard: int) -> None:
        """Drop the copy of a shard, if it is one."""
        self._source.forget(shard)

    def _read(self, shard: int, offset: int, size: int, parse: Callable[[bytes], Parsed]) -> Parsed:
        """What `parse` makes of the bytes; those of a copy are fetched again before they count as corrupt."""
        try:
            return parse(self._source.read(shard, offset, size))
        except CorruptSampleError:
            again = self._source.read_origin(shard, offset, size)
            if again is None:
                raise
            parsed = parse(again)
            self._source.forget(shard)
            return parsed

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Manifest is not sent between processes; open the folder there")


def _open_local(root: Path) -> tuple[Path, dict[str, Any], Index, LocalShards]:
    header = read_header(root)
    index = open_index(root, header)
    for shard in header["shards"]:
        _check_shard_size(root, shard)
    return root, header, index, LocalShards(root, header["shards"])


def _open_remote(url: str, cache: CacheSettings | None) -> tuple[Path, dict[str, Any], Index, RemoteShards]:
    """The folder is the one in the cache that holds manifest, index and copies of shards."""
    origin, settings = Origin(url), cache or CacheSettings()
    root = fetch_manifest(origin, settings)
    header = read_header(root)
    index = fetch_index(origin, root, lambda: open_index(root, header))
    for shard in header["shards"]:
        _check_name(root, shard)
    source = RemoteShards(origin, header["shards"], root, settings)
    source.check()
    return root, header, index, source


def _instead(folder: Path) -> str:
    """What a folder without a manifest is, and what to do: pack it, or name the packs below it."""
    if not folder.is_dir():
        return "is not there (no manifest.json); give a folder written by `ddpm-lmk shards pack`"
    packs = sorted(str(path.parent) for path in folder.glob("*/manifest.json"))
    if packs:
        return f"has no manifest.json, but holds {len(packs)} packs; name one, or several: {', '.join(packs[:5])}"
    kind = "table" if (folder / "images.csv").is_file() else "folder"
    seen = islice(walk(folder, None, Counter()), _LOOKED_AT)
    if kind == "folder" and not any(os.path.splitext(name)[1].lower() in SUFFIXES for name in seen):  # noqa: PTH122
        return "has no manifest.json; give a folder written by `ddpm-lmk shards pack`"
    source, name = shlex.quote(str(folder)), shlex.quote(folder.resolve().name)
    command = f"ddpm-lmk shards pack {source} --kind {kind} --out shards/{name}"
    return f"has no manifest.json: its pictures are not packed yet; `{command}`"


def read_header(root: Path) -> dict[str, Any]:
    """The content of manifest.json, checked to be ours, of this version and unchanged.

    Raises:
        DataError: it is not. CheckpointError: it is not signed as it has to be.
    """
    path = root / "manifest.json"
    hint = "give a folder written by `ddpm-lmk shards pack`"
    if not path.is_file():
        raise DataError(f"{root} {_instead(root)}")
    try:
        content = path.read_bytes()
        signing.check(root, content)
        header = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); {hint}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of this tool; {hint}")
    if header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version")
        raise DataError(f"{path} has format version {version}, not {FORMAT_VERSION}; update the tool or pack again")
    if header.get("fingerprint") != fingerprint_of(header) or not isinstance(header.get("shards"), list):
        raise DataError(f"{path} was changed after packing (fingerprint differs); pack again")
    return header


def _check_name(root: Path, shard: dict[str, Any]) -> None:
    if Path(shard["name"]).name != shard["name"]:
        raise DataError(f"{root / 'manifest.json'} names a shard outside its folder; do not use it")


def _check_shard_size(root: Path, shard: dict[str, Any]) -> None:
    _check_name(root, shard)
    path = root / shard["name"]
    if not path.is_file():
        raise DataError(f"shard {path} is missing; restore it or pack again")
    size = path.stat().st_size
    if size != shard["size"]:
        raise DataError(f"shard {path} has {size} bytes, {shard['size']} wanted: cut off or changed; pack again")
