"""Optimizer, learning rate, clipping and the plateau rule.

The learning rate is a function of the step, set by the loop before every update; there is no scheduler object, because
Accelerate would step a prepared one once per process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import ClipConfig, OptimConfig, PlateauConfig
from ddpm_lmk.errors import CheckpointError

HEAD = "final_conv"
FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
GROWS_AFTER = 2000  # updates, as in torch.amp


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, Adam or plain SGD over up to four groups: output layer or trunk, with or without weight decay.

    Every group carries `share`, what the learning rate of the step is multiplied by. What is frozen, here or by
    its task, is in no group.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_head = HEAD in name.split(".")
        if cfg.freeze == "trunk" and not is_head:
            parameter.requires_grad = False
        if not parameter.requires_grad:  # no gradient, so no decay and no moments either
            continue
        key = (is_head, cfg.decay_all or parameter.ndim > 1)
        members.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "share": cfg.head_lr / cfg.lr if is_head and cfg.head_lr is not None else 1.0,
            "weight_decay": cfg.weight_decay if is_decayed else 0.0,
        }
        for (is_head, is_decayed), parameters in members.items()
    ]
    if cfg.kind == "sgd":
        return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=cfg.lr, foreach=True)
    adam = torch.optim.Adam if cfg.kind == "adam" else torch.optim.AdamW
    return adam(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def learning_rate(cfg: OptimConfig, *, warmup: int, total: int, cycle: int = 0) -> Callable[[int], float]:
    """Learning rate of the update that leads from `step` to `step + 1`, for a run of `total` steps.

    Args:
        cycle: steps of a way up and down of triangular2 (Smith 2017), which starts at `lr_low`.
    """

    def at(step: int) -> float:
        if cycle:
            turn, within = divmod(max(0, step - warmup), cycle)
            height = (1.0 - abs(2.0 * within / cycle - 1.0)) / 2**turn
            return (cfg.lr_low + (cfg.lr - cfg.lr_low) * height) * min(1.0, (step + 1) / (warmup + 1))
        progress = min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))
        shape = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "linear": 1.0 - progress}
        return cfg.lr * min(1.0, (step + 1) / (warmup + 1)) * shape[cfg.schedule]

    return at


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


def gradients(model: nn.Module) -> list[Tensor]:
    """Gradients of the parameters that took part."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def clip(cfg: ClipConfig | None, grads: list[Tensor], norm: Tensor) -> None:
    """Limit the reduced gradient in place, by its global `norm` or element by element."""
    if cfg is None or not grads:
        return
    if cfg.kind == "norm":
        torch._foreach_mul_(grads, (cfg.limit / (norm + 1e-6)).clamp(max=1.0))
    else:
        torch._foreach_clamp_min_(grads, -cfg.limit)
        torch._foreach_clamp_max_(grads, cfg.limit)


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state by parameter: `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`; nothing for SGD."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_moments(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put `moments` back, in the memory layout of the parameters; raises `CheckpointError` for a foreign name."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in saved.items():
        key, _, name = full_name.partition("/")
        if name not in parameters or (value.ndim > 0 and value.shape != parameters[name].shape):
            raise CheckpointError(f"optimizer state {full_name} {list(value.shape)} does not fit this model")
        parameter = parameters[name]
        place = torch.empty_like(parameter) if value.ndim else value.new_empty((), device=parameter.device)
        optimizer.state[parameter][key] = place.copy_(value)


@dataclass
class Plateau:
    """Lowers the learning rate when the score stands still; without settings it never does.

    The rule of ReduceLROnPlateau: relative threshold, lower is better, more than `patience` bad evaluations in a row.
    """

    cfg: PlateauConfig | None
    factor: float = 1.0
    best: float | None = None
    num_bad: int = 0

    def see(self, score: float) -> None:
        """Take note of an evaluation."""
        if self.cfg is None:
            return
        if math.isfinite(score) and (self.best is None or score < self.best * (1 - self.cfg.threshold)):
            self.best, self.num_bad = score, 0
            return
        self.num_bad += 1
        if self.num_bad > self.cfg.patience:
            self.factor, self.num_bad = self.factor * self.cfg.factor, 0

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"factor": self.factor, "best": self.best, "num_bad": self.num_bad}

    def load(self, facts: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.factor, self.best, self.num_bad = facts["factor"], facts["best"], facts["num_bad"]


@dataclass
class LossScale:
    """Keeps fp16 gradients above the smallest number fp16 has: the loss is multiplied by `value`, the gradient divided.

    After an overflow the scale is halved and the update left out; after `GROWS_AFTER` updates without one it is
    doubled. In any other precision it is 1 and stays so.
    """

    is_on: bool
    value: float = 1.0
    num_good: int = 0

    def __post_init__(self) -> None:
        self.value = FIRST_SCALE if self.is_on else 1.0

    def __bool__(self) -> bool:
        return self.is_on

    def see(self, *, has_overflow: bool) -> None:
        """Take note of a step."""
        if not self.is_on:
            return
        self.num_good = 0 if has_overflow else self.num_good + 1
        if has_overflow:
            self.value /= 2
        elif self.num_good == GROWS_AFTER:
            self.value, self.num_good = min(2 * self.value, LARGEST_SCALE), 0

    @property
    def is_lost(self) -> bool:
        """Below 1 the scale would make gradients smaller: it is not the scale that overflows."""
        return self.value < 1

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value, "num_good": self.num_good}

    def load(self, facts: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.value, self.num_good = facts["value"], facts["num_good"]


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, a scalar on their device; not finite if any element is not."""
    return torch.nn.utils.get_total_norm(list(grads), foreach=True)
