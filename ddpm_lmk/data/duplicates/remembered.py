"""Keeps what is costly to find and follows from its inputs alone, in the cache of this machine, for the next process.

Comparing the films of a pool takes 2 s for 200,000 chests, but in a crowded pool the time grows with the square of
their number: ten million are compared once, not once per process and restart. Processes that want the same thing wait
for the first of them. What is damaged, or cannot be kept, is found again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import ResourceError
from ddpm_lmk.system import files

log = logging.getLogger(__name__)


def remembered(folder: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned for this `key` before, or returns now; both are plain JSON."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(folder / f"{name}.lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        log.info("%s cannot be written (%s): what is found is not kept", folder, error.strerror)
        return make()
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(path)
        if known is not None:
            return known
        made = make()
        try:
            files.write_json(path, {"digest": _digest(made), "content": made})
        except ResourceError as error:
            log.info("%s", error)
        return made


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_bytes())
        return kept["content"] if kept["digest"] == _digest(kept["content"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
