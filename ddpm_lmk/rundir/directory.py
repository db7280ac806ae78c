"""A run directory: one process may work in it, and everything a run writes goes through here.

`RUN/.lock config.yaml run.json events.jsonl metrics.jsonl quarantine.jsonl checkpoints/ snapshots/ results.json
done.json`, and `teacher/ pseudo_labels.csv` of a run that learns from another. A directory is resumed when it holds the
same run; another run is refused with a key-by-key diff. An object of this class on another rank than 0 has the same
path and writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ddpm_lmk.config import RunConfig, load
from ddpm_lmk.errors import CheckpointError, ResourceError, RunConflictError
from ddpm_lmk.rundir import checkpoint, lock, retention
from ddpm_lmk.rundir.checkpoint import Checkpoint, Tensors, load_checkpoint
from ddpm_lmk.rundir.log import RunLog, now
from ddpm_lmk.rundir.retention import Keep
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json

MOST_FAILED_SAVES = 3


class RunDir:
    """The directory of one run, held by this process for as long as the `with` block lasts.

    Attributes:
        incarnation: names this session in its lock and its checkpoints.
        source: step of the checkpoint this session resumed from.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        """Use `lock` instead, except for a rank that only reads."""
        self.path = path
        self.writes = writes
        self.log = RunLog(path, writes=writes)
        self.event, self.metrics = self.log.event, self.log.metrics
        self.incarnation = uuid.uuid4().hex[:8]
        self.source: int | None = None
        self._lock: int | None = None
        self._config_hash: str | None = None
        self._failed_saves = 0

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @classmethod
    def lock(cls, path: Path, cfg: RunConfig, *, is_fork: bool = False) -> RunDir:
        """Take the directory for this run, new or resumed; nothing but the lock is written yet.

        Raises:
            ResourceError: it cannot be written.
            RunConflictError: it is in use, holds something else, or another run.
        """
        lock.make_writable(path)
        run = cls(path, writes=True)
        run._lock = lock.take_lock(path, incarnation=run.incarnation)
        try:
            lock.check_contents(path, cfg, is_fork=is_fork)
        except BaseException:
            run.__exit__()
            raise
        # Under the lock: what is half done here is of a process that is dead.
        for folder in (path, path / "checkpoints", path / "snapshots"):
            retention.clean(folder)
        return run

    def claim(self, cfg: RunConfig) -> None:
        """Write which run this is, where there will be nothing of it for long but its teacher."""
        if not (self.path / "config.yaml").exists():
            files.write_text(self.path / "config.yaml", load.dump_run(cfg))

    def begin(self, cfg: RunConfig, facts: dict[str, Any]) -> None:
        """Write what this run is: its run file and `run.json` with `facts` (fingerprint, versions, hardware, parent).

        Raises:
            DataError: the run was started on other data.
        """
        before, stored = self.facts(), lock.stored_config(self.path)
        # Before anything is written: a refused run leaves the directory as it was.
        lock.check_same_data(self.path, facts["fingerprint"], facts.get("packs", {}))
        self._config_hash = load.config_hash(cfg)
        files.write_text(self.path / "config.yaml", load.dump_run(cfg))
        # What a run is stays what it was when it began, but for the devices it has come to, and what they allow.
        weaker = {key: facts[key] for key in ("exactness", "devices") if key in facts}
        self._write_facts((before or facts) | weaker)
        self.event("run.continued" if before else "run.started", config=self._config_hash)
        for key, was, now_at in lock.moved(stored, cfg) if before and stored is not None else ():
            self.event("run.moved", key=key, was=was, now=now_at)

    def note(self, **facts: Any) -> None:
        """Put into `run.json` what only training could tell; what it says of an earlier session goes."""
        if self.writes:
            self._write_facts(self.facts() | facts)

    def results(self, cfg: RunConfig) -> dict[str, Any] | None:
        """Results of this very run if it is finished and they are as they were written, else None."""
        return read_json(self.path / "results.json") if lock.is_finished(self.path, cfg) else None

    def finish(self, cfg: RunConfig, results: dict[str, Any], *, event: str = "run.finished") -> None:
        """Write the results and mark the run as finished; `event` says what has led to them."""
        path = self.path / "results.json"
        files.write_json(path, results)
        # Of what the disk has, so that results edited by hand are made again.
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.write_json(
            self.path / "done.json",
            {"config_hash": load.config_hash(cfg), "results_sha256": digest, "finished": now()},
        )
        self.event(event)

    def facts(self) -> dict[str, Any]:
        """What `run.json` says about the run that is resumed here; empty for a new one."""
        return read_json(self.path / "run.json") or {}

    def save_checkpoint(
        self, tensors: Tensors, facts: dict[str, Any], *, keep: Keep, pinned: Collection[int | None] = ()
    ) -> bool:
        """Save the state, then drop what `keep` and the pinned steps do not hold.

        A full disk is an event and not the end, three in a row are.

        Raises:
            ResourceError: the third failure in a row.
            RunConflictError: the directory was taken over by another process.
        """
        folder, known = self.path / "checkpoints", {"incarnation": self.incarnation, "config": self._config_hash}
        try:
            path = checkpoint.save_checkpoint(folder, tensors, facts, facts=known, fence=self.check_lock)
        except OSError as error:
            self._failed_saves += 1
            self.event("checkpoint.failed", step=facts["step"], reason=str(error))
            # A colleague may be making room: training goes on from memory meanwhile.
            if self._failed_saves < MOST_FAILED_SAVES:
                return False
            raise ResourceError(
                f"{MOST_FAILED_SAVES} checkpoints in a row could not be written to {self.path} ({error.strerror}); "
                "free some space, the same command continues from the last good one"
            ) from None
        self._failed_saves = 0
        self.event("checkpoint.saved", step=facts["step"], path=path.name)
        # Only now that the new one is durable and its event says so may an older one go.
        try:
            retention.retain(folder, keep, {*pinned, self.source})
        except OSError as error:
            self.event("retention.failed", step=facts["step"], reason=str(error))
        return True

    def save_snapshot(self, tensors: Tensors, meta: dict[str, Any]) -> bool:
        """Save weights to use; False, and an event, where the disk refuses."""
        try:
            path = checkpoint.save_snapshot(self.path / "snapshots", tensors, meta, fence=self.check_lock)
        except OSError as error:
            self.event("snapshot.failed", step=meta["step"], reason=str(error))
            return False
        self.event("snapshot.saved", step=meta["step"], path=path.name)
        return True

    def load_latest(self) -> Checkpoint | None:
        """The newest good checkpoint; damaged ones are set aside with an event."""
        newest = checkpoint.load_latest(
            self.path / "checkpoints",
            on_bad=lambda path, reason: self.event("checkpoint.bad", path=path.name, reason=reason),
        )
        self.source = None if newest is None else newest.state["step"]
        return newest

    def check_lock(self) -> None:
        """Raise `RunConflictError` unless the lock in the directory is the one this process took."""
        holder = read_json(self.path / ".lock") or {}
        if holder.get("incarnation") != self.incarnation:
            raise RunConflictError(
                f"{self.path} was taken over by process {holder.get('pid', '?')} on {holder.get('host', '?')}; "
                "nothing more is written here, stop one of the two"
            )

    def _write_facts(self, facts: dict[str, Any]) -> None:
        if facts != self.facts():
            files.write_json(self.path / "run.json", facts)


