"""Reads packed shards by offset: `Manifest` is a folder or URL of shards, opened.

A folder of shards holds WebDataset tars (`KEY.npy|png|jpg` + `KEY.json`), `manifest.json` (what was packed and how,
with a digest per shard), `index.npy` (see `index`) and perhaps `manifest.sig`. Order, sampling and augmentation belong
to the loader. A dataset in place (`in_place`) has the records of its samples only, and `tars.txt`, which says where the
tars with their images lie.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shlex
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.images.image import RefusedImageError
from ddpm_lmk.data.images.sandbox import decode_sandboxed
from ddpm_lmk.data.shards.index import Index, SplitRows, open_index
from ddpm_lmk.data.shards.records import (
    FORMAT,
    FORMAT_VERSION,
    IN_PLACE_VERSION,
    Aspect,
    CorruptSampleError,
    SampleRecord,
    Stored,
    fingerprint_of,
    record_from_json,
)
from ddpm_lmk.data.shards.remote import (
    CacheSettings,
    Origin,
    RemoteShards,
    common_folder,
    fetch_index,
    fetch_manifest,
    folder_of_copies,
    is_remote,
)
from ddpm_lmk.data.sources.ids import secret_key
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import CheckpointError, DataError
from ddpm_lmk.system.files import write_text

SIGNATURE, SIGNING_KEY = "manifest.sig", "LMK_SIGNING_KEY"
TARS = "tars.txt"  # of a dataset in place: where its tars lie, a line for each shard; paths or URLs
_MAX_OPEN = 256  # shard files at a time; a process may usually open 1024
_NPY_HEADER = 128
_LOOKED_AT = 10_000

Parsed = TypeVar("Parsed")


def open_datasets(cfg: RunConfig) -> list[Manifest]:
    """The datasets of `data.path`, opened with the run's settings of the shard cache. Raises as `Manifest.open`."""
    return [Manifest.open(path, CacheSettings.of(cfg)) for path in cfg.data.path]


