"""What is asked of all runs of a sweep before the first of them begins: what `checks` asks of one.

Faults of several runs are told together, and cells that a folder holds with other settings are none of this sweep's: a
table of both would compare what is not alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data.loading.corpus import Corpus
from ddpm_lmk.data.loading.order import GroupPlan
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError, LmkError, RunConflictError
from ddpm_lmk.launcher import Placement, preflight
from ddpm_lmk.rundir import lock
from ddpm_lmk.sweep.expand import Cell, StageRun, Sweep, cell_folder, is_done

MOST_TOLD = 3
REMEDY = {
    DataError: "packs.NAME=DIR or data.path=DIR names other packs",
    CheckpointError: "start.LABEL=PATH names other weights, without=[LABEL] does without",
}


def check_sweep(sweep: Sweep, out: Path, placement: Placement) -> list[str]:
    """Raise what would end one of the runs that are not done; returns what is to be remarked. Writes nothing.

    Raises:
        RunConflictError: the folder holds runs of these names with other settings.
        LmkError: as `checks.check_run`, with the runs it is about.
    """
    cells = [cell for cell in sweep.cells if not is_done(cell_folder(out, cell.name), cell)]
    stages = [stage for stage in needed(sweep.stages, cells) if not is_done(stage.folder, stage)]
    for folder in dict.fromkeys((out, out / "cells", *(stage.folder for stage in stages))) if cells else ():
        lock.check_writable(folder)
    refuse_other_settings(out, stages, cells)
    looked = _Looked()
    on_all = replace(placement, processes=placement.processes if placement.device == "cuda" else 1)
    for stage in stages:
        looked.at(stage.cfg, stage.folder, on_all, name=f"stage {stage.name}")
    for cell in cells:
        made_by = next(iter(needed(stages, [cell])), None)
        looked.at(cell.cfg, cell_folder(out, cell.name), replace(placement, processes=1), cell.name, stage=made_by)
    looked.raise_if_wrong()
    return list(looked.remarks)


def needed(stages: Sequence[StageRun], cells: Sequence[Cell]) -> list[StageRun]:
    """The stages that these cells start from."""
    wanted = [Path(cell.cfg.init.weights) for cell in cells if cell.cfg.init.weights is not None]
    return [stage for stage in stages if any(path.is_relative_to(stage.folder) for path in wanted)]


class _Looked:
    """Faults by what they say, each with the runs it is about; what is alike is looked at once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[LmkError, list[str]]] = {}
        self._known: dict[str, list[Corpus] | LmkError] = {}
        self._fits: set[str] = set()
        self.remarks: dict[str, None] = {}

    def at(
        self, cfg: RunConfig, folder: Path, placement: Placement, name: str, *, stage: StageRun | None = None
    ) -> None:
        """Look at one run; `stage` makes its starting weights, and is not done."""
        try:
            preflight.check_settings(cfg, placement)
            corpora = self._data(cfg)
            lock.check_contents(folder, cfg)
            preflight.want_same_data(folder, corpora)
            if stage is not None:
                want_snapshot(cfg, stage, self._data(stage.cfg))
            key = config_hash(cfg.model_copy(update={"seed": 0, "name": "same"}))
            if key not in self._fits and not preflight.has_begun(folder):
                preflight.check_start(cfg, folder, corpora, stage=None if stage is None else stage.cfg)
                self._fits.add(key)
            self.remarks |= dict.fromkeys(preflight.remarks(cfg, corpora))
        except LmkError as error:
            self._found.setdefault(str(error), (error, []))[1].append(name)

    def raise_if_wrong(self) -> None:
        """Raise the first fault, with the others beside it."""
        if not self._found:
            return
        error = next(iter(self._found.values()))[0]
        told = [f"{text} ({_some(names)})" for text, (_, names) in list(self._found.items())[:MOST_TOLD]]
        more = len(self._found) - len(told)
        remedy = next((words for kind, words in REMEDY.items() if isinstance(error, kind)), None)
        words = [*told, *([f"and {more} faults more"] if more else []), *([remedy] if remedy else [])]
        raise type(error)("; ".join(words))

    def _data(self, cfg: RunConfig) -> list[Corpus]:
        """What `checks.check_data` says of runs that learn from the same images and are scored on the same."""
        seed = cfg.seed if cfg.data.draw == "random" else 0
        alike = cfg.model_copy(update={"seed": seed, "name": "same", "init": type(cfg.init)()})
        key = config_hash(alike)
        if key not in self._known:
            try:
                self._known[key] = preflight.check_data(cfg)
            except LmkError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, LmkError):
            raise found
        return found


def want_snapshot(cfg: RunConfig, stage: StageRun, corpora: Sequence[Corpus]) -> None:
    """Raise `ConfigError` where a cell starts from a snapshot that its stage will not keep."""
    weights = Path(cfg.init.weights or "")
    if weights == stage.folder or weights.exists():
        return
    steps = sorted(kept_steps(stage.cfg, sum(len(corpus.rows) for corpus in corpora)))
    step = int(weights.name.removeprefix("step-"))
    if step not in steps:
        told = ", ".join(map(str, steps[:2])) + (f", ... {steps[-1]}" if len(steps) > 2 else "")
        raise ConfigError(
            f"stage:{stage.name}@{step}: the stage keeps snapshots at steps {told or 'its best step only'} "
            f"(train.snapshot_every={stage.cfg.train.snapshot_every}); name one of these, or set train.snapshot_every"
        )


def kept_steps(cfg: RunConfig, num_images: int) -> Iterator[int]:
    """The steps at which a run keeps snapshots, as far as they are known before it has run."""
    train = cfg.train
    plan = GroupPlan.of(cfg, num_images)
    total = train.length.steps(train.group_size, num_images, plan.steps_per_epoch)
    if train.snapshot_every is not None:
        every = train.snapshot_every.steps(train.group_size, num_images, plan.steps_per_epoch)
        yield from range(every, total, every)
    if train.select == "last":
        yield total


def refuse_other_settings(out: Path, stages: Sequence[StageRun], cells: Sequence[Cell]) -> None:
    """Raise `RunConflictError` with the differences, key by key, and the runs that have them."""
    found: dict[str, list[str]] = {}
    runs = [(f"stage {stage.name}", stage.folder, stage.cfg) for stage in stages]
    for name, folder, cfg in [*runs, *((cell.name, cell_folder(out, cell.name), cell.cfg) for cell in cells)]:
        if (folder / "config.yaml").is_file() and (rows := lock.conflicts(folder, cfg)):
            found.setdefault(lock.listed(rows), []).append(name)
    if found:
        told = "; ".join(f"{text} ({_some(names)})" for text, names in found.items())
        raise RunConflictError(
            f"{out} holds runs with other settings: {told}; use another --out directory for these "
            "settings, or give those that are there: one table would mix them"
        )


def _some(names: Sequence[str]) -> str:
    """The first of some runs, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
