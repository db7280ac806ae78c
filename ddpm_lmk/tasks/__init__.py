"""The tasks, and the one place where a run file's `task` section becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpm_lmk.config import EncoderUNetConfig, LandmarksConfig, RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.tasks.codecs import build_codec
from ddpm_lmk.tasks.crops import Cutter
from ddpm_lmk.tasks.denoise import DenoiseTask
from ddpm_lmk.tasks.landmarks import LandmarkTask
from ddpm_lmk.tasks.second_look import SecondLook
from ddpm_lmk.tasks.ssl.base import EncoderTask
from ddpm_lmk.tasks.ssl.dino import DinoTask
from ddpm_lmk.tasks.ssl.mocov3 import MocoV3Task
from ddpm_lmk.tasks.ssl.simclrv2 import SimclrV2Task
from ddpm_lmk.tasks.task import Task

__all__ = ["TASKS", "DenoiseTask", "EncoderTask", "LandmarkTask", "Task", "build_task"]


TASKS: dict[str, Callable[[Any, RunConfig, DatasetSpec], Task]] = {
    "denoise": lambda section, cfg, spec: DenoiseTask(section, seed=cfg.seed, cutter=_cutter(cfg)),
    "landmarks": lambda section, cfg, spec: LandmarkTask(
        section, spec, is_domain_conditioned=cfg.model.kind == "gu2net", second_look=_second_look(section, cfg)
    ),
    "mocov3": lambda section, cfg, spec: _on_encoder(MocoV3Task, section, cfg),
    "simclrv2": lambda section, cfg, spec: _on_encoder(SimclrV2Task, section, cfg),
    "dino": lambda section, cfg, spec: _on_encoder(DinoTask, section, cfg),
}


def build_task(cfg: RunConfig, spec: DatasetSpec) -> Task:
    """The task of a run; `spec` says how many landmarks its dataset has."""
    return TASKS[cfg.task.kind](cfg.task, cfg, spec)


def _cutter(cfg: RunConfig) -> Cutter:
    return Cutter(cfg.data.augment, seed=cfg.seed, intensity=cfg.data.intensity)


def _second_look(section: LandmarksConfig, cfg: RunConfig) -> SecondLook | None:
    refine = section.refine
    if refine is None:
        return None
    sizes: dict[str, int] = {"size": refine.size or cfg.data.image_size, "crops_at_once": cfg.evaluate.batch}
    return SecondLook(refine, build_codec(section.codecs[-1]), _cutter(cfg), **sizes)


def _on_encoder(kind: type[EncoderTask[Any]], section: Any, cfg: RunConfig) -> Task:
    assert isinstance(cfg.model, EncoderUNetConfig), "RunConfig wants it"
    return kind(section, seed=cfg.seed, channels=cfg.model.in_channels)
