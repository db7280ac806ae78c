"""Reads packed shards by offset: `Manifest` is the one door.

A folder of shards holds WebDataset tars (`KEY.npy|png|jpg` + `KEY.json`), `manifest.json` (what was packed and how,
with a digest per shard) and `index.npy` (one fixed-width row per sample, memory-mapped: ten million samples cost no
Python objects; see `index`). Order, sampling and augmentation belong to the loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.data.images.decode import SUFFIXES, RefusedImageError
from ddpm_lmk.data.images.guarded import decode_guarded
from ddpm_lmk.data.shards import signing
from ddpm_lmk.data.shards.index import Index, open_index
from ddpm_lmk.data.shards.local import LocalShards
from ddpm_lmk.data.shards.origin import Origin
from ddpm_lmk.data.shards.records import Aspect, CorruptSampleError, Encoding, SampleRecord, record_from_json
from ddpm_lmk.data.shards.remote import CacheSettings, RemoteShards, fetch_index, fetch_manifest, is_remote
from ddpm_lmk.data.shards.rows import SplitRows
from ddpm_lmk.data.shards.writer import FORMAT, FORMAT_VERSION, fingerprint_of
from ddpm_lmk.data.sources.walk import walk
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError

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
            return decode_guarded(data, size=self.stored_size, bits=self.bits)
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
