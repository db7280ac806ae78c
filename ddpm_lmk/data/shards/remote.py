"""Shards behind a URL that fsspec opens (http, s3, gs): retries, a cache of whole shards on the local disk, ranges.

Whole shards are fetched, once per machine, as long as two shuffle windows of them fit into the cache: the samples of a
window are drawn from all its shards, so all of each will be needed. Otherwise single samples are fetched by range.
What fails for a while (drops, timeouts, 5xx) is an `OSError`, which is tried again and never makes a sample corrupt;
what will not come (4xx) is a `DataError`. Credentials come from the environment, never from the URL.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError, DataError, LaunchError, LmkError, ResourceError, StoppedError
from ddpm_lmk.system.files import write_bytes
from ddpm_lmk.system.locks import locked

RETRY_DELAYS_S = (0.2, 1.0, 3.0, 6.0)  # a network mount that is back within ten seconds costs nothing
GIVE_UP_S = 30.0  # clients of object stores try again too; at 60 s a launcher takes the rank for dead
CONNECT_S = 10.0
STALL_S = 10.0  # without a byte, after which a request counts as failed
_TRY_LATER = {408, 425, 429}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_FETCHERS = 4  # shards fetched ahead at a time
_CHECKS = 16  # shards looked for at a time when a dataset is opened
_LOCKS = ".locks"
_UNFINISHED = ".unfinished-"
_TOUCH_EVERY_S = 10.0

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def with_retries(read: Callable[Arguments, Result], *what: Arguments.args, **how: Arguments.kwargs) -> Result:
    """Call `read(*what)`, again after a pause when the file system or the server fails.

    Raises:
        StoppedError: it failed five times, or for half a minute.
    """
    began = time.monotonic()
    for number, delay in enumerate((*RETRY_DELAYS_S, None), start=1):
        try:
            return read(*what, **how)
        except (OSError, DataError) as error:
            # A DataError that an OSError caused is a shard that could not be opened; all others are final.
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


@dataclass(frozen=True)
class CacheSettings:
    """Where copies of remote shards are kept, how much of them, and how many shards are in use at a time."""

    folder: Path | None = None  # None: LMK_CACHE, or .cache/ddpm-lmk in the home directory
    limit_gib: float = 64.0
    window: int = 1

    @classmethod
    def of(cls, cfg: RunConfig) -> CacheSettings:
        """What a run file says."""
        folder = None if cfg.runtime.cache_dir is None else Path(cfg.runtime.cache_dir)
        return cls(folder, cfg.runtime.cache_gib, cfg.data.shuffle_window)

    @property
    def root(self) -> Path:
        """The folder."""
        return self.folder or Path(os.environ.get("LMK_CACHE") or Path.home() / ".cache" / "ddpm-lmk")


def is_remote(path: str | Path) -> bool:
    """Is this a URL?"""
    return "://" in str(path)


class ShardCache:
    """Copies of the shards of one dataset in `folder`, shared by all processes of a machine.

    A copy that exists is whole: it is written under another name and renamed. Readers open a copy for each read, so one
    that is dropped frees its space at once.

    Args:
        folder: made if it is not there; its parent is the cache of all datasets.
        limit_bytes: of all shards in that parent together; least recently used first out.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self._limit = folder, limit_bytes
        self._touched: dict[str, float] = {}  # by this process
        (folder / _LOCKS).mkdir(parents=True, exist_ok=True)

    def has(self, name: str, size: int) -> bool:
        """Is there a whole copy?"""
        stat = _stat(self.folder / name)
        return stat is not None and stat.st_size == size

    def get(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The path of a copy, fetched if need be; `fetch` writes one to the path it is given.

        Raises:
            Whatever `fetch` raises; OSError if the disk refuses.
        """
        copy = self.folder / name
        if not self.has(name, size):
            with locked(self.folder / _LOCKS / name, waits=True):  # whoever wants the same shard waits for it
                if not self.has(name, size):
                    unfinished = self.folder / f"{_UNFINISHED}{size}-{name}"
                    self._make_room(size, unfinished)
                    fetch(unfinished)
                    unfinished.replace(copy)
        now = time.monotonic()  # not the time of the file: clocks of a file server and of this machine differ
        if now - self._touched.get(name, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:  # seldom: a cache may lie on NFS
            self._touched[name] = now
            with contextlib.suppress(FileNotFoundError):  # dropped by another process; whoever reads it will notice
                os.utime(copy)
        return copy

    def drop(self, name: str) -> None:
        """Remove a copy."""
        (self.folder / name).unlink(missing_ok=True)

    def _make_room(self, size: int, unfinished: Path) -> None:
        """Drop copies until one of `size` fits, and reserve its place: `unfinished` counts from now on.

        Those that others are fetching stay: where more are under way than fit, all would be fetched again and again.
        """
        root = self.folder.parent
        with locked(root / ".lock", waits=True):
            # In this order, so that one that is being renamed counts twice rather than never.
            excess = size - self._limit
            excess += sum(_reserved(path) for path in root.glob(f"*/{_UNFINISHED}*") if path != unfinished)
            whole = [path for path in root.glob("*/*.tar") if not path.name.startswith(_UNFINISHED)]
            copies = sorted((stat.st_mtime_ns, stat.st_size, path) for path in whole if (stat := _stat(path)))
            excess += sum(length for _, length, _ in copies)
            for _, length, path in copies:
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= length
            unfinished.touch()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _reserved(unfinished: Path) -> int:
    """Bytes that a copy will have which is being fetched. What a killed process left is removed: its lock is free."""
    size, _, name = unfinished.name.removeprefix(_UNFINISHED).partition("-")
    with locked(unfinished.parent / _LOCKS / name) as is_left:
        if is_left:
            unfinished.unlink(missing_ok=True)
    return 0 if is_left else int(size)


def refuse_secrets(url: str) -> None:
    """Raise ConfigError for a URL that must not be written down."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            f"data.path has a URL of {parts.hostname} with a password or key in it, which would be written to the "
            "run directory; give credentials by the environment (for s3: AWS_*, for gs: "
            "GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_CONFIG_DIR)"
        )


