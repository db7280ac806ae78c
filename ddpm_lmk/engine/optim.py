"""Optimizer, learning rate and clipping.

The learning rate is a function of the step, set by the loop before every update; there is no scheduler object, because
Accelerate would step a prepared one once per process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import ClipConfig, OptimConfig
from ddpm_lmk.errors import CheckpointError

HEAD = "final_conv"


def parameter_groups(cfg: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Up to four groups: output layer or trunk, with or without weight decay.

    Every group carries `share`, what the learning rate of the step is multiplied by. What is frozen, here or by
    its task, is in no group.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_head = HEAD in name.split(".")
        # Before anything else is made: average, DDP and DeepSpeed all leave out what has no gradient.
        if cfg.freeze == "trunk" and not is_head:
            parameter.requires_grad = False
        if not parameter.requires_grad:  # no gradient, so no decay and no moments either
            continue
        # Norms and biases have one dimension; decaying them is the paper's way (`decay_all`), not the usual one.
        key = (is_head, cfg.decay_all or parameter.ndim > 1)
        members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "share": cfg.head_lr / cfg.lr if is_head and cfg.head_lr is not None else 1.0,
            "weight_decay": cfg.weight_decay if is_decayed else 0.0,
        }
        for (is_head, is_decayed), parameters in members.items()
    ]


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, Adam or plain SGD over `parameter_groups`."""
    groups = parameter_groups(cfg, model)
    if cfg.kind == "sgd":
        return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=cfg.lr, foreach=True)
    adam = torch.optim.Adam if cfg.kind == "adam" else torch.optim.AdamW
    # One kernel over all parameters; the bits of a run on a CPU are those of this implementation.
    return adam(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def learning_rate(cfg: OptimConfig, *, warmup: int, total: int, cycle: int = 0) -> Callable[[int], float]:
    """Learning rate of the update that leads from `step` to `step + 1`, for a run of `total` steps.

    Args:
        cycle: steps of a way up and down of triangular2 (Smith 2017), which starts at `lr_low`.
    """

    def at(step: int) -> float:
        # Smith 2017, triangular2: every peak is half as high as the one before.
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
        # On the device, also where nothing is to be clipped: a branch would wait for the norm.
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
    # Moments of a session before would survive for parameters the file does not name.
    optimizer.state.clear()
    for full_name, value in saved.items():
        key, _, name = full_name.partition("/")
        if name not in parameters or (value.ndim > 0 and value.shape != parameters[name].shape):
            raise CheckpointError(f"optimizer state {full_name} {list(value.shape)} does not fit this model")
        parameter = parameters[name]
        # Files are contiguous; fused AdamW wants moments in the memory layout of the parameter.
        place = torch.empty_like(parameter) if value.ndim else value.new_empty((), device=parameter.device)
        optimizer.state[parameter][key] = place.copy_(value)


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, a scalar on their device; not finite if any element is not."""
    return torch.nn.utils.get_total_norm(list(grads), foreach=True)
