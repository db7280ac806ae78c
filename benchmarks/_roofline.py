"""The operations of a training step: who asks for each, what it takes, and the least it can take on this machine.

A step is taken once more under a dispatch mode, which times every operation by itself. In the forward pass it belongs
to the module that is at work; in the backward pass to the one that was when the node of the graph was made. The least
is the longer of two times: for its arithmetic at the rate of a large matrix product or convolution, whichever is faster
here, and for moving each of its tensors once at the rate of a copy as large. Between the two stands the same operation
alone, repeated on tensors that are warm: what its kernel can do. What a step takes beyond its operations is Python,
autograd and dispatch.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from _subject import Subject
from torch import Tensor, nn
from torch._C import _current_autograd_node  # what the profiler goes by
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ddpm_lmk.bench import Result, compare_paired
from ddpm_lmk.models import blocks
from ddpm_lmk.system import accelerator
from ddpm_lmk.system.console import progress

JOINS, STANDARDISED, TIME, LOSS, UPDATE = "sums and joins", "standardised weights", "time embedding", "loss", "update"
MODULES: tuple[tuple[type[nn.Module], str], ...] = (  # the first that fits
    (blocks.PointwiseConv2d, "1x1 convolution"),
    (nn.Conv2d, "convolution"),
    (blocks.GroupNorm, "norm, FiLM, SiLU"),
    (blocks.Block, "norm, FiLM, SiLU"),
    (blocks.LinearAttention, "linear attention"),
    (blocks.Attention, "attention"),
)
NO_MODULE = {  # operations of the engine
    "native_layer_norm": STANDARDISED,
    "native_layer_norm_backward": STANDARDISED,
    "_fused_adamw_": "optimizer",
    "_foreach_lerp_": "average of weights",
}
NO_WORK = {f"aten::{name}" for name in ("detach", "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view")}
OF_DATA, OF_WEIGHTS = [True, False, False], [False, True, True]  # which gradients of a convolution
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
COPIES = tuple(2**power for power in range(15, 27, 2))  # bytes of an array
COPIED_A_CALL = 2**25  # bytes; small arrays are copied many times


@dataclass(frozen=True)
class Operation:
    """One call of a kernel.

    Attributes:
        level: side of the maps it works on, pixels; 0: on none.
        moved: bytes of its tensors, each once.
        key: the same of operations that are alike.
    """

    level: int
    group: str
    flops: int
    moved: int
    dtype: torch.dtype
    key: tuple[Any, ...]

    def least_s(self, peaks: dict[torch.dtype, float], copies: dict[int, float]) -> float:
        """Seconds at these rates: operations per second by type, bytes per second by how many a copy moves."""
        size = max((moved for moved in copies if moved <= self.moved), default=min(copies))
        return max(self.flops / peaks[self.dtype] if self.flops else 0.0, self.moved / copies[size])


class Recorder(TorchDispatchMode):
    """Times what runs under it.

    Attributes:
        operations: in order; the same ones in every step.
        busy_s: what each took.
        alone: by key, a call that does the operation again; not of those that work in place.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations: list[Operation] = []
        self.busy_s: list[float] = []
        self.alone: dict[tuple[Any, ...], Callable[[], object]] = {}
        time = {part for layer in getattr(model, "time_layers", list)() for part in layer.modules()}
        self._groups = {module: TIME if module in time else _group(module) for module in model.modules()}
        self._at_work: list[tuple[int, str]] = []  # level and group of the modules that are being called
        self._makers: dict[int, tuple[int, str]] = {}  # of each node, by its number

    def record(self, subject: Subject) -> None:
        """Take a step, and forget the one before."""
        for kept in (self.operations, self.busy_s, self._makers):
            kept.clear()
        with self._part(LOSS):
            subject.forward_backward()
        with self._part(UPDATE):
            subject.update()

    @contextmanager
    def _part(self, group: str) -> Iterator[None]:
        """Record what the block does; `group` is that of what no module asks for."""
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        self._at_work = [(0, group)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        level, group = self._at_work[-1]
        maps = [x for x in inputs if isinstance(x, Tensor) and x.ndim == 4]
        self._at_work.append((maps[0].shape[-1] if maps else level, self._groups.get(module, group)))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        self._at_work.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation and note it; the gradients of a convolution one by one, as the kernels do."""
        kwargs = kwargs or {}
        if func.is_view or func._schema.name in NO_WORK:
            return func(*args, **kwargs)
        if func is torch.ops.aten.convolution_backward.default and args[-1][0] and args[-1][1]:
            wanted = [False, *args[-1][1:]]
            data = self._run(func, (*args[:-1], OF_DATA), kwargs)
            return data[0], *self._run(func, (*args[:-1], wanted), kwargs)[1:]
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out: list[Any] = []
        self.busy_s.append(_busy_s(lambda: out.append(func(*args, **kwargs)), self.device))
        name = func._schema.name.removeprefix("aten::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        tensors = {x.data_ptr(): x for x in [*given, *tree_leaves(out)] if isinstance(x, Tensor)}.values()
        key = (func, *((x.shape, x.stride(), x.dtype) for x in given), str([x for x in args if isinstance(x, list)]))
        count = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_").replace("_for_cpu", ""), None))
        self.operations.append(
            Operation(
                *self._asked_by(name, args, given),
                flops=count(*args, **kwargs, out_val=out[0]) if count else 0,
                moved=sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors),
                dtype=next((x.dtype for x in given if x.is_floating_point()), torch.float32),
                key=key,
            )
        )
        if key not in self.alone and (not func._schema.is_mutable or func._overloadname == "out"):
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            self.alone[key] = partial(func, *args, **kwargs)
        return out[0]

    def _asked_by(self, name: str, args: tuple[Any, ...], given: list[Tensor]) -> tuple[int, str]:
        """Level and group."""
        node: Any = _current_autograd_node()
        maker = self._at_work[-1]
        if node is None:
            self._makers[torch.autograd._get_sequence_nr() - 1] = maker
        elif len(self._at_work) == 1:  # else a block is computed again
            maker = self._makers.get(node._sequence_nr(), maker)
        level, group = maker
        if level == 0:
            return level, NO_MODULE.get(name, group)
        if group == "convolution":
            way = "forward" if name == "convolution" else "of data" if args[-1] == OF_DATA else "of weights"
            return level, f"convolution, {way}" if name.startswith("convolution") else STANDARDISED
        if name in ("add", "add_", "cat"):
            return next((x.shape[-1] for x in given if x.ndim == 4 and x.shape[-2:] != (1, 1)), level), JOINS
        return level, group


def _group(module: nn.Module) -> str:
    """The group of what a module itself does."""
    rest = JOINS if list(module.children()) else type(module).__name__
    return next((group for kind, group in MODULES if isinstance(module, kind)), rest)


def _busy_s(call: Callable[[], object], device: str) -> float:
    _, cpu_s, device_s = accelerator.timed(call, device)
    return cpu_s if device_s is None else device_s


def measure_levels(result: Result, subject: Subject, options: argparse.Namespace) -> None:
    """Busy seconds of every group at every level: in the step, alone, and the least; and the step over the sums."""
    device, recorder = subject.device, Recorder(subject.model, subject.device)
    noted: list[list[tuple[Operation, float, float]]] = []  # in the step, and alone

    def record() -> None:
        recorder.record(subject)
        alone: dict[tuple[Any, ...], float] = {}
        for key, call in recorder.alone.items():
            call()  # its tensors are warm then
            alone[key] = _busy_s(call, device)
        times = zip(recorder.operations, recorder.busy_s, strict=True)
        noted.append([(operation, busy_s, alone.get(operation.key, busy_s)) for operation, busy_s in times])

    record()
    dtypes = {operation.dtype for operation in recorder.operations if operation.flops}
    noted.clear()
    peaks = {f"{name} {dtype}": call for dtype in dtypes for name, call in peak_calls(dtype, device).items()}
    calls: dict[str, Callable[[], object]] = {
        "train step": subject.step,
        "recorded": record,
        **_copies(device),
        **peaks,
    }
    with progress("bench step, levels", lines=False) as tell:
        found = result.budget.alternate(calls, rounds=options.rounds, device=device, tell=tell)
    step = found["train step"].busy_s
    places: dict[tuple[int, str], list[list[float]]] = defaultdict(lambda: [[0.0] * len(step) for _ in range(3)])
    for number, operations in enumerate(noted[found["train step"].warm_up :][: len(step)]):
        rates = {name: 1 / timings.busy_s[number] for name, timings in found.items()}
        flops = {
            dtype: max(work * rates[f"{name} {dtype}"] for name, work in peak_flops(device).items()) for dtype in dtypes
        }
        copies = {2 * size: 2 * COPIED_A_CALL * rates[f"copy {size}"] for size in COPIES}
        for operation, busy_s, alone_s in operations:
            for values, seconds in zip(
                places[operation.level, operation.group], (busy_s, alone_s, operation.least_s(flops, copies))
            ):
                values[number] += seconds
    clocks = ("device_s" if device == "cuda" else "cpu_s", "alone_s", "least_s")
    for (level, group), times in sorted(places.items(), key=lambda place: (-place[0][0], -median(place[1][0]))):
        own = [operation for operation in recorder.operations if (operation.level, operation.group) == (level, group)]
        figures = {"calls": len(own), "share_of_step_pct": 100 * median(times[0]) / median(step)}
        figures |= {"gflop": sum(each.flops for each in own) / 1e9, "gbyte": sum(each.moved for each in own) / 1e9}
        conditions = {**subject.conditions(), "level_px": level, "group": group}
        result.add("operations", dict(zip(clocks, times)), conditions=conditions, figures=figures)
    for name, timings in found.items():
        if name.startswith("copy"):
            result.add(name, timings).samples["gbyte_per_s"] = [2 * COPIED_A_CALL / s / 1e9 for s in timings.busy_s]
    for number, of in enumerate(("its operations", "its operations alone", "the least")):
        totals = [sum(values) for values in zip(*(times[number] for times in places.values()))]
        result.ratios.append(
            {"what": f"train step over {of}", "clock": "busy_s", **compare_paired(step, totals).facts()}
        )


def peak_flops(device: str) -> dict[str, float]:
    """Operations of the two calls that give the peak."""
    side = PEAK_SIDE[device]
    return {"peak matrix product": 2.0 * side**3, "peak convolution": 2.0 * 9 * (side // 8) ** 2 * 8 * 64**2}


def peak_calls(dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """A large matrix product and a 3x3 convolution."""
    side = PEAK_SIDE[device]
    a = torch.randn(side, side, device=device, dtype=dtype)
    x = torch.randn(8, side // 8, 64, 64, device=device, dtype=dtype)
    w = torch.randn(side // 8, side // 8, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return {"peak matrix product": lambda: torch.mm(a, a), "peak convolution": lambda: F.conv2d(x, w, padding=1)}


def _copies(device: str) -> dict[str, Callable[[], object]]:
    """Copies of arrays of several sizes, all of as many bytes."""

    def repeated(source: Tensor, target: Tensor) -> Callable[[], None]:
        def call() -> None:
            for _ in range(COPIED_A_CALL // source.nbytes or 1):
                target.copy_(source)

        return call

    pairs = {size: torch.ones(2, size // 4, device=device) for size in COPIES}
    return {f"copy {size}": repeated(*pair) for size, pair in pairs.items()}
