"""Optimizer, learning rate and clipping.

The learning rate is a function of the step, set by the loop before every update; there is no scheduler object, because
Accelerate would step a prepared one once per process.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import ClipConfig, OptimConfig
from ddpm_lmk.errors import CheckpointError

HEAD, STEM = "final_conv", "init_conv"
MOMENTUM = 0.95  # of Muon, with the three numbers and the count of its iteration (Jordan et al. 2024)
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
RMS_OF_ADAMW = 0.2  # of an update of AdamW at rate 1 (Liu et al. 2025, "Muon is scalable for LLM training")


def parameter_groups(cfg: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Up to four groups, output layer or trunk, with or without weight decay; with Muon one more, of matrices.

    Every group carries `share`, what the learning rate of the step is multiplied by. What is frozen, here or by
    its task, is in no group.
    """
    members: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_head = HEAD in name.split(".")
        # Before anything else is made: average, buckets and DeepSpeed all leave out what has no gradient.
        if cfg.freeze == "trunk" and not is_head:
            parameter.requires_grad = False
        if not parameter.requires_grad:  # no gradient, so no decay and no moments either
            continue
        # Norms and biases have one dimension; decaying them is the paper's way (`decay_all`), not the usual one.
        is_matrix = cfg.kind == "muon" and parameter.ndim > 1 and not is_head and STEM not in name.split(".")
        key = (is_head, cfg.decay_all or parameter.ndim > 1, is_matrix)
        members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "share": cfg.head_lr / cfg.lr if is_head and cfg.head_lr is not None else 1.0,
            "weight_decay": cfg.weight_decay if is_decayed else 0.0,
            "is_matrix": is_matrix,
        }
        for (is_head, is_decayed, is_matrix), parameters in members.items()
    ]


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, Muon, Adam or plain SGD over `parameter_groups`."""
    groups = parameter_groups(cfg, model)
    if cfg.kind == "sgd":
        return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=cfg.lr, foreach=True)
    if cfg.kind == "muon":
        return Muon(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    adam = torch.optim.Adam if cfg.kind == "adam" else torch.optim.AdamW
    # One kernel over all parameters; the bits of a run on a CPU are those of this implementation.
    return adam(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the groups with `is_matrix`, AdamW for the others (docs/method.md, section 13).

    A kernel [out, in, height, width] is the matrix [out, in * height * width]. `torch.optim.Muon` takes tensors of two
    dimensions only, and one by one. `betas` and `eps` are AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr})
        others = [group for group in self.param_groups if not group["is_matrix"]]
        # It shares the groups, and below the state: rates are set and moments are saved in one place.
        self._others = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        self._others.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group["is_matrix"]:
                self._step_of(group["params"], lr=group["lr"], weight_decay=group["weight_decay"])
        self._others.step()

    def _step_of(self, matrices: list[Tensor], *, lr: float, weight_decay: float) -> None:
        by_shape: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            if matrix.grad is not None:
                by_shape[len(matrix), matrix[0].numel()].append(matrix)
        for shape, alike in by_shape.items():  # one product for all of a shape
            for matrix in alike:
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            averages = [self.state[matrix]["momentum"] for matrix in alike]
            grads = [matrix.grad for matrix in alike if matrix.grad is not None]
            torch._foreach_lerp_(averages, grads, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(grads, averages, MOMENTUM)  # Nesterov's
            updates = orthogonalised(torch.stack([step.flatten(1) for step in ahead]))
            torch._foreach_mul_(alike, 1 - lr * weight_decay)
            # The root makes the mean square of an update that of AdamW, whatever the shape: one rate serves both.
            scale = -lr * RMS_OF_ADAMW * math.sqrt(max(shape))
            torch._foreach_add_(alike, [update.view_as(matrix) for update, matrix in zip(updates, alike)], alpha=scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, about: singular values in [0.68, 1.14] but for tiny ones.

    Newton-Schulz's iteration of degree five, X <- (a + b R + c R^2) X with R = X X^T. Only R and the product of the
    factors are carried along, both square: half of the time with kernels of 3x3. In fp32, since R has the squares of
    singular values, of which bf16 would lose the small ones.

    Args:
        matrices: [count, rows, columns]; a matrix of zeros stays one.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT.contiguous()
    a, b, c = NEWTON_SCHULZ
    start = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = start @ start.mT
    product: Tensor | None = None
    for number in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if number < ITERATIONS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ start


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


def gradient_views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """By parameter, the part of a flat tensor that is its gradient, in the memory layout of the parameter."""
    starts = itertools.accumulate((p.numel() for p in parameters), initial=0)
    return [torch.as_strided(flat, p.shape, p.stride(), start) for p, start in zip(parameters, starts)]


def global_norm(grads: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, a scalar on their device; not finite if any element is not."""
    return torch.nn.utils.get_total_norm(list(grads), foreach=True)
