"""Packs on a web server or in an object store: any URL that fsspec opens (http, s3, gs), read through a local cache.

Whole shards are fetched, once per machine, and read from the copies, as long as two shuffle windows of them fit into
the cache: the samples of a window are drawn from all its shards, so all of each will be needed. Otherwise single
samples are fetched by range. A byte that was damaged on the way, or on the local disk, is fetched again before a sample
counts as corrupt. What a server answers is for `origin`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.shards import signing
from ddpm_lmk.data.shards.origin import Origin
from ddpm_lmk.data.shards.retries import with_retries
from ddpm_lmk.data.shards.shard_cache import ShardCache
from ddpm_lmk.errors import DataError, LmkError, ResourceError

log = logging.getLogger(__name__)

_FETCHERS = 4  # shards fetched ahead at a time
_CHECKS = 16  # shards looked for at a time when a pack is opened

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class CacheSettings:
    """Where copies of remote shards are kept, how much of them, and how many shards are in use at a time."""

    folder: Path | None = None  # None: LMK_CACHE, or .cache/ddpm-lmk in the home directory
    limit_gib: float = 64.0
    window: int = 1

    @classmethod
    def of(cls, data: DataConfig) -> CacheSettings:
        """What a run file says."""
        folder = None if data.cache_dir is None else Path(data.cache_dir)
        return cls(folder, data.cache_gib, data.shuffle_window)

    @property
    def root(self) -> Path:
        """The folder."""
        return self.folder or Path(os.environ.get("LMK_CACHE") or Path.home() / ".cache" / "ddpm-lmk")


def is_remote(path: str | Path) -> bool:
    """Is this a URL?"""
    return "://" in str(path)


class RemoteShards:
    """The shards of a remote pack; safe from many threads. Answers the calls of `LocalShards`."""

    is_remote = True

    def __init__(self, origin: Origin, shards: Sequence[dict[str, Any]], folder: Path, settings: CacheSettings) -> None:
        self._origin, self._shards, self._folder = origin, shards, folder
        limit = int(settings.limit_gib * 2**30)
        self.is_whole = 2 * settings.window * max(shard["size"] for shard in shards) <= limit
        how = "whole shards are cached" if self.is_whole else "the cache is too small for two windows: read by range"
        log.info("%s: %s (%s, data.cache_gib=%g)", origin.url, how, folder, settings.limit_gib)
        self._cache = ShardCache(folder, limit)
        self._ahead = ThreadPoolExecutor(_FETCHERS, "fetch") if self.is_whole else None
        self._expected: set[int] = set()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on, tried again while the server fails. Raises StoppedError."""
        if not self.is_whole:
            return self._read_range((shard, offset, size))
        return with_retries(lambda place: self._read_copy(*place), (shard, offset, size))

    def read_origin(self, shard: int, offset: int, size: int) -> bytes | None:
        """The same bytes, fetched anew."""
        return self._read_range((shard, offset, size))

    def _read_range(self, place: tuple[int, int, int]) -> bytes:
        return with_retries(lambda place: self._origin.read_range(self._shards[place[0]]["name"], *place[1:]), place)

    def _read_copy(self, shard: int, offset: int, size: int) -> bytes:
        while True:
            try:
                handle = os.open(self._copy(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # dropped by another process between finding and opening it
            try:
                return os.pread(handle, size, offset)
            finally:
                os.close(handle)

    def forget(self, shard: int) -> None:
        """Drop the copy of a shard, which is damaged."""
        self._cache.drop(self._shards[shard]["name"])

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch these in the background, unless they are here."""
        if self._ahead is None:
            return
        for shard in shards:
            known = self._shards[shard]
            if shard not in self._expected and not self._cache.has(known["name"], known["size"]):
                self._expected.add(shard)
                self._ahead.submit(self._fetch_ahead, shard)

    def check(self) -> None:
        """Raise DataError unless every shard is there, in its size; only those without a copy are looked for.

        Where a server tells no sizes, what arrives is held against the manifest when it is fetched.
        """
        missing = [known for known in self._shards if not self._cache.has(known["name"], known["size"])]
        with ThreadPoolExecutor(_CHECKS) as pool:
            sizes = list(pool.map(lambda known: with_retries(self._origin.size, known["name"]), missing))
        for known, size in zip(missing, sizes, strict=True):
            self._want_size(known, size)

    def path(self, shard: int) -> Path:
        """The copy of a shard, fetched if need be; dropped when the cache needs room."""
        return with_retries(self._copy, shard)

    def beside(self, name: str) -> Path | None:
        """A copy of a file beside the shards, where there is one."""
        path = self._folder / name
        if not path.is_file():
            try:
                _write(path, with_retries(self._origin.read, name))
            except DataError:
                return None
        return path

    def names(self) -> set[str] | None:
        """What lies in the folder behind the URL; None: that cannot be told."""
        return with_retries(lambda origin: origin.names(), self._origin)

    def close(self) -> None:
        """Fetch nothing more ahead."""
        if self._ahead is not None:
            self._ahead.shutdown(wait=False, cancel_futures=True)

    def _copy(self, shard: int) -> Path:
        known = self._shards[shard]
        return self._cache.get(known["name"], known["size"], lambda path: self._fetch(known, path))

    def _fetch(self, known: dict[str, Any], path: Path) -> None:
        self._origin.fetch(known["name"], path)
        got = path.stat().st_size
        if got != known["size"]:
            self._want_size(known, self._origin.size(known["name"]))
            raise OSError(errno.EIO, f"{self._origin.url}/{known['name']}: got {got} of {known['size']} bytes")

    def _want_size(self, known: dict[str, Any], size: int | None) -> None:
        if size not in (None, known["size"]):
            raise DataError(
                f"shard {self._origin.url}/{known['name']} has {size} bytes, {known['size']} wanted: cut off or "
                "changed; pack again"
            )

    def _fetch_ahead(self, shard: int) -> None:
        try:
            self._copy(shard)
        except (OSError, LmkError) as error:
            log.info("reading ahead failed (%s); whoever needs the shard will try again", error)
        finally:
            self._expected.discard(shard)


def fetch_manifest(origin: Origin, settings: CacheSettings) -> Path:
    """Copy the manifest of a pack; returns the folder for this very pack in the cache."""
    content = with_retries(origin.read, "manifest.json")
    folder = settings.root / hashlib.sha256(content).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(folder / "manifest.json", content)
        if signing.is_wanted():
            _write(folder / signing.FILE_NAME, with_retries(origin.read, signing.FILE_NAME))
    except OSError as error:
        raise ResourceError(
            f"cannot write the shard cache {folder}: {error.strerror}; set data.cache_dir or LMK_CACHE"
        ) from error
    return folder


def fetch_index(origin: Origin, folder: Path, open_it: Callable[[], Opened]) -> Opened:
    """Copy the index and the prints of a pack, unless good copies are there, and open the index."""
    try:
        return open_it()
    except DataError:
        _write(folder / "index.npy", with_retries(origin.read, "index.npy"))
    try:
        _write(folder / "prints.bin", with_retries(origin.read, "prints.bin"))
    except DataError:
        log.info("%s has no prints.bin; a pool that needs prints computes them", origin.url)
    return open_it()


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