def copy_checkpoint(old: Path, new: Path) -> dict[str, Any]:
    """Copy the newest good checkpoint of the run `old` into the run directory `new`, once; returns facts for run.json.

    It is the first thing that happens in `new` (`--fork`): from then on the new run is one like any other, and the old
    one may go on, or go away. Nothing is written into the old directory.

    Raises:
        CheckpointError: `old` has no checkpoint that is whole.
        ResourceError: no space.
    """
    target = new / "checkpoints"
    copied = retention.complete(target)
    if not copied:
        source = _newest_good(old / "checkpoints")
        try:
            _copy(source, target / source.name)
        except OSError as error:
            raise ResourceError(
                f"cannot copy {source} to {target} ({error.strerror}); free some space, the same command continues"
            ) from None
        copied = [source]
    return {"path": str(old), "use": "state", "step": retention.step_of(copied[0]), "loaded": "fork"}


def _newest_good(directory: Path) -> Path:
    reason = "there is none"
    for path in retention.complete(directory):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            reason = str(error)
            continue
        return path
    raise CheckpointError(f"no checkpoint in {directory} to go on from ({reason}); give the run with --out")


def _copy(source: Path, target: Path) -> None:
    """A copy that is there as a whole or not at all; it is verified again when it is loaded."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=files.folder_mode())
    with files.write_whole(target) as temporary:
        temporary.mkdir(mode=files.folder_mode())
        for path in source.iterdir():
            copy = temporary / path.name
            # Not copytree: modes and times of the old run are no concern of the new one.
            shutil.copyfile(path, copy, follow_symlinks=False)
            copy.chmod(files.file_mode())
            files.flush(copy)