class Origin:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that must not be written down, LaunchError where a package is missing."""
        refuse_secrets(url)
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self._system, self._path = url_to_fs(self.url, **_options(urlsplit(url).scheme))
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
        except Exception as error:
            status = _status(error)
            if getattr(error, "errno", None) in _NO_ROOM:
                raise ResourceError(
                    "the disk of the shard cache is full; free some space, or set runtime.cache_dir or cache_gib"
                ) from error
            is_refused = status is not None and 400 <= status < 500 and status not in _TRY_LATER
            if is_refused or isinstance(error, (FileNotFoundError, PermissionError)):
                reason = f"status {status}" if status else type(error).__name__
                # Not `from error`: an OSError as the cause would mean that trying again may help.
                raise DataError(f"{where} is not there or not for us ({reason}); check data.path and access") from None
            if type(error).__name__ == "NoCredentialsError":  # of botocore, which need not be installed
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


class RemoteShards:
    """The shards of a remote dataset; safe from many threads. Answers the calls of `LocalShards`, from copies."""

    is_remote = True

    def __init__(
        self,
        origin: Origin,
        shards: Sequence[dict[str, Any]],
        folder: Path,
        settings: CacheSettings,
        remedy: str = "pack again",
    ) -> None:
        """As `LocalShards`; `folder` is that of the copies."""
        self._origin, self._shards, self._folder, self._remedy = origin, shards, folder, remedy
        limit = int(settings.limit_gib * 2**30)
        # Two windows: the loader has the next one fetched while it draws from the present one.
        is_whole = 2 * settings.window * max(shard["size"] for shard in shards) <= limit
        how = "whole shards are cached" if is_whole else "the cache is too small for two windows: read by range"
        log.info("%s: %s (%s, runtime.cache_gib=%g)", origin.url, how, folder, settings.limit_gib)
        self._cache = ShardCache(folder, limit)
        self._ahead = ThreadPoolExecutor(_FETCHERS, "fetch") if is_whole else None  # None: by range
        self._expected: set[int] = set()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on, tried again while the server fails. Raises StoppedError."""
        if self._ahead is None:
            return self.read_origin(shard, offset, size)
        return with_retries(self._read_copy, shard, offset, size)

    def read_origin(self, shard: int, offset: int, size: int) -> bytes:
        return with_retries(self._origin.read_range, _path(self._shards[shard]), offset, size)

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
        self._cache.drop(self._shards[shard]["name"])

    def expect(self, shards: Iterable[int]) -> None:
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
            sizes = list(pool.map(lambda known: with_retries(self._origin.size, _path(known)), missing))
        for known, size in zip(missing, sizes, strict=True):
            self._require_size(known, size)

    def path(self, shard: int) -> Path:
        return with_retries(self._copy, shard)

    def beside(self, name: str) -> Path | None:
        path = self._folder / name
        if not path.is_file():
            try:
                write_bytes(path, with_retries(self._origin.read, name))
            except DataError:
                return None
        return path

    def names(self) -> set[str] | None:
        return with_retries(self._origin.names)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.shutdown(wait=False, cancel_futures=True)

    def _copy(self, shard: int) -> Path:
        known = self._shards[shard]
        return self._cache.get(known["name"], known["size"], lambda path: self._fetch(known, path))

    def _fetch(self, known: dict[str, Any], path: Path) -> None:
        self._origin.fetch(_path(known), path)
        length = path.stat().st_size
        if length != known["size"]:
            self._require_size(known, self._origin.size(_path(known)))  # else it was cut off on the way: try again
            raise OSError(errno.EIO, f"{self._origin.url}/{_path(known)}: got {length} of {known['size']} bytes")

    def _require_size(self, known: dict[str, Any], size: int | None) -> None:
        if size not in (None, known["size"]):
            raise DataError(
                f"shard {self._origin.url}/{_path(known)} has {size} bytes, {known['size']} wanted: cut off or "
                f"changed; {self._remedy}"
            )

    def _fetch_ahead(self, shard: int) -> None:
        try:
            self._copy(shard)
        except (OSError, LmkError) as error:
            log.info("reading ahead failed (%s); whoever needs the shard will try again", error)
        finally:
            self._expected.discard(shard)


