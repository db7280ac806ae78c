"""Packs on a web server or in an object store: any URL that fsspec opens (http, s3, gs), read through a local cache.

Whole shards are fetched, once per machine, and read from the copies, as long as two shuffle windows of them fit into
the cache: the samples of a window are drawn from all its shards, so all of each will be needed. Otherwise single
samples are fetched by range. A byte that was damaged on the way, or on the local disk, is fetched again before a sample
counts as corrupt. What a server answers is for `origin`.

A folder behind a URL, by way of fsspec: http, s3, gs and whatever else it opens.

What fails for a while (drops, timeouts, 5xx) is an `OSError`, to be tried again; what will not come (4xx) is a
`DataError`. Credentials come from the environment, never from the URL.

Copies of remote shards on a local disk: bounded, least recently used first out, shared by all processes there.

A copy that exists is whole: it is written under another name and renamed. Who wants a shard that another process is
fetching waits for it. Readers open a copy for each read, so a dropped one frees its space at once.

Reading from a file system or a server that may fail for a while. That never makes a sample corrupt.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ddpm_lmk.config import DataConfig
from ddpm_lmk.data.shards import signing
from ddpm_lmk.errors import ConfigError, DataError, LaunchError, LmkError, ResourceError, StoppedError
from ddpm_lmk.system.locks import locked

RETRY_DELAYS_S = (0.2, 1.0, 3.0, 6.0)  # a network mount that is back within ten seconds costs nothing
GIVE_UP_S = 30.0  # clients of object stores try again too; at 60 s a launcher takes the rank for dead

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def with_retries(read: Callable[[Argument], Result], what: Argument) -> Result:
    """Call `read(what)`, again after a pause when the file system fails.

    Raises:
        StoppedError: it failed five times, or for half a minute.
    """
    began = time.monotonic()
    for number, delay in enumerate((*RETRY_DELAYS_S, None), start=1):
        try:
            return read(what)
        except (OSError, DataError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            if delay is None or time.monotonic() - began > GIVE_UP_S:
                raise StoppedError(
                    f"the data cannot be read ({cause.strerror or cause}) after {number} tries; "
                    "give the same command when the file system is back"
                ) from error
            log.warning("reading failed (%s), again in %g s", cause.strerror or cause, delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


_LOCKS = ".locks"
_UNFINISHED = ".unfinished-"
_TOUCH_EVERY_S = 10.0


class ShardCache:
    """The copies of one pack in `folder`; the limit holds for all packs beside it.

    Args:
        folder: made if it is not there; its parent is the cache.
        limit_bytes: of all shards in the cache together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self._limit = folder, limit_bytes
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        self._touched: dict[str, float] = {}

    def has(self, name: str, size: int) -> bool:
        """Is there a whole copy?"""
        try:
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def get(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The path of a copy, fetched if need be; `fetch` writes one to the path it is given.

        Raises:
            Whatever `fetch` raises; OSError if the disk refuses.
        """
        if not self.has(name, size):
            with locked(self.folder / _LOCKS / name, waits=True):
                if not self.has(name, size):
                    unfinished = self.folder / f"{_UNFINISHED}{size}-{name}"
                    self._make_room(size, unfinished)
                    fetch(unfinished)
                    unfinished.replace(self.folder / name)
        self._touch(name)
        return self.folder / name

    def drop(self, name: str) -> None:
        """Remove a copy."""
        (self.folder / name).unlink(missing_ok=True)

    def _touch(self, name: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:
            self._touched[name] = now
            try:
                os.utime(self.folder / name)
            except FileNotFoundError:
                del self._touched[name]  # dropped by another process; whoever reads it will see

    def _make_room(self, size: int, unfinished: Path) -> None:
        """Drop copies until one of `size` fits, and claim its place: `unfinished` counts from now on."""
        root = self.folder.parent
        with locked(root / ".lock", waits=True):
            # In this order, so that one that is being renamed is seen twice rather than never.
            used = size + sum(_claimed(path) for path in root.glob(f"*/{_UNFINISHED}*") if path != unfinished)
            copies = sorted(_stats(path for path in root.glob("*/*.tar") if not path.name.startswith(_UNFINISHED)))
            used += sum(length for _, length, _ in copies)
            for _, length, path in copies:
                if used <= self._limit:
                    break
                path.unlink(missing_ok=True)
                used -= length
            unfinished.touch()


def _claimed(unfinished: Path) -> int:
    """Bytes of a copy that is being fetched; one whose process died is removed."""
    size, _, name = unfinished.name.removeprefix(_UNFINISHED).partition("-")
    with locked(unfinished.parent / _LOCKS / name) as is_free:
        if not is_free:
            return int(size)
    unfinished.unlink(missing_ok=True)
    return 0


def _stats(paths: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, size and path of files that are still there."""
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        yield found.st_mtime_ns, found.st_size, path


CONNECT_S = 10.0
STALL_S = 10.0  # without a byte, after which a request counts as failed
_TRY_LATER = {408, 425, 429}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class Origin:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that must not be written down, LaunchError where a package is missing."""
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query:
            raise ConfigError(
                f"data.path has a URL of {parts.hostname} with a password or key in it, which would be written to the "
                "run directory; give credentials by the environment (for s3: AWS_*, for gs: "
                "GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_CONFIG_DIR)"
            )
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._system, self._path = url_to_fs(self.url, **_options(parts.scheme))
        except (ImportError, ValueError) as error:
            raise LaunchError(f"cannot open {self.url}: {error}; run `pip install 'ddpm-lmk[cloud]'`") from None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: a web server that does not tell, and never will."""
        with self._plain_errors(name):
            size = self._system.size(f"{self._path}/{name}")
        return None if size is None else int(size)

    def read(self, name: str) -> bytes:
        """A whole small file."""
        with self._plain_errors(name):
            return self._system.cat_file(f"{self._path}/{name}")

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """A piece of a file."""
        with self._plain_errors(name):
            data = self._system.cat_file(f"{self._path}/{name}", start=offset, end=offset + size)
        if len(data) > size:  # a server that does not know ranges sends everything
            data = data[offset : offset + size]
        if len(data) != size:
            raise OSError(errno.EIO, f"{self.url}/{name}: got {len(data)} of {size} bytes")
        return data

    def fetch(self, name: str, to: Path) -> None:
        """Copy a file."""
        with self._plain_errors(name):
            self._system.get_file(f"{self._path}/{name}", str(to))

    def names(self) -> set[str] | None:
        """What lies in the folder; None: web servers do not tell."""
        if self.url.startswith("http"):
            return None
        with self._plain_errors(""):
            self._system.invalidate_cache()  # as it is now, not as it was when somebody looked before
            return {path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._path, detail=False)}

    @contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        """What clients raise is of many kinds; here it is for now (OSError) or for good (LmkError)."""
        where = f"{self.url}/{name}"
        try:
            yield
        except LmkError:
            raise
        except Exception as error:
            status = _status(error)
            if getattr(error, "errno", None) in _NO_ROOM:
                raise ResourceError(
                    "the disk of the shard cache is full; free some space, or set data.cache_dir or data.cache_gib"
                ) from error
            is_refused = status is not None and 400 <= status < 500 and status not in _TRY_LATER
            if is_refused or isinstance(error, (FileNotFoundError, PermissionError)):
                reason = f"status {status}" if status else type(error).__name__
                # Not `from error`: an OSError as the cause would mean that trying again may help.
                raise DataError(f"{where} is not there or not for us ({reason}); check data.path and access") from None
            if type(error).__name__ == "NoCredentialsError":
                raise DataError(f"{where} wants credentials and the environment has none (for s3: AWS_*)") from None
            raise OSError(errno.EIO, f"{where}: {type(error).__name__} {error}".strip()) from error


def _status(error: Exception) -> int | None:
    """The status of HTTP that a client's error is about; gcsfs calls it `code`, and has only words for one."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return 403
    return int(status) if status.isdecimal() else None


def _options(scheme: str) -> dict[str, Any]:
    """Time limits of the clients that have some; those of s3 and gs try again by themselves, too."""
    if scheme in ("s3", "s3a"):
        limits = {"connect_timeout": CONNECT_S, "read_timeout": STALL_S}
        return {"config_kwargs": limits | {"retries": {"total_max_attempts": 1}}}
    if scheme in ("http", "https", "gs", "gcs"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        return {"requests_timeout": timeout} if scheme.startswith("g") else {"client_kwargs": {"timeout": timeout}}
    return {}


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
