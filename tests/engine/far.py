"""Devices that nothing can be read from, to prove where tensors lie and when the host waits, without a GPU.

`meta` is in every torch. Tensors of CUDA without memory (`FakeTensorMode`) need a CUDA build of torch, and no driver: a
fused optimizer is that of CUDA. On both a run is the real one; reading a value or a size that depends on values raises.
`Copies` refuses operations that mix the devices, and notes copies between them and what reads values unseen. What needs
a driver has a stand-in: backward (`zero_gradients`), pinned memory, noise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.models import build_model
from ddpm_lmk.system import accelerator
from ddpm_lmk.tasks import DenoiseTask, Task
from tests.engine.toy import ToyTrain

SPEC = SPECS["phantom-chest"]
# Not by default: with torch 2.13 on Python 3.13.0 the tests pass, but the process has been seen to crash at its end.
HAS_CUDA = torch.version.cuda is not None and os.environ.get("LMK_FAKE_CUDA") == "1"
NO_CUDA = "tensors of CUDA without memory: set LMK_FAKE_CUDA=1, with a CUDA build of torch"
COPIES = ("_to_copy", "copy_", "_foreach_copy_")
# What reads a result of the device on the host in its CUDA version (aten/src/ATen/native), and raises on no other
# device without values: did a factorisation work, are these probabilities, is a deviation negative.
READS = (
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "linalg_matrix_exp"),
    *("multinomial", "normal", "histc"),
)
DEVICES = [
    pytest.param("meta", id="meta"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason=NO_CUDA)),
]


class FarDevice(Parallel):
    """A process whose device gives nothing back but what is exchanged; that is counted."""

    def __init__(self, kind: str) -> None:
        super().__init__("cpu")
        self.device, self.exchanged = torch.device(kind, 0) if kind == "cuda" else torch.device(kind), 0

    def wrap(self, model: nn.Module) -> nn.Module:
        assert all(parameter.device == self.device for parameter in model.parameters())
        return model  # `to` replaces parameters that have no memory, of which the optimizer would know nothing

    def exchange(self, values: Tensor) -> list[list[float]]:
        assert values.device == self.device
        self.exchanged += 1
        return [[1.0], [1.0], [0.0], [0.25]]


class Copies:
    """Copies between the host and the device: `waiting` to it and not beside its work, and those `home`, which wait.

    A copy to the device goes on beside the work of both where its source is pinned and it is not to block. Values that
    the host reads inside an operation are noted as `home`. Tensors of both in any other operation raise, as CUDA does.
    """

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.home: list[str] = []
        self.pinned: set[int] = set()
        self._kept: list[Tensor] = []  # an id is of one tensor while that is alive

    def pin(self, values: Tensor) -> Tensor:
        """Stands in for `Tensor.pin_memory`, which wants a driver; it makes memory of these strides and fills it."""
        assert values.device.type == "cpu", "only memory of the host is pinned"
        if torch._debug_has_internal_overlap(values) == 1:
            raise RuntimeError(f"{tuple(values.shape)} with strides {values.stride()} has an element twice in memory")
        copy = values.detach().view(values.shape)
        self._kept.append(copy)
        self.pinned.add(id(copy))
        return copy

    @contextmanager
    def watched(self) -> Iterator[Copies]:
        """Note what this thread does in the block."""
        with _Lists(self), _Operations(self):
            yield self


class _Lists(TorchFunctionMode):
    """What becomes a tensor of the device before the operation that `_Operations` sees."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", str(function))
        if name in ("tensor", "new_tensor") and _is_far(out) and out.numel():
            self._copies.waiting.append(f"{name} {tuple(out.shape)}")
        if name in ("__getitem__", "__setitem__") and _is_far(args[0]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list | range) for part in parts):
                self._copies.waiting.append(f"{name} by a list")
            if name == "__setitem__" and _is_far(args[2]) and any(map(_is_mask, parts)):  # a number is filled in
                self._copies.home.append(f"{name} of a tensor where a mask is true")
        return out


