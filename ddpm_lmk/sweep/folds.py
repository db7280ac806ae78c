"""The radius of a finished run, from folds: the same run again without a part of its labelled images, scored on these.

`RUN/folds/0-of-5` and so on are run directories like any other: resumed, locked, and not done twice. What is learnt
from their errors is in `inference.radius`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.data import HoldOutConfig
from ddpm_lmk.config.load import load_stored
from ddpm_lmk.config.run_file import LONGEST_NAME
from ddpm_lmk.data.loading.corpus import HELD_OUT, fingerprint, training_corpora
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import CheckpointError, ConfigError, LaunchError
from ddpm_lmk.inference import radius
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.launcher.preflight import check_run, check_same_data, has_begun
from ddpm_lmk.rundir import lock
from ddpm_lmk.system import files
from ddpm_lmk.system.console import Whole, about, print_status
from ddpm_lmk.system.files import read_json
from ddpm_lmk.system.signals import check_stopped

LEAVE_ONE_OUT = 5  # up to so many labelled images each is left out by itself; more are parted in as many folds


@dataclass(frozen=True)
class Fold:
    """A run without a part of its labelled images."""

    cfg: RunConfig
    folder: Path

    def is_done(self) -> bool:
        """Is it finished?"""
        return lock.is_finished(self.folder, self.cfg)


@dataclass(frozen=True)
class Calibration:
    """A finished run, and the folds that tell how far off it is on images it has not learnt."""

    run: Path
    cfg: RunConfig
    results: dict[str, Any]
    folds: Sequence[Fold]

    @property
    def left(self) -> list[Fold]:
        """Folds that are not finished."""
        return [fold for fold in self.folds if not fold.is_done()]

    @property
    def fold_s(self) -> float | None:
        """Seconds of a fold, about: those that training the run itself took."""
        return (self.results.get("train") or {}).get("wall_s")

    def __str__(self) -> str:
        text = f"{self.run}: {len(self.folds)} folds, {len(self.left)} to train"
        return text if not self.left or self.fold_s is None else f"{text}, {about(len(self.left) * self.fold_s)}"


def plan_calibration(run: Path, count: int | None = None) -> Calibration:
    """The folds of a finished run; by default one for each labelled image, or 5 parts where there are more.

    Raises:
        CheckpointError: there is no finished run.
        ConfigError: it finds no points, holds out images itself, or cannot be parted into so many folds.
        DataError: its images are not there, or others than it has learnt from.
        RunConflictError: it began with other weights.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run directory; wanted a finished fine-tuning run, of a sweep its cells")
    cfg = load_stored(run)
    if cfg.task.stage != "finetune":
        raise ConfigError(f"{run} is a run of task {cfg.task.kind}, wanted landmarks; give another run directory")
    results = read_json(run / "results.json")
    if results is None or not lock.is_finished(run, cfg):
        raise CheckpointError(
            f"{run} has not finished; `ddpm-lmk finetune {run / 'config.yaml'} --out {run}` continues it"
        )
    if cfg.data.hold_out is not None:
        raise ConfigError(
            f"{run} holds out a part of its images itself (data.hold_out), and its folds would need another; wanted a "
            "run that trains on all its labelled images"
        )
    corpora = training_corpora(cfg)
    lock.check_same_data(run, fingerprint(corpora), {})
    labels = min(len(corpus.rows) for corpus in corpora)
    if labels < 2:
        raise ConfigError(
            f"{run} has learnt from 1 labelled image, so none can be left out to measure errors on; label another one "
            "and fine-tune with both, or use spread_px, which has no probability"
        )
    count = count or (labels if labels <= LEAVE_ONE_OUT else LEAVE_ONE_OUT)
    if count > labels:
        raise ConfigError(f"--folds {count}, but {run} has learnt from {labels} labelled images; use 2..{labels}")
    planned = Calibration(run, cfg, results, [_fold(cfg, run, index, count) for index in range(count)])
    if planned.left:  # finished ones need neither the pool nor the starting weights, which may be gone by now
        check_same_data(cfg, run, corpora)
    if not all(has_begun(fold.folder) for fold in planned.left):
        lock.check_same_weights(run, cfg)
    return planned


