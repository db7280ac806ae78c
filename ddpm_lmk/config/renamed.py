"""Keys of a run file that were renamed: their old names are read for one version.

One table serves run files, `key=value` words, the `set` of sweep files, and the settings stored in run directories,
checkpoints and snapshots. It also gives the hash by which a run directory of before knows its run again. When the next
version drops the old names, this file goes and so do its three uses (`grep renamed`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ddpm_lmk.errors import ConfigError

log = logging.getLogger(__name__)

RENAMED = {
    "data.cache_dir": "runtime.cache_dir",
    "data.cache_gib": "runtime.cache_gib",
    "data.copies": "data.dedup.duplicates",
    "data.leaks": "data.dedup.leakage",
    "data.loader": "runtime.loader",
    "data.packed": "data.require_dataset",
    "data.residency": "runtime.cache_pixels",
    "data.workers": "runtime.workers",
    "model.patch": "model.pixel_unshuffle",
    "train.checkpoint_every": "runtime.checkpoint_every",
    "train.compare_every": "runtime.compare_every",
    "train.group_size": "train.global_batch_size",
    "train.keep_checkpoints": "runtime.keep_checkpoints",
    "train.keep_every": "runtime.keep_every",
    "train.length": "train.duration",
    "train.log_every": "runtime.log_every",
    "train.standardise": "train.weight_standardization",
    "train.windows": "train.epoch_boundary",
}
_OLD_NAMES = {new: old for old, new in RENAMED.items()}
_warned: set[str] = set()


def under_new_names(data: Mapping[str, Any], found: dict[str, str] | None = None, source: str = "") -> dict[str, Any]:
    """The same settings with today's names; `found` collects old and new names that were met.

    Raises:
        ConfigError: a setting is given under both of its names.
    """
    return _moved(data, RENAMED, {} if found is None else found, source)


def under_old_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Complete settings as the version before wrote them, of which it made its hash."""
    renamed = _moved(data, _OLD_NAMES, {})
    renamed.pop("runtime", None)  # emptied: the version before had no such section
    renamed["data"].pop("dedup", None)
    return renamed


def moved_origins(origins: Mapping[tuple[str, ...], str], found: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Where the settings were written, by today's names."""
    moved = dict(origins)
    for old, new in found.items():
        old_path, new_path = tuple(old.split(".")), tuple(new.split("."))
        for path in [path for path in moved if path[: len(old_path)] == old_path]:
            moved[new_path + path[len(old_path) :]] = moved.pop(path)
    return moved


def warn_of(found: Mapping[str, str], source: str) -> None:
    """One warning for all old names of a run; a process that reads many runs does not repeat itself."""
    if not found.keys() - _warned:
        return
    _warned.update(found)
    names = ", ".join(f"{old} is now {new}" for old, new in found.items())
    log.warning("%s uses old names of settings: %s; the next version will not read them", source, names)


def _moved(
    data: Mapping[str, Any], table: Mapping[str, str], found: dict[str, str], source: str = ""
) -> dict[str, Any]:
    moved = _copied(data)
    for old, new in table.items():  # a key by its full path: `length` elsewhere is none of ours
        *path, key = old.split(".")
        section = _section_at(moved, path)
        if section is None or key not in section:
            continue
        *new_path, new_key = new.split(".")
        target = _section_at(moved, new_path, make=True)
        if target is None:  # something else stands where the section belongs: the schema will say so
            continue
        if new_key in target:
            place = f"{source}: " if source else ""
            raise ConfigError(f"{place}{old} is now {new}, and both are given; remove {old}")
        target[new_key] = section.pop(key)
        found[old] = new
    return moved


def _section_at(data: dict[str, Any], path: list[str], *, make: bool = False) -> dict[str, Any] | None:
    section: Any = data
    for name in path:
        if make and section.get(name) is None:  # `runtime:` with nothing behind it is an empty section
            section[name] = {}
        section = section.get(name)
        if not isinstance(section, dict):
            return None
    return section


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
