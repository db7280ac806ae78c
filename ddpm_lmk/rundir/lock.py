"""Locking a run directory: can it be written, is anybody working in it, does it hold this run or another one.

Rank 0 holds `.lock` while it works; a launcher of several processes holds `.lock-launcher` from before it starts them
until it ends, restarts included. So a second run is refused before it has started a process, and a rank that has
outlived its launcher still keeps others out.

A run is known again by its settings. Where its data and its starting weights lie is none of them: they are known by
what they hold (`PLACES`), so that a dataset on the scratch disk of the next job is the same dataset. Imports torch only
to look at weights that have moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_lmk.config import Duration, RunConfig, load
from ddpm_lmk.errors import DataError, LmkError, ResourceError, RunConflictError
from ddpm_lmk.rundir.log import now
from ddpm_lmk.system import environment, files, locks
from ddpm_lmk.system.files import DamagedError, read_json, read_no_follow

LOCK = ".lock"
LAUNCHER_LOCK = ".lock-launcher"
TEACHER = "teacher"  # in RUN: the directory of the run it learns from, and what that has found
PSEUDO_LABELS = "pseudo_labels.csv"
MAY_CHANGE = (
    "name",
    "train.snapshot_every",
)
# These too, while what lies there is the same.
PLACES = ("data.path", "data.propagate.path", "data.protect", "init.weights")


@contextmanager
def locked_for_launcher(path: Path, cfg: RunConfig, *, name: str, is_fork: bool = False) -> Iterator[None]:
    """Lock a directory for a launcher, after all that can be said against it has been said."""
    make_writable(path)
    # Its own lock first: two launchers that start at once cannot both find the run free.
    descriptor = take_lock(path, name)
    try:
        check_unlocked(path, LOCK)
        check_contents(path, cfg, is_fork=is_fork)
        yield
    finally:
        os.close(descriptor)


def make_writable(path: Path) -> None:
    """Create the directory, and try what saving needs: create, flush, rename, delete; raises `ResourceError`."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=files.folder_mode(), exist_ok=True)
        _try_saving(path)


def check_writable(path: Path) -> None:
    """Say now what `make_writable` would, and leave everything as it is: tried where the directory would be made."""
    with _explained(path):
        _try_saving(next(place for place in (path, *path.absolute().parents) if place.exists()))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_dir():
            raise ResourceError(f"{path} is a file; wanted a directory for the run")
        yield
    except OSError as error:
        raise ResourceError(f"cannot write to {path} ({error.strerror}); choose another --out directory") from None


def _try_saving(folder: Path) -> None:
    probe = folder / f".tmp-probe-{os.getpid()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, files.file_mode())
    try:
        os.write(descriptor, b"?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # A file system may let files be made and refuse to rename them: known now, and not at the first save.
    probe.rename(f"{probe}-renamed").unlink()


def take_lock(path: Path, name: str = LOCK, *, incarnation: str | None = None) -> int:
    """Lock the directory for as long as the returned descriptor is open; raises `RunConflictError`.

    `incarnation` is kept in the lock, so that a holder can see before it writes whether the directory is still its own.
    """
    if name == LOCK and not environment.is_rank():  # a rank has the lock of its launcher around it
        check_unlocked(path, LAUNCHER_LOCK)
    descriptor = _lock(path, name)
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "incarnation": incarnation}
    # After the lock is held: whoever fails to get it reads who has it.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    return descriptor


def check_unlocked(path: Path, *names: str) -> None:
    """Raise `RunConflictError` where another process holds one of these locks; by default either of them."""
    for name in names or (LAUNCHER_LOCK, LOCK):  # of the two processes of one run, the one to speak to
        # Locking makes the file; a folder that is only looked at stays as it is.
        if (path / name).exists():
            os.close(_lock(path, name))


def _lock(path: Path, name: str) -> int:
    try:
        descriptor = locks.lock(path / name)
    except OSError as error:
        raise ResourceError(
            f"the file system of {path} has no locks ({error.strerror}), so two runs could write there at once; "
            "mount it with locks (NFS: version 4, or without nolock), or choose another --out directory"
        ) from None
    if descriptor is None:
        holder = read_json(path / name) or {}
        raise RunConflictError(
            f"{path} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')} since "
            f"{holder.get('since', '?')}; wait for it, stop it, or use another --out directory"
        )
    return descriptor


def check_contents(path: Path, cfg: RunConfig, *, is_fork: bool = False) -> None:
    """Raise `RunConflictError` where the directory holds anything but this run or nothing.

    A fork begins with a checkpoint that it copies: killed after that, it finds nothing else.
    """
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    others = [name for name in names if not name.startswith((LOCK, ".tmp-"))]
    if not others or (is_fork and others == ["checkpoints"]):
        return
    if "config.yaml" not in others:
        raise RunConflictError(
            f"{path} exists and is not a run (it holds {', '.join(sorted(others)[:3])}); "
            "use an empty or new --out directory, nothing was changed"
        )
    if rows := conflicts(path, cfg):
        raise RunConflictError(
            f"{path} holds another run: {listed(rows)}; use another --out directory, or add --fork NEWDIR to go on "
            "from its newest checkpoint there"
        )


