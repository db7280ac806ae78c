"""A folder behind a URL, by way of fsspec: http, s3, gs and whatever else it opens.

What fails for a while (drops, timeouts, 5xx) is an `OSError`, to be tried again; what will not come (4xx) is a
`DataError`. Credentials come from the environment, never from the URL.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddpm_lmk.errors import ConfigError, DataError, LaunchError, LmkError, ResourceError

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
