"""`torch.compile`: static shapes, a cache that outlives the run, and its time counted apart from training's.

What is compiled stays in a folder of the user's (`TORCHINDUCTOR_CACHE_DIR` where that is set; PyTorch's own choice is
under /tmp, which a node empties and anybody may fill), shared by all processes and workers of a sweep: the first run
on a machine compiles, later ones load. Compilation happens inside the first passes, of training and of evaluation,
and again where a shape is new; PyTorch says when.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ddpm_lmk.config import RunConfig
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