def _path(shard: dict[str, Any]) -> str:
    """Where a shard lies below its origin; copies go by its name."""
    return shard.get("path", shard["name"])


def common_folder(places: Sequence[str]) -> str:
    """The folder, with its last `/`, that paths or URLs of tars have in common; empty where paths are relative.

    Raises:
        ConfigError: some of them are of this machine or of another server than others.
    """
    levels = zip(*(place.split("/")[:-1] for place in places))
    folder = "".join(f"{names[0]}/" for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    if any(map(is_remote, places)) and (not is_remote(folder) or folder.endswith("://")):
        raise ConfigError(
            f"tars of one server, or of this machine, make a dataset, but {places[0]} and {places[-1]} are named; "
            "index them as several, and give all to data.path"
        )
    return folder


def fetch_manifest(origin: Origin, settings: CacheSettings, *, beside: Sequence[str]) -> Path:
    """Copy the manifest of a dataset and the files `beside` it; returns the folder for this very manifest in the cache.

    Its name is a digest of the manifest, so that a dataset that was packed again has a folder of its own.
    """
    content = with_retries(origin.read, "manifest.json")
    folder = folder_of_copies(settings, hashlib.sha256(content).hexdigest())
    write_bytes(folder / "manifest.json", content)
    for name in beside:
        write_bytes(folder / name, with_retries(origin.read, name))
    return folder


def folder_of_copies(settings: CacheSettings, digest: str) -> Path:
    """The folder in the cache for a dataset with this digest, for its owner only. Raises ResourceError."""
    folder = settings.root / digest[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ResourceError(
            f"cannot write the shard cache {folder} ({error}); set runtime.cache_dir or LMK_CACHE"
        ) from error
    return folder


def fetch_index(origin: Origin, folder: Path, open_it: Callable[[], Result]) -> Result:
    """Copy the index and the fingerprints of a dataset, unless good copies are there, and open the index."""
    try:
        return open_it()
    except DataError:
        write_bytes(folder / "index.npy", with_retries(origin.read, "index.npy"))
    try:
        write_bytes(folder / "prints.bin", with_retries(origin.read, "prints.bin"))
    except DataError:
        log.info("%s has no prints.bin; a pool that needs fingerprints computes them", origin.url)
    return open_it()
