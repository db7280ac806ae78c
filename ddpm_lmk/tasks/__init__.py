"""The tasks, and the one place where a run file's `task` section becomes one."""

from __future__ import annotations

from ddpm_lmk.config import DenoiseConfig, RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.tasks.denoise import DenoiseTask
from ddpm_lmk.tasks.landmarks import LandmarkTask, Predictions
from ddpm_lmk.tasks.task import Task

__all__ = ["DenoiseTask", "LandmarkTask", "Predictions", "Task", "build_task"]


def build_task(cfg: RunConfig, spec: DatasetSpec) -> Task:
    """The task of a run; `spec` says how many landmarks its dataset has."""
    if isinstance(cfg.task, DenoiseConfig):
        return DenoiseTask(cfg.task, seed=cfg.seed)
    return LandmarkTask(cfg.task, spec)
