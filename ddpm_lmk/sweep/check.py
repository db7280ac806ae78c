"""Checks of all runs of a sweep before the first of them begins: for each, those of `launcher.preflight`.

Equal faults of several runs are reported once, with the runs they are about. Cells that the folder holds with other
settings are refused: a table of both would compare runs that differ in more than their row says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError, LmkError, RunConflictError
from ddpm_lmk.launcher import Placement, preflight
from ddpm_lmk.rundir import lock
from ddpm_lmk.sweep.expand import Cell, StageRun, Sweep, SweepRun

MAX_FAULTS = 3  # in one message, which stays readable; the next call names the others
REMEDY = {
    DataError: "packs.NAME=DIR or data.path=DIR names other packs",
    CheckpointError: "start.LABEL=PATH names other weights, without=[LABEL] does without",
}


def check_sweep(sweep: Sweep, placement: Placement) -> list[str]:
    """Raise what would end one of the runs that are not done; returns remarks for the user. Writes nothing.

    Raises:
        RunConflictError: the folder holds runs of these names with other settings.
        LmkError: as `preflight.check_run`, with the runs it is about.
    """
    cells = [cell for cell in sweep.cells if not cell.is_done()]
    stages = [stage for stage in sweep.stages_of(cells) if not stage.is_done()]
    # Where nothing is left to do nothing is written, so a finished sweep may lie on a disk that is read-only.
    for folder in dict.fromkeys((sweep.out, sweep.out / "cells", *(stage.folder for stage in stages))) if cells else ():
        lock.check_writable(folder)
    refuse_other_settings(sweep.out, [*stages, *cells])
    checks = _Checks()
    # On GPUs a stage runs on all of them, on CPUs in one process beside other stages; see `sweep.run`.
    of_stage = placement if placement.device == "cuda" else replace(placement, processes=1)
    for stage in stages:
        checks.check(stage, of_stage)
    for cell in cells:
        made_by = sweep.stage_of(cell)
        checks.check(cell, replace(placement, processes=1), stage=made_by if made_by in stages else None)
    checks.raise_faults()
    return list(checks.remarks)


@dataclass
class _Checks:
    """Faults and remarks by their words. What many cells share is opened and compared once: a table has hundreds."""

    remarks: dict[str, None] = field(default_factory=dict)
    _faults: dict[str, tuple[LmkError, list[str]]] = field(default_factory=dict)
    _corpora: dict[str, list[Corpus] | LmkError] = field(default_factory=dict)
    _checked_starts: set[str] = field(default_factory=set)

    def check(self, run: SweepRun, placement: Placement, *, stage: StageRun | None = None) -> None:
        """Check one run; `stage` is the one that has yet to make its starting weights."""
        cfg, folder = run.cfg, run.folder
        try:
            preflight.check_settings(cfg, placement)
            corpora = self._open(cfg)
            lock.check_contents(folder, cfg)
            preflight.check_same_data(cfg, folder, corpora)
            if stage is not None:
                require_snapshot(cfg, stage, self._open(stage.cfg))
            key = config_hash(cfg.model_copy(update={"seed": 0, "name": "same"}))  # neither changes what must fit
            if key not in self._checked_starts and not preflight.has_begun(folder):
                preflight.check_start(cfg, folder, corpora, stage=None if stage is None else stage.cfg)
                self._checked_starts.add(key)
            self.remarks |= dict.fromkeys(preflight.remarks(cfg, corpora))
        except LmkError as error:
            self._faults.setdefault(str(error), (error, []))[1].append(run.key)

    def raise_faults(self) -> None:
        """Raise the first fault, with the others in its message."""
        if not self._faults:
            return
        first = next(iter(self._faults.values()))[0]
        words = [f"{text} ({_some(names)})" for text, (_, names) in list(self._faults.items())[:MAX_FAULTS]]
        if len(self._faults) > MAX_FAULTS:
            words.append(f"and {len(self._faults) - MAX_FAULTS} faults more")
        words += [remedy for kind, remedy in REMEDY.items() if isinstance(first, kind)]
        raise type(first)("; ".join(words))

    def _open(self, cfg: RunConfig) -> list[Corpus]:
        """`preflight.check_data`, once for runs that learn from the same images and are scored on the same."""
        seed = cfg.seed if cfg.data.draw == "random" else 0  # it chooses the images of few shots
        key = config_hash(cfg.model_copy(update={"seed": seed, "name": "same", "init": type(cfg.init)()}))
        if key not in self._corpora:
            try:
                self._corpora[key] = preflight.check_data(cfg)
            except LmkError as error:
                self._corpora[key] = error
        corpora = self._corpora[key]
        if isinstance(corpora, LmkError):
            raise corpora
        return corpora


def require_snapshot(cfg: RunConfig, stage: StageRun, corpora: Sequence[Corpus]) -> None:
    """Raise `ConfigError` where a cell starts from a snapshot that its stage will not keep."""
    weights = Path(cfg.init.weights or "")
    if weights == stage.folder or weights.exists():  # the final weights, which every run keeps; or made before
        return
    steps = sorted(snapshot_steps(stage.cfg, sum(len(corpus.rows) for corpus in corpora)))
    step = int(weights.name.removeprefix("step-"))
    if step not in steps:
        listed = ", ".join(map(str, steps[:2])) + (f", ... {steps[-1]}" if len(steps) > 2 else "")
        raise ConfigError(
            f"stage:{stage.name}@{step}: the stage keeps snapshots at steps {listed or 'its best step only'} "
            f"(train.snapshot_every={stage.cfg.train.snapshot_every}); name one of these, or set train.snapshot_every"
        )


def snapshot_steps(cfg: RunConfig, num_images: int) -> Iterator[int]:
    """The steps at which a run keeps snapshots, as far as they are known before it has run."""
    train = cfg.train
    plan = BatchPlan.of(cfg, num_images)
    total = train.duration.steps(train.global_batch_size, num_images, plan.steps_per_epoch)
    if train.snapshot_every is not None:
        every = train.snapshot_every.steps(train.global_batch_size, num_images, plan.steps_per_epoch)
        yield from range(every, total, every)
    if train.select == "last":
        yield total


def refuse_other_settings(out: Path, runs: Sequence[StageRun | Cell]) -> None:
    """Raise `RunConflictError` with the differences, key by key, and the runs that have them."""
    conflicts: dict[str, list[str]] = {}
    for run in runs:
        if (run.folder / "config.yaml").is_file() and (rows := lock.conflicts(run.folder, run.cfg)):
            conflicts.setdefault(lock.listed(rows), []).append(run.key)
    if conflicts:
        listed = "; ".join(f"{text} ({_some(names)})" for text, names in conflicts.items())
        raise RunConflictError(
            f"{out} holds runs with other settings: {listed}; use another --out directory for these "
            "settings, or give those that are there: one table would mix them"
        )


def _some(names: Sequence[str]) -> str:
    """The first of some runs, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
