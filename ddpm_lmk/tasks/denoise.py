"""Noise prediction on unlabelled images: the pre-training task (docs/method.md, section 2).

Timestep and noise of an image are functions of `(seed, position)` alone; on one kind of device they are the same bits
for any number of processes and any micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lmk.config import DenoiseConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.loading.order import keyed_seed, keyed_uniform
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.tasks.crops import Cutter
from ddpm_lmk.tasks.noise_schedule import NoiseSchedule
from ddpm_lmk.tasks.task import Task


class DenoiseTask(Task):
    """Predict the noise (or the clean image, or v) from a noised image."""

    out_channels = 1
    full_size = True

    def __init__(self, cfg: DenoiseConfig, *, seed: int, cutter: Cutter | None = None) -> None:
        """`cutter`: what makes crops, needed for `cfg.zoom` only."""
        self.cfg = cfg
        self.cutter = cutter
        self.seed = seed
        self.t_max = cfg.num_timesteps - 1 if cfg.t_max is None else cfg.t_max
        self.schedule = NoiseSchedule(
            cfg.schedule, num_timesteps=cfg.num_timesteps, beta_start=cfg.beta_start, beta_end=cfg.beta_end
        )

    def timesteps(self, positions: Tensor, stream: str = "timestep") -> Tensor:
        """Uniform timesteps `[B]` in [t_min, t_max], keyed by position; in host memory, like `positions`."""
        # numpy in double precision, not torch on the device: the same integers on every kind of device.
        uniform = keyed_uniform(self.seed, stream, positions.numpy(), 1)[:, 0]
        steps = np.minimum(self.cfg.t_min + uniform * (self.t_max - self.cfg.t_min + 1), self.t_max)
        return torch.from_numpy(steps.astype(np.int64))

    def noise(self, images: Tensor, positions: Tensor, stream: str = "eps") -> Tensor:
        """Standard normal noise of the shape of `images`, one keyed generator per image."""
        generator = torch.Generator(images.device)
        eps = torch.empty_like(images)
        # Image by image: one generator for a batch would make noise depend on who shares the micro-batch.
        for row, position in zip(eps, positions.tolist(), strict=True):
            generator.manual_seed(keyed_seed(self.seed, stream, position))
            row.copy_(torch.randn(row.shape, generator=generator, device=images.device))
        return eps

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared (or absolute) error over pixels, per image `[B]`, or crop of it where the run zooms in."""
        if self.cfg.zoom is None:
            return self._loss(model, batch, "")
        assert self.cutter is not None, "build_task makes it"
        return self._loss(model, replace(batch, images=self.cutter.zoomed(self.cfg.zoom, batch)), "")

    def _loss(self, model: nn.Module, batch: Batch, suffix: str) -> Tensor:
        t = to_device(self.timesteps(batch.positions, "timestep" + suffix), batch.images.device)
        eps = self.noise(batch.images, batch.positions, "eps" + suffix)
        output = model(self.schedule.q_sample(batch.images, t, eps), t).float()  # the loss in fp32 under autocast
        error = output - self.schedule.regression_target(batch.images, t, eps, self.cfg.target)
        return (error.abs() if self.cfg.loss == "l1" else error.square()).mean((1, 2, 3))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The training loss on whole images, with timesteps and noise of their own, the same at every evaluation."""
        return {"loss": (self._loss(model, batch, "-evaluate") * batch.weight).sum(), "count": batch.weight.sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss per image."""
        loss = sums["loss"] / max(sums["count"], 1.0)
        return {"loss": loss, "score": loss}

    def export(self) -> dict[str, Any]:
        """The schedule, which a sampler needs."""
        return {"denoise": self.cfg.model_dump(mode="json")}