class Manifest:
    """A folder of shards, opened. Rows are in ascending order of sample id; reading is safe from many threads."""

    def __init__(
        self,
        root: Path,
        header: dict[str, Any],
        index: Index,
        files: LocalShards | RemoteShards,
        tars: LocalShards | RemoteShards | None = None,
    ) -> None:
        self.root, self.files = root, files
        self.tars = tars or files  # where the images are: those of others, or the shards
        self.dataset: str = header["dataset"]
        self.spec = DatasetSpec.model_validate(header["spec"])
        self.splits: tuple[str, ...] = tuple(header["splits"])
        self.encoding: Stored = header["encoding"]
        self.bits: int = header["bits"]
        self.stored_size: int = header["stored_size"]
        self.aspect: Aspect = header["aspect"]
        self.settings: dict[str, Any] = header["settings"]
        self.shards: list[dict[str, Any]] = header["shards"]
        self.fingerprint: str = header["fingerprint"]
        self.refused_sha256: str | None = header.get("refused_sha256")  # None: packed before it was noted
        self.format_version: int = header["format_version"]
        self.index, self.starts, self.per_split = index.rows, index.starts, index.per_split

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def open(cls, path: str | Path, cache: CacheSettings | None = None) -> Manifest:
        """Open a folder or URL written by `shards pack`; checks header, index and every shard's presence and size.

        Raises:
            DataError: not such a folder, written by a newer version, or a shard is missing or has another size.
            CheckpointError: not signed as `LMK_SIGNING_KEY` demands.
            StoppedError: a server does not answer. ConfigError, LaunchError, ResourceError: see `remote`.
        """
        files: LocalShards | RemoteShards
        settings = cache or CacheSettings()
        if is_remote(path):
            origin = Origin(str(path))
            # The folder in the cache that holds manifest, index and copies of shards.
            root = fetch_manifest(origin, settings, beside=[SIGNATURE] if os.environ.get(SIGNING_KEY) else [])
            header = read_header(root)
            if _is_in_place(header):  # it could name any file of this machine
                raise DataError(f"{path} is a dataset in place, whose folder is small; copy it here and name the copy")
            index = fetch_index(origin, root, lambda: open_index(root, header))
            files = RemoteShards(origin, header["shards"], root, settings)
        else:
            root = Path(path)
            header = read_header(root)
            index = open_index(root, header)
            files = LocalShards(root, header["shards"])
        files.check()
        tars = _open_tars(root, header, settings) if _is_in_place(header) else None
        try:
            return cls(root, header, index, files, tars)
        except (KeyError, TypeError, ValidationError) as error:  # its fingerprint fits, so somebody wrote it by hand
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
        """The encoded image of a row, exactly as packed; CorruptSampleError where the bytes changed."""
        entry = self.index[row]
        packed = entry["sha256"].tobytes()

        def check(data: bytes) -> bytes:
            if hashlib.sha256(data).digest()[:16] != packed:
                raise CorruptSampleError(f"row {row} of {self.root}: the image is not what was packed (sha256 differs)")
            return data

        return self._read(self.tars, int(entry["shard"]), int(entry["offset"]), int(entry["size"]), check)

    def read_record(self, row: int) -> SampleRecord:
        """The labels and facts of a row; CorruptSampleError where the bytes changed."""
        entry = self.index[row]

        def parse(data: bytes) -> SampleRecord:
            return record_from_json(data, size=self.stored_size, aspect=self.aspect)

        return self._read(self.files, int(entry["shard"]), int(entry["json_offset"]), int(entry["json_size"]), parse)

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
            settings = self.settings if self.encoding == "in_place" else None
            return decode_sandboxed(data, size=self.stored_size, bits=self.bits, settings=settings)
        except RefusedImageError as error:
            raise CorruptSampleError(f"an image of {self.root}: {error}; pack again") from error

    @property
    def is_remote(self) -> bool:
        """Do the images come over a network?"""
        return self.tars.is_remote

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch shards that will be read soon."""
        self.tars.expect(shards)

    def beside(self, name: str) -> Path | None:
        """A file beside the shards, or a copy of it; None where there is none."""
        return self.files.beside(name)

    def close(self) -> None:
        """Close the shard files."""
        self.files.close()
        self.tars.close()

    def _read(
        self,
        files: LocalShards | RemoteShards,
        shard: int,
        offset: int,
        size: int,
        parse: Callable[[bytes], Parsed],
    ) -> Parsed:
        """What `parse` makes of the bytes; those of a copy are fetched again before they count as corrupt."""
        try:
            return parse(files.read(shard, offset, size))
        except CorruptSampleError:  # of a copy that a disk or a network damaged: the sample itself may be good
            fetched = files.read_origin(shard, offset, size)
            if fetched is None:
                raise
            parsed = parse(fetched)
            files.forget(shard)
            return parsed

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Manifest is not sent between processes; open the folder there")


def _is_in_place(header: dict[str, Any]) -> bool:
    return header["format_version"] == IN_PLACE_VERSION


def _open_tars(root: Path, header: dict[str, Any], cache: CacheSettings) -> LocalShards | RemoteShards:
    """The tars of others that hold the images of a dataset in place, as `tars.txt` says."""
    try:
        places = (root / TARS).read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {root / TARS}: {error.strerror}; index the tars again") from error
    shards = header["shards"]
    if len(places) != len(shards) or not all(places):
        raise DataError(f"{root / TARS} names {len(places)} tars, {len(shards)} wanted; write a line for each")
    base = common_folder(places)
    known = [
        {"name": shard["name"], "path": place.removeprefix(base), "size": shard["tar"]["size"]}
        for shard, place in zip(shards, places, strict=True)
    ]
    remedy = f"correct its line in {root / TARS} if it was moved, or index the tars again"
    tars: LocalShards | RemoteShards
    if is_remote(base):
        folder = folder_of_copies(cache, header["fingerprint"])
        tars = RemoteShards(Origin(base), known, folder, cache, remedy)
    else:
        tars = LocalShards(root / base, known, remedy)
    tars.check()
    return tars


class LocalShards:
    """The shards of a folder; safe from many threads. `RemoteShards` answers the same calls.

    Args:
        shards: name and size of each, and its `path` below `folder` where that is another.
        remedy: what to do about one that is not as it was.
    """

    is_remote = False

    def __init__(
        self, folder: Path, shards: Sequence[dict[str, Any]], remedy: str = "restore it or pack again"
    ) -> None:
        self._folder, self._shards, self._remedy = folder, shards, remedy
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
        is_room = len(self._handles) < _MAX_OPEN
        try:
            return os.pread(handle, size, offset)
        finally:
            # Another thread may have opened the same shard meanwhile: setdefault says whose handle stays.
            if not is_room or self._handles.setdefault(shard, handle) != handle:
                os.close(handle)

    def read_origin(self, shard: int, offset: int, size: int) -> bytes | None:
        """The same bytes from where they come from, if `read` gives a copy; None: it does not."""
        return None

    def forget(self, shard: int) -> None:
        """Drop the copy of a shard, which is damaged."""

    def expect(self, shards: Iterable[int]) -> None:
        """These will be read soon."""

    def check(self) -> None:
        """Raise DataError unless every shard is there, in its size."""
        for number, shard in enumerate(self._shards):
            path = self.path(number)
            if not path.is_file():
                raise DataError(f"shard {path} is missing; {self._remedy}")
            size, packed = path.stat().st_size, shard["size"]
            if size != packed:
                raise DataError(f"shard {path} has {size} bytes, {packed} wanted: cut off or changed; {self._remedy}")

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        known = self._shards[shard]
        return self._folder / known.get("path", known["name"])

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
        _check_signature(root, content)  # first: nothing of a foreign manifest is parsed where signatures are wanted
        header = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); {hint}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of this tool; {hint}")
    if (version := header.get("format_version")) not in (FORMAT_VERSION, IN_PLACE_VERSION):
        raise DataError(f"{path} has format version {version}, not {FORMAT_VERSION}; update the tool or pack again")
    if header.get("fingerprint") != fingerprint_of(header) or not isinstance(header.get("shards"), list):
        raise DataError(f"{path} was changed after packing (fingerprint differs); pack again")
    if any(Path(shard["name"]).name != shard["name"] for shard in header["shards"]):
        raise DataError(f"{path} names a shard outside its folder; do not use it")
    return header


def _instead(folder: Path) -> str:
    """What a folder without a manifest is, and what to do: pack it, or name the datasets below it."""
    if not folder.is_dir():
        return "is not there (no manifest.json); give a folder written by `ddpm-lmk shards pack`"
    packed = sorted(str(path.parent) for path in folder.glob("*/manifest.json"))
    if packed:
        return (
            f"has no manifest.json, but holds {len(packed)} packed sets; name one, or several: {', '.join(packed[:5])}"
        )
    kind = "table" if (folder / "images.csv").is_file() else "folder"
    paths = islice(folder.rglob("*"), _LOOKED_AT)  # a hint is not worth a walk through a million files
    if kind == "folder" and not any(path.suffix.lower() in SUFFIXES for path in paths):
        return "has no manifest.json; give a folder written by `ddpm-lmk shards pack`"
    source, name = shlex.quote(str(folder)), shlex.quote(folder.resolve().name)
    command = f"ddpm-lmk shards pack {source} --kind {kind} --out shards/{name}"
    return f"has no manifest.json: its pictures are not packed yet; `{command}`"


def sign(root: Path, key_file: Path) -> Path:
    """Write `manifest.sig`, an HMAC-SHA256 of the manifest; the key file is made where there is none.

    The manifest holds the digests of the index and of every shard, so a signature covers them all. A digest alone finds
    damage, not malice: who changes a shard can write a manifest that fits.

    Raises:
        ConfigError, ResourceError: see `ids.secret_key`; the folder cannot be written.
    """
    content = (root / "manifest.json").read_bytes()  # bytes, not fields: nothing is parsed before it is checked
    write_text(root / SIGNATURE, _signature(content, secret_key(key_file)) + "\n")
    return root / SIGNATURE


def _check_signature(root: Path, content: bytes) -> None:
    """Raise CheckpointError where a signature is wanted and `content` (of manifest.json) has another, or none."""
    key_file = os.environ.get(SIGNING_KEY)
    if not key_file:
        return
    path = root / SIGNATURE
    remedy = f"use sets from those who hold the key, or unset {SIGNING_KEY}"
    if not Path(key_file).is_file():  # `secret_key` would make one, and no set would be signed with it
        raise CheckpointError(f"{SIGNING_KEY} names {key_file}, which is no file; shards cannot be checked")
    if not path.is_file():
        raise CheckpointError(f"{root} is not signed, but {SIGNING_KEY} is set; {remedy}")
    signature = _signature(content, secret_key(Path(key_file)))
    if not hmac.compare_digest(path.read_bytes().strip(), signature.encode("ascii")):
        raise CheckpointError(f"{root} was not signed with your key, or changed since; {remedy}")


def _signature(content: bytes, key: bytes) -> str:
    return hmac.new(key, b"ddpm-lmk pack\0" + content, hashlib.sha256).hexdigest()