def _fold(cfg: RunConfig, run: Path, index: int, count: int) -> Fold:
    """The run without part `index`: only its name and what it is scored on differ beside."""
    where = f"{index}-of-{count}"  # of another number of folds there may be others beside it
    suffix = f"-fold-{where}"
    data = cfg.data.model_copy(update={"hold_out": HoldOutConfig(fold=index, of=count)})
    evaluate = cfg.evaluate.model_copy(update={"split": HELD_OUT})
    name = cfg.name[: LONGEST_NAME - len(suffix)] + suffix
    own = cfg.model_copy(update={"name": name, "data": data, "evaluate": evaluate})
    return Fold(own, run / "folds" / where)


def check_folds(calibration: Calibration, placement: Placement) -> list[str]:
    """Raise what would end a fold before its first step, as `check_run` does; returns remarks, each once."""
    remarks = [check_run(fold.cfg, fold.folder, placement) for fold in calibration.left]
    return list(dict.fromkeys(line for lines in remarks for line in lines))


def calibrate(calibration: Calibration, placement: Placement, *, coverage: float) -> list[dict[str, Any]]:
    """Train the folds that are left, learn the radius, and write it and its coverage into the run directory.

    Returns:
        Of each dataset the content of its radius.json, its folder, and as `measured` what it gives on the split the run
        was scored on; None where it was not, or where there is no radius.

    Raises:
        LmkError: whatever ends a fold; StoppedError where it was asked to stop, the same command continues.
    """
    _train_folds(calibration, placement)
    return _write_radius(calibration, coverage)


def _train_folds(calibration: Calibration, placement: Placement) -> None:
    left, began = calibration.left, time.monotonic()
    for number, fold in enumerate(left):
        print_status(f"{fold.cfg.name}: {placement}, {fold.folder}")
        job: dict[str, Any] = {"config": fold.cfg.model_dump(mode="json"), "out": str(fold.folder)}
        job["is_foretold"] = False  # all folds were, by the time of the run itself
        if calibration.fold_s is not None:
            then_s = (len(left) - number - 1) * calibration.fold_s
            job["whole"] = asdict(Whole("the calibration", began, then_s))
        code = launch(job, placement)
        check_stopped(code)
        if code != 0:
            raise LaunchError(f"a fold ended with exit code {code}; see {fold.folder}; the same command continues it")


def _write_radius(calibration: Calibration, coverage: float) -> list[dict[str, Any]]:
    """radius.json first: a run that has to score itself again finds it, and measures its coverage too."""
    from ddpm_lmk.rundir.checkpoint import find_snapshot, snapshot_meta  # they import torch
    from ddpm_lmk.rundir.directory import RunDir

    run, cfg, results = calibration.run, calibration.cfg, calibration.results
    folds = [read_json(fold.folder / "results.json") or {} for fold in calibration.folds]
    meta = snapshot_meta(find_snapshot(run))
    specs = {spec.name: spec for spec in DatasetSpec.model_validate(meta["spec"]).domains}
    written: list[dict[str, Any]] = []
    with RunDir.lock(run, cfg) as directory:
        for part in folds[0].get("parts", [folds[0]]):
            place, spec = run / part.get("folder", ""), specs[part["spec"]]  # of a mixture RUN/parts/DATASET
            held_out = radius.read_errors([fold.folder / place.relative_to(run) for fold in calibration.folds])
            facts: dict[str, Any] = {
                **radius.learn(held_out, coverage=coverage, unit=spec.unit),
                "folds": len(folds),
                "spec": spec.name,
                "landmarks": list(spec.landmark_names),
                "steps": results["train"]["steps"],  # of training
                "step": meta["step"],  # of the weights that were kept, which may be earlier
            }
            files.write_json(place / radius.FILE_NAME, facts)
            measured = None
            if facts["factor"] is not None and (place / radius.PREDICTIONS).is_file():
                measured = radius.measure(facts, radius.read_errors([place]))
            written.append({**facts, "folder": place, "split": cfg.evaluate.split, "measured": measured})
        by_place = {each["folder"]: each["measured"] for each in written}
        if "parts" in results:
            parts = [_with_radius(part, by_place[run / part["folder"]]) for part in results["parts"]]
            for part in parts:
                path = run / part["folder"] / "results.json"
                files.write_json(path, _with_radius(read_json(path) or {}, part.get("radius")))
            changed = results | {"parts": parts}
        else:
            changed = _with_radius(results, by_place[run])
        if changed != results:
            directory.finish(cfg, changed, event="run.calibrated")
    return written


def _with_radius(results: dict[str, Any], measured: dict[str, Any] | None) -> dict[str, Any]:
    others = {key: value for key, value in results.items() if key != "radius"}
    return others if measured is None else others | {"radius": measured}
