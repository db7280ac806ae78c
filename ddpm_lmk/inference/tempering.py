"""When a run fits its temperatures: on its validation split after training, or on folds of its shots before.

Folds are runs of their own in RUN/folds, with the same run file but for what they hold out; a run that is continued
does not repeat those that are finished.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Workbench
from ddpm_lmk.inference import calibration
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.tasks import LandmarkTask, Task
from ddpm_lmk.tasks.codecs import ContourCodec

FOLDER = "folds"


def before_training(
    cfg: RunConfig, task: Task, run: RunDir, parallel: Parallel, workbench: Workbench, *, execute: Callable[..., Any]
) -> None:
    """Fit them on folds of the shots, where they are asked for and no validation labels are used; on every rank.

    It comes before the run's own network is made, since all of them are the one on the workbench.
    """
    if not _is_asked(task) or cfg.data.validation_split is not None:
        return
    assert isinstance(task, LandmarkTask)

    def learn(part: RunConfig, place: Path) -> nn.Module:
        execute(part, place, parallel=parallel, workbench=workbench)
        with parallel.together():
            model = workbench.model(part, task, parallel.device)
            load_all(model, load_weights(place, "auto")[0])
        return model

    facts = parallel.on_main(lambda: calibration.read(run.path))
    if facts is None:
        parallel.on_main(lambda: run.declare(cfg))  # stopped in a fold, the run can be continued
        folder = run.path / FOLDER
        facts = calibration.by_folds(cfg, task, parallel, learn=learn, folder=folder, cache=workbench.cache)
    calibration.keep(facts, task, run.path, parallel)


def after_training(
    cfg: RunConfig, task: Task, model: nn.Module, run: RunDir, parallel: Parallel, workbench: Workbench
) -> None:
    """Fit them on the validation split, under the weights that are kept; on every rank."""
    split = cfg.data.validation_split
    if not _is_asked(task) or split is None:
        return
    assert isinstance(task, LandmarkTask)
    found = calibration.likelihoods(cfg, task, model, parallel, split=split, cache=workbench.cache)
    calibration.keep(calibration.record(found, task, learnt_on=f"validation split {split}"), task, run.path, parallel)


def _is_asked(task: Task) -> bool:
    is_contour = isinstance(task, LandmarkTask) and isinstance(task.codec, ContourCodec)
    return is_contour and task.codec.cfg.temperatures == "fitted"  # type: ignore[attr-defined]
