"""Weight standardization: 3x3 kernels with mean 0 and variance 1 (docs/method.md, section 1), once per optimizer step.

The released code standardizes in every forward pass. Weights only change at an update, so `OncePerStep` does it before
the first micro-batch of a step. Backward passes then leave the gradient with respect to the *standardized* weight in
`weight.grad`, where accumulation, all-reduce or the tree of class exact add it up like any other, and one product with
the Jacobian turns the sum into the gradient of the weight. The Jacobian is linear and the same for all micro-batches
and ranks, so the result is the same but for rounding: once instead of once per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics are computed in: fp32, or fp64 for fp64 tensors."""
    return torch.promote_types(dtype, torch.float32)


def standardized(weight: Tensor) -> Tensor:
    """Each output channel of a conv weight [O, I, kh, kw] to mean 0, variance 1 (biased, eps 1e-5); layout is kept."""
    view = _rows(weight)
    flat = view.flatten(1).to(at_least_fp32(weight.dtype))
    # A layer norm over each row is the same formula in one kernel, with a backward pass that keeps two numbers a row.
    return _like_weight(F.layer_norm(flat, flat.shape[1:], eps=EPS), weight)


class WeightStandardizedConv2d(nn.Conv2d):
    """3x3 convolution with a standardized weight.

    Attributes:
        unit: the standardized weight while `OncePerStep` provides it; else it is computed in every pass.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.unit: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        unit = standardized(self.weight) if self.unit is None else StandIn.apply(self.weight, self.unit)
        return F.conv2d(x, unit.to(x.dtype), self.bias, padding=1)


class StandIn(torch.autograd.Function):
    """`unit` in the place of `weight`, whose gradient becomes that of `unit`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, unit: Tensor) -> Tensor:
        """The values of `unit`."""
        ctx.dtype = weight.dtype
        return unit.view_as(unit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        return grad.to(ctx.dtype), None


@dataclass
class _Kernel:
    """One convolution, its standardized weight, and mean and 1 / deviation of each output channel [O, 1]."""

    conv: WeightStandardizedConv2d
    unit: Tensor
    mean: Tensor
    rstd: Tensor


class OncePerStep:
    """Provides the standardized weights of `model` from `begin` to `end`, which makes its gradients those of weights.

    Args:
        dtype: what convolutions compute in, so that no pass has to convert; None: the type of the statistics.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._convs = [module for module in model.modules() if isinstance(module, WeightStandardizedConv2d)]
        self._dtype = dtype
        self._kernels: list[_Kernel] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Standardize the weights as they are now. The tensors stay the same ones, which a CUDA graph needs."""
        found = [self._kernel(conv) for conv in self._convs]
        if self._kernels:  # a recorded CUDA graph reads these addresses
            for kept, new in zip(self._kernels, found, strict=True):
                kept.unit.copy_(new.unit)
                kept.mean, kept.rstd = new.mean, new.rstd
        else:
            self._kernels = found
        for kernel in self._kernels:
            kernel.conv.unit = kernel.unit

    @torch.no_grad()
    def end(self) -> None:
        """Multiply the gradients by the Jacobian, in place, and let the weights be standardized in passes again."""
        for kernel in self._kernels:
            weight, grad = kernel.conv.weight, kernel.conv.weight.grad
            if grad is not None and kernel.conv.unit is not None:
                grad.copy_(_through(weight, grad, kernel))
        self.drop()

    def drop(self) -> None:
        """Forget the standardized weights; gradients are left as they are."""
        for conv in self._convs:
            conv.unit = None

    def _kernel(self, conv: WeightStandardizedConv2d) -> _Kernel:
        flat = _rows(conv.weight).flatten(1).to(at_least_fp32(conv.weight.dtype))
        unit, mean, rstd = torch.native_layer_norm(flat, flat.shape[1:], None, None, EPS)
        unit = unit if self._dtype is None else unit.to(self._dtype)
        return _Kernel(conv, _like_weight(unit, conv.weight), mean, rstd)


def _through(weight: Tensor, grad: Tensor, kernel: _Kernel) -> Tensor:
    """The gradient of a weight, from that of its standardized form."""
    flat = _rows(weight).flatten(1).to(kernel.mean.dtype)
    towards = (grad.permute(0, 2, 3, 1) if _is_by_channel(weight) else grad).flatten(1).to(flat.dtype)
    back = torch.ops.aten.native_layer_norm_backward(
        towards, flat, flat.shape[1:], kernel.mean, kernel.rstd, None, None, [True, False, False]
    )
    return _like_weight(back[0], weight)


def _is_by_channel(weight: Tensor) -> bool:
    """Is it channels-last in memory?"""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _rows(weight: Tensor) -> Tensor:
    """A view in the order of memory, output channels first: flattening it copies nothing in either layout."""
    return weight.permute(0, 2, 3, 1) if _is_by_channel(weight) else weight


def _like_weight(flat: Tensor, weight: Tensor) -> Tensor:
    """Rows [O, I kh kw] in the order of memory, in the shape and layout of the weight."""
    view = flat.view(_rows(weight).shape)
    return view.permute(0, 3, 1, 2) if _is_by_channel(weight) else view