class _Operations(TorchDispatchMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(map(_is_far, given)) and name not in COPIES:
            self._check(operation, name, args, given)
        out = operation(*args, **kwargs)
        if name in COPIES:
            made, source = ([out], [args[0]]) if name == "_to_copy" else map(tree_leaves, args[:2])
            is_free = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            for one, other in zip(made, source):
                if _is_far(one) and not _is_far(other) and not (is_free and id(other) in self._copies.pinned):
                    self._copies.waiting.append(f"{name} {tuple(one.shape)}")
                if _is_far(other) and not _is_far(one):
                    self._copies.home.append(f"{name} {tuple(one.shape)}")
        return out

    def _check(self, operation: Any, name: str, args: Any, given: list[Tensor]) -> None:
        if name in READS:
            self._copies.home.append(name)
        if "index" in name and isinstance(args[1], Sequence):  # `index_select` and others take one tensor
            places = [place for place in args[1] if place is not None]
            given = [args[0], *(value for value in args[2:3] if value.ndim)]
            if _is_far(args[0]) and any(not _is_far(place) and place.ndim for place in places):
                self._copies.waiting.append(f"{name} by a tensor of the host")
            if any(map(_is_mask, places)) and args[2:] and args[2].numel() > 1:
                self._copies.home.append(f"{name} where a mask is true")
            if not _is_far(args[0]) and any(map(_is_far, places)):
                raise RuntimeError(f"{name}: indices of the device, values of the host")
        # A number may be a tensor of the host: kernels take it along.
        if any(not _is_far(value) and (value.ndim or torch.Tag.pointwise not in operation.tags) for value in given):
            shapes = [f"{value.device.type} {tuple(value.shape)}" for value in given]
            raise RuntimeError(f"{name}: wanted all on the same device, not {', '.join(shapes)}")


def _is_far(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _is_mask(value: Any) -> bool:
    return _is_far(value) and value.dtype in (torch.bool, torch.uint8)


def zero_gradients(loss: Tensor) -> None:
    """Stands in for `backward`, which wants a driver: zeros for every parameter that it would come to."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parameter = getattr(node, "variable", None)  # of the nodes that add to a leaf's gradient
        if isinstance(parameter, Tensor) and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def far_device(kind: str, copies: Copies) -> Iterator[FarDevice]:
    """The device while the block lasts, with stand-ins for what it cannot do."""
    parallel = FarDevice(kind)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no `meta`, and wants a driver
        patch.setattr(clip_grad, "_device_has_foreach_support", lambda device: True)  # nor does this know `meta`
        draw = torch.randn_like
        patch.setattr(DenoiseTask, "noise", lambda self, images, positions, stream="eps": draw(images))
        patch.setattr(accelerator, "_is_cuda", lambda device: torch.device(device).type == kind)
        patch.setattr(accelerator, "name", lambda device: "a GPU without memory")
        patch.setattr(Tensor, "pin_memory", lambda values: copies.pin(values))  # noqa: PLW0108 - a method must be a function
        if kind == "cuda":
            patch.setattr(Tensor, "backward", zero_gradients)
            stack.enter_context(warnings.catch_warnings())  # of a look at whether two tensors share memory, once
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield parallel


def far_model(cfg: RunConfig, task: Task, device: torch.device) -> nn.Module:
    """The network of a run, made on the host and brought to the device, as a session does."""
    with real():
        network = build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)
        wrapped = task.wrap(network)
    return wrapped.to(device)


def real() -> AbstractContextManager[Any]:
    """Tensors of the host made in the block have values, also where those of the device have none."""
    return unset_fake_temporarily()


class FullTrain(ToyTrain):
    """The toy's positions, with images of full size, points, and finer copies where the run file wants some."""

    def global_batches(self, start_step: int) -> Any:
        data = self.cfg.data
        groups = super().global_batches(start_step)
        while True:
            with real():
                group = next(groups)
                batches = [
                    replace(
                        batch,
                        images=torch.zeros(len(batch), 1, data.image_size, data.image_size),
                        points=torch.full((len(batch), self.spec.num_landmarks, 2), 3.0),
                        fine=None
                        if data.fine_size is None
                        else torch.zeros(len(batch), 1, data.fine_size, data.fine_size, dtype=torch.uint8),
                        to_fine=None if data.fine_size is None else torch.eye(2, 3).repeat(len(batch), 1, 1),
                    )
                    for batch in group.micro_batches
                ]
            yield replace(group, micro_batches=batches)