def conflicts(path: Path, cfg: RunConfig) -> list[tuple[str, object, object]]:
    """Rows (key, there, here) in which the run in `path` differs from `cfg` and may not.

    Raises:
        RunConflictError: this version cannot read it.
        DataError, CheckpointError: what it would now read its data or weights from is none.
    """
    try:
        stored = stored_config(path)
    except LmkError as error:
        raise RunConflictError(f"{path} holds a run this version cannot read ({error}); use another --out") from None
    assert stored is not None
    rows = [row for row in load.diff_runs(stored, cfg) if not _may_change(row[0], stored, cfg)]
    if any(key not in PLACES for key, *_ in rows):  # another run, wherever its data lies
        return rows
    # Reading fingerprints costs time: only where nothing else differs.
    return [row for row in rows if not _holds_the_same(row[0], path, cfg)]


def listed(rows: Sequence[tuple[str, object, object]]) -> str:
    """Differences as words."""
    return "; ".join(f"{key}: there {old!r}, here {new!r}" for key, old, new in rows)


def moved(stored: RunConfig, cfg: RunConfig) -> list[tuple[str, object, object]]:
    """Rows (key, was, now) of what lies elsewhere than before."""
    return [row for row in load.diff_runs(stored, cfg) if row[0] in PLACES]


def is_finished(path: Path, cfg: RunConfig) -> bool:
    """Has this very run finished in the directory, and are its results as they were written?"""
    done = read_json(path / "done.json")
    if done is None:
        return False
    try:
        digest = hashlib.sha256(read_no_follow(path / "results.json")).hexdigest()
    except DamagedError:
        return False
    return digest == done.get("results_sha256") and _is_of(path, done, cfg)


def _is_of(path: Path, done: dict[str, Any], cfg: RunConfig) -> bool:
    """Is it this run that `done` says has finished?"""
    if load.is_hash_of(done.get("config_hash"), cfg):
        return True
    try:
        stored = stored_config(path)
        if stored is None or not load.is_hash_of(done.get("config_hash"), stored):
            return False
        # A longer run is the same run, but it is not finished.
        return stored.train.duration == cfg.train.duration and not conflicts(path, cfg)
    except LmkError:
        return False


def check_same_data(path: Path, fingerprint: str, packs: Mapping[str, list[str]]) -> None:
    """Raise `DataError` where the run in `path` was started on other data.

    Args:
        fingerprint: of what it learns from.
        packs: fingerprints by the keys of `PLACES`; only what the run has noted is compared.
    """
    before = read_json(path / "run.json")
    if before is None:
        return
    noted = before.get("packs", {})
    rows = [("dataset", before.get("fingerprint"), fingerprint)]
    rows += [(f"dataset of {key}", ", ".join(noted[key]), ", ".join(packs[key])) for key in packs if key in noted]
    for name, was, now_at in rows:
        if was != now_at:
            raise DataError(
                f"{name} changed since {path} was started: was {was}, now {now_at}; restore it, or use another --out "
                "directory (a single run goes on there with --fork NEWDIR)"
            )


def check_same_weights(path: Path, cfg: RunConfig) -> None:
    """Raise `RunConflictError` where `init.weights` are not those that the run in `path` noted when it began.

    Raises:
        CheckpointError: they are none, or gone.
    """
    parent = (read_json(path / "run.json") or {}).get("parent")  # None in a fork, which began with a checkpoint
    if parent is not None and not _same_weights(parent, cfg):
        raise RunConflictError(
            f"{path} began with other weights than {cfg.init.weights} holds now; put those back, or run it again in "
            "another --out directory"
        )


def stored_config(path: Path) -> RunConfig | None:
    """The run file a directory was started with."""
    return load.load_stored(path) if (path / "config.yaml").is_file() else None


def _may_change(key: str, stored: RunConfig, cfg: RunConfig) -> bool:
    """May this key differ between a run and its continuation? Only where the weights come out the same."""
    if key == "train.duration":
        old, new = stored.train.duration, cfg.train.duration
        # Any other schedule has another rate at every step of a run of another length, and a longer run had other
        # teachers.
        return cfg.optim.schedule == "constant" and cfg.data.propagate is None and _is_longer(old, new)
    return key in MAY_CHANGE or key.startswith("runtime.")  # facts of the machine


def _holds_the_same(key: str, path: Path, cfg: RunConfig) -> bool:
    """Is what lies in the new place the same, by what the run noted when it began?"""
    facts = read_json(path / "run.json")
    if facts is None:  # stopped before it began
        return True
    if key == "init.weights":
        return _same_weights(facts.get("parent"), cfg)
    from ddpm_lmk.data.loading.corpus import fingerprints_of, joined

    data = cfg.data
    paths = {"data.path": data.path, "data.propagate.path": data.unlabelled_path, "data.protect": data.protect}
    found = fingerprints_of(cfg, paths[key])
    known = facts.get("packs", {}).get(key)
    if known is None and key == "data.path":  # begun by a version that noted one for all of them
        return facts.get("fingerprint") == joined(found)
    return known == found


def _same_weights(parent: dict[str, Any] | None, cfg: RunConfig) -> bool:
    """By the digests of the files beside the weights a run began with: those of a snapshot, or the file alone."""
    if parent is None or cfg.init.weights is None:
        return False
    from ddpm_lmk.rundir.checkpoint import weights_digest

    return weights_digest(cfg.init.weights, cfg.init.use) in (parent.get("files") or {}).values()


def _is_longer(old: Duration, new: Duration) -> bool:
    return old.unit == new.unit and new.count >= old.count
