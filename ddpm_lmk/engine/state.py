"""All that changes while training, and its way into a checkpoint and back.

Not here: the learning rate (a function of the step), random state (there is none) and the loader's place (the step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.divergence import OVERFLOW, Health
from ddpm_lmk.engine.ema import Ema
from ddpm_lmk.engine.optim import LossScale, Plateau, build_optimizer, load_moments
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.rundir.checkpoint import Checkpoint, Tensors

COUNTERS = ("step", "images", "evaluated_at", "seconds")
PARTS = ("plateau", "patience", "health", "scale")


@dataclass
class Patience:
    """Stops a run whose score has not improved for `limit` evaluations; without a limit it only remembers the best."""

    limit: int | None
    best: float | None = None
    best_step: int | None = None
    num_bad: int = 0

    def see(self, score: float, step: int) -> bool:
        """Take note of an evaluation; True if it is strictly the best so far."""
        if math.isfinite(score) and (self.best is None or score < self.best):
            self.best, self.best_step, self.num_bad = score, step, 0
            return True
        self.num_bad += 1
        return False

    @property
    def is_exhausted(self) -> bool:
        """Has the run stood still for too long?"""
        return self.limit is not None and self.num_bad >= self.limit

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "num_bad": self.num_bad}

    def load(self, facts: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.best, self.best_step, self.num_bad = facts["best"], facts["best_step"], facts["num_bad"]


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        step: optimizer updates asked for so far, skipped ones included.
        images: images seen so far, over all ranks.
        evaluated_at: the last step that was validated; 0 if none was.
        seconds: wall-clock time in the loop, over all sessions of the run.
        best: weights by file (`model`, `ema`) of the best evaluation, on the host; empty unless they are wanted.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    plateau: Plateau
    patience: Patience
    health: Health
    scale: LossScale
    keeps_best: bool
    step: int = 0
    images: int = 0
    evaluated_at: int = 0
    seconds: float = 0.0
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, cfg: RunConfig, model: nn.Module) -> TrainState:
        """Step 0 of a run whose `model` already holds its first weights, on its device."""
        optimizer = build_optimizer(cfg.optim, model)  # first, since it freezes what the average then leaves out
        return cls(
            model=model,
            ema=Ema(cfg.train.ema, model),
            optimizer=optimizer,
            plateau=Plateau(cfg.optim.plateau),
            patience=Patience(cfg.train.patience),
            health=Health(cfg.train.spikes),
            scale=LossScale(cfg.train.precision == "fp16"),
            keeps_best=cfg.train.select == "best",
        )

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Weights to use, by file: `model`, and `ema` where there is one."""
        files = {"model": self.model.state_dict(), "ema": self.ema.weights()}
        return {name: tensors for name, tensors in files.items() if tensors}

    def see(self, score: float) -> None:
        """Take note of the validation score at this step."""
        self.evaluated_at = self.step
        self.plateau.see(score)
        if self.patience.see(score, self.step) and self.keeps_best:
            self.best = {
                file: {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
                for file, tensors in self.weights().items()
            }

    def judge(self, *, loss: float, norm: float) -> str | None:
        """Take note of the step that ends now; the reason to leave its update out, or None."""
        reason = self.health.judge(self.step, loss=loss, norm=norm, is_scaled=bool(self.scale))
        self.scale.see(has_overflow=reason == OVERFLOW)
        return reason

    def go_back(self, checkpoint: Checkpoint, *, load_all: Callable[[nn.Module, dict[str, Tensor]], Any]) -> None:
        """Weights, average, moments and rules of a checkpoint, at the present step: what came between is left out."""
        step, images, seconds = self.step, self.images, self.seconds
        self.load(checkpoint, load_all=load_all)
        self.health.went_back(source=self.step, step=step)
        self.step, self.images, self.seconds = step, images, seconds

    def select_best(self) -> bool:
        """Put the best weights into the model and its average; False where they are wanted and there are none."""
        if self.best:
            self.model.load_state_dict(self.best["model"])
            self.ema.load(self.best.get("ema", {}))
        return bool(self.best) or not self.keeps_best

    def tensors(self, moments: Mapping[str, Tensor]) -> Tensors:
        """The tensor files of a checkpoint; `moments` is the optimizer state by name (`Updater.moments`)."""
        files: dict[str, Mapping[str, Tensor]] = {**self.weights(), "optim": moments}
        if self.best:
            files["best"] = {f"{file}/{name}": v for file, group in self.best.items() for name, v in group.items()}
        return files

    def facts(self) -> dict[str, Any]:
        """The counters of a checkpoint (`state.json`)."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**counters, **{name: getattr(self, name).facts() for name in PARTS}}

    def load(self, checkpoint: Checkpoint, *, load_all: Callable[[nn.Module, dict[str, Tensor]], Any]) -> None:
        """Continue from a verified checkpoint.

        Args:
            load_all: how weights get into a model, with a readable refusal (`models.weights.load_all`).

        Raises:
            CheckpointError: it belongs to another model.
        """
        files, facts = checkpoint.tensors, checkpoint.state
        if ("ema" in files) != bool(self.ema) or "model" not in files:
            raise CheckpointError(f"{checkpoint.path} holds {', '.join(files)}, which is not what this run file keeps")
        if lost := sorted({*COUNTERS, *PARTS} - set(facts)):
            raise CheckpointError(
                f"{checkpoint.path} says nothing of {', '.join(lost)}: it is of another version of ddpm-lmk; "
                "continue it with that one, or start again in another --out directory"
            )
        load_all(self.model, files["model"])
        self.ema.load(files.get("ema", {}))
        load_moments(self.optimizer, self.model, files["optim"])
        self.best = {}
        for name, value in files.get("best", {}).items():
            file, _, key = name.partition("/")
            self.best.setdefault(file, {})[key] = value
        for name in COUNTERS:
            setattr(self, name, facts[name])
        for name in PARTS:
            getattr(self, name).load(facts[name])
