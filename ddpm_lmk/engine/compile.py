"""`torch.compile`: static shapes, a cache that outlives the run, and its time counted apart from training's.

What is compiled stays in a folder of the user's (`TORCHINDUCTOR_CACHE_DIR` where that is set; PyTorch's own choice is
under /tmp, which a node empties and anybody may fill), shared by all processes and workers of a sweep: the first run
on a machine compiles, later ones load. Compilation happens inside the first passes, of training and of evaluation,
and again where a shape is new; PyTorch says when.

Is channels-last kept through the whole network? Looked at in the first micro-batch of a run, then never again.

A layer that returns maps in the other layout is not wrong, but every layer after it copies them first, and nothing
else shows it. Which layers do depends on the device, the type and the version of PyTorch, so each run looks for itself:
at what every module gives, and at the gradient that comes back for it. The gradient of the output layer is the loss's
affair and left out. A compiled network chooses its layouts itself and is not looked at.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.optim import HEAD
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.requirements import want_graphs
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.system.console import say
from ddpm_lmk.system.heartbeat import beat

log = logging.getLogger(__name__)

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_model(model: nn.Module, cfg: RunConfig, device: torch.device) -> None:
    """Have the passes of `model` compiled when they first run, where the run asks for that.

    Raises:
        LaunchError: CUDA graphs on another device.
    """
    want_graphs(cfg, device.type)
    if not cfg.train.compile:
        return
    keep_compiled()
    model.compile(dynamic=False, mode="reduce-overhead" if cfg.train.cuda_graphs else None)


def keep_compiled() -> Path:
    """The folder that keeps compiled code, from now on; made, for this user alone, where nobody said another."""
    if CACHE not in os.environ:
        home = Path(os.environ.get("LMK_CACHE") or Path.home() / ".cache" / "ddpm-lmk")
        folder = home / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            from torch._inductor.runtime.cache_dir_utils import default_cache_dir

            log.warning(
                "compiled code cannot be kept in %s (%s), but until the node is emptied", folder, error.strerror
            )
            folder = Path(default_cache_dir())
        os.environ[CACHE] = str(folder)
    return Path(os.environ[CACHE])


class CompileClock:
    """Adds up the seconds this process compiles while the block lasts; rank 0 tells of each time.

    Attributes:
        seconds: so far.
    """

    def __init__(self, cfg: RunConfig, parallel: Parallel, run: RunDir) -> None:
        self.seconds = 0.0
        self._is_on, self._is_main, self._run = bool(cfg.train.compile), parallel.is_main, run
        self._began = 0.0

    def __enter__(self) -> CompileClock:
        if self._is_on:
            from torch._dynamo.callback import callback_handler  # seconds to import, and there already

            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_on:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, call: Any) -> None:
        beat("compile")  # takes longer than a step, and is no hang
        self._began = time.perf_counter()

    def _end(self, call: Any) -> None:
        taken = time.perf_counter() - self._began
        self.seconds += taken
        if self._is_main:
            folder = str(keep_compiled())
            self._run.event("model.compiled", seconds=round(taken, 2), cache=folder)
            self._run.note(compile={"seconds": round(self.seconds, 2), "cache": folder})
            say(f"compiled in {taken:.1f} s, {self.seconds:.1f} s so far; kept in {folder}")


KEPT = "kept"


@dataclass
class Layout:
    """The modules that broke it, in the order of the passes: of what they gave, and of the gradient they were given."""

    maps: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.maps and not self.gradients:
            return KEPT
        found = {"what": self.maps, "the gradient of what": self.gradients}
        words = [f"{part} {names[0]} gives{_more(names)}" for part, names in found.items() if names]
        return f"lost in {' and in '.join(words)}"


def watch_layout(cfg: RunConfig, model: nn.Module, parallel: Parallel, run: RunDir) -> AbstractContextManager[Any]:
    """Have the first micro-batch looked at, on rank 0, and `run.json` say what was seen; a loss is also a warning."""
    if not cfg.train.channels_last or cfg.train.compile or not parallel.is_main:
        return nullcontext()

    def tell(seen: Layout) -> None:
        run.note(channels_last=str(seen))
        if str(seen) != KEPT:
            message = f"channels-last is {seen} on {parallel.device.type}: every layer after it copies its maps first"
            log.warning("%s; time train.channels_last=false too", message)
            run.event("warning", message=message)

    return LayoutWatch(model, tell)


class LayoutWatch:
    """Watches one forward and backward pass of `model` in training; a context manager around training.

    Args:
        tell: called once, with what was seen, when the second pass begins or the block is left.
    """

    def __init__(self, model: nn.Module, tell: Callable[[Layout], None]) -> None:
        self._model, self._tell = model, tell
        self._seen = Layout()
        self._hooks: list[Any] = []
        self._passes = 0

    def __enter__(self) -> LayoutWatch:
        for name, module in self._model.named_modules():
            if module is not self._model:
                self._hooks.append(module.register_forward_hook(partial(self._look, name)))
        self._hooks.append(self._model.register_forward_pre_hook(self._begin))
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
        self._finish(is_told=self._passes > 0 and error is None)

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        self._passes += _is_training(model)
        if self._passes > 1:
            self._finish(is_told=True)

    def _look(self, name: str, module: nn.Module, inputs: Any, out: Any) -> None:
        if not _is_training(self._model) or not isinstance(out, Tensor) or out.ndim != 4:
            return
        if _is_broken(out):
            self._seen.maps.append(name)
        if out.requires_grad and HEAD not in name.split("."):
            self._hooks.append(out.register_hook(partial(self._look_back, name)))

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if _is_broken(gradient):
            self._seen.gradients.append(name)

    def _finish(self, *, is_told: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks and is_told:
            self._tell(self._seen)
        self._hooks = []


def _is_training(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _is_broken(value: Tensor) -> bool:
    """Do channels not lie side by side? They do in a part of a map's channels too, which is not contiguous."""
    channels, height, width = value.shape[1:]
    return channels > 1 and height * width > 1 and value.stride(1) > 1


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
