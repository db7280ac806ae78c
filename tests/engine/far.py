"""Devices that nothing can be read from, to prove where tensors lie and when the host waits, without a GPU.

`meta` is in every torch. Tensors of CUDA without memory (`FakeTensorMode`) need a CUDA build of torch, and no driver:
unlike `meta`, they refuse a tensor of the host in every operation, a fused optimizer and pinned memory are those of
CUDA. On both a run is the real one; reading a value or a size that depends on values raises. Copies to and from the
device are noted by `Copies`. What needs a driver has a stand-in: backward (`zero_gradients`), pinned memory, noise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
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

    A copy to CUDA goes on beside the work of host and device where its source is pinned and it is not to block.
    """

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.home: list[str] = []
        self.pinned: set[int] = set()
        self._kept: list[Tensor] = []  # an id is of one tensor while that is alive

    def pin(self, values: Tensor) -> Tensor:
        """Stands in for `Tensor.pin_memory`, which wants a driver."""
        copy = values.detach().view(values.shape)
        self._kept.append(copy)
        self.pinned.add(id(copy))
        return copy

    @contextmanager
    def watched(self) -> Iterator[Copies]:
        """Note what happens in the block."""
        with _Uploads(self), _Downloads(self):
            yield self


class _Uploads(TorchFunctionMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if not isinstance(out, Tensor) or out.device.type == "cpu" or out.numel() == 0:
            return out
        is_new = name in ("tensor", "as_tensor", "new_tensor")
        sources = [value for value in args if isinstance(value, Tensor) and value.device.type == "cpu"]
        is_copy = name in ("to", "cuda", "copy_") and bool(sources)
        is_free = bool(kwargs.get("non_blocking"))
        if out.device.type == "cuda":
            is_free = is_free and all(id(source) in self._copies.pinned for source in sources)
        if (is_new or is_copy) and not is_free:
            self._copies.waiting.append(f"{name} {tuple(out.shape)}")
        return out


class _Downloads(TorchDispatchMode):
    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_foreach_copy_"):
            given = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
            made = given[:1] if name == "copy_" else [value for value in tree_leaves(out) if isinstance(value, Tensor)]
            if any(value.device.type != "cpu" for value in given) and any(v.device.type == "cpu" for v in made):
                self._copies.home.append(f"{name} {tuple(made[0].shape)}")
        return out


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
        if kind == "cuda":
            patch.setattr(accelerator, "name", lambda device: "a GPU without memory")
            patch.setattr(Tensor, "pin_memory", lambda values: copies.pin(values))  # noqa: PLW0108 - a method must be a function
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
                        to_native=torch.eye(2, 3).repeat(len(batch), 1, 1),
                        fine=None
                        if data.fine_size is None
                        else torch.zeros(len(batch), 1, data.fine_size, data.fine_size, dtype=torch.uint8),
                        to_fine=None if data.fine_size is None else torch.eye(2, 3).repeat(len(batch), 1, 1),
                    )
                    for batch in group.micro_batches
                ]
            yield replace(group, micro_batches=batches)
