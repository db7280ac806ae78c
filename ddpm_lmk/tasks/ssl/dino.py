"""DINO (Caron et al., ICCV 2021): the student predicts from each crop the teacher's output for another, global one.

The teacher follows the student; its outputs are centred by their running mean, over all ranks, and sharpened by a low
temperature, which together keep them from collapsing. Crops of one size go through the encoder together. Weight decay
stays as it is over the run (the method raises it from 0.04 to 0.4).
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from ddpm_lmk.config.task import DinoConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.models.encoder_unet import Encoder
from ddpm_lmk.tasks.ssl.base import EncoderTask, pooled, scheduled
from ddpm_lmk.tasks.ssl.heads import DinoHead, follow, follower
from ddpm_lmk.tasks.task import OneRank


class DinoNet(nn.Module):
    """Student and teacher.

    Attributes:
        running_center: mean of the teacher's outputs [K]; by its name the engine takes the mean over ranks.
        teacher_temperature, is_learning: what the schedules say of the next step.
    """

    running_center: Tensor
    teacher_temperature: Tensor
    is_learning: Tensor

    def __init__(self, encoder: Encoder, cfg: DinoConfig) -> None:
        super().__init__()
        self.num_global, self.center_momentum = cfg.num_global, cfg.center_momentum
        self.encoder = encoder
        self.head = DinoHead(encoder.channels[-1], cfg.head, cfg.prototypes, has_norm=cfg.head_norm)
        self.teacher = nn.ModuleDict({"encoder": follower(encoder), "head": follower(self.head)})
        self.register_buffer("running_center", torch.zeros(cfg.prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(cfg.teacher_temperature[0]))
        self.register_buffer("is_learning", torch.tensor(0.0 if cfg.frozen > 0 else 1.0))

    def forward(self, views: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits [V, B, K] of all views, the teacher's probabilities [G, B, K] of the global ones."""
        student = self.head(_pooled(self.encoder, views), self.is_learning)
        with torch.no_grad():
            pooled = _pooled(self.teacher["encoder"], views[: self.num_global])
            teacher = self.teacher["head"](pooled, self.is_learning).float().unflatten(0, (self.num_global, -1))
            probabilities = ((teacher - self.running_center) / self.teacher_temperature).softmax(-1)
            if self.training:  # padding, of weight 0, must not move the centre
                mean = (teacher.mean(0) * weight[:, None]).sum(0) / weight.sum().clamp(min=1)
                self.running_center.lerp_(mean, 1 - self.center_momentum)
        return student.float().unflatten(0, (len(views), -1)), probabilities


class DinoTask(EncoderTask[DinoConfig]):
    """Self-distillation between crops."""

    def __init__(self, cfg: DinoConfig, *, seed: int, channels: int) -> None:
        super().__init__(cfg, seed=seed, channels=channels)
        self.num_followed = cfg.num_global

    def net(self, encoder: Encoder) -> nn.Module:
        """Student, teacher, centre."""
        return DinoNet(encoder, self.cfg)

    def compare(self, model: nn.Module, views: list[Tensor], batch: Batch, ranks: OneRank) -> Tensor:
        """Cross-entropy, the mean over pairs of a global view and any other view; other images do not matter."""
        student, teacher = model(views, batch.weight)
        return distillation(student / self.cfg.student_temperature, teacher)

    def after_step(self, model: nn.Module, step: int) -> None:
        """The teacher follows, and the schedules move on."""
        assert isinstance(model, DinoNet)
        cfg, total = self.cfg, self.total_steps
        # Only after an update: a step that was skipped as not finite moves neither teacher nor schedules.
        momentum = scheduled(cfg.momentum, cfg.momentum_schedule, step=step, total=total)
        follow(model.teacher["encoder"], model.encoder, momentum)
        follow(model.teacher["head"], model.head, momentum)
        first, last = cfg.teacher_temperature
        warmup = cfg.temperature_warmup * total
        model.teacher_temperature.fill_(first + (last - first) * min(1.0, step / warmup) if warmup else last)
        model.is_learning.fill_(float(step >= cfg.frozen * total))


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy per image `[B]` between views: student's logits `[V, B, K]`, teacher's shares `[G, B, K]`."""
    crosses = -torch.einsum("gbk,vbk->gvb", teacher, logits.log_softmax(-1))
    is_other = 1 - torch.eye(*crosses.shape[:2], device=logits.device).unsqueeze(-1)  # a view is not its own target
    return (crosses * is_other).sum((0, 1)) / is_other.sum()


def _pooled(encoder: nn.Module, views: list[Tensor]) -> Tensor:
    """Pooled maps of all views `[V B, C]`, one pass per size; views of a size stand together."""
    passes = [torch.cat(list(group)) for _, group in groupby(views, lambda view: view.shape[-1])]
    return torch.cat([pooled(encoder, images) for images in passes])
