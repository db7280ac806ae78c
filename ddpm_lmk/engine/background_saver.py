"""Saving beside training: the state is copied, and a thread of rank 0 writes the copy.

Training waits for the copy only, and for the write before it if that is not done yet. Host tensors are copied into
buffers that are used again; device tensors are cloned where they are, which takes the time of reading them once, and
brought to pinned host buffers by the writing thread on a stream of its own. What the disk said comes back with the next
save, or when somebody waits. There is one write at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.rundir.checkpoint import Tensors
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.retention import Keep
from ddpm_lmk.system import accelerator
from ddpm_lmk.system.heartbeat import beat

log = logging.getLogger(__name__)


class Checkpointer:
    """Writes checkpoints and snapshots of one run in the background for as long as the `with` block lasts.

    Every rank makes the same calls; an error of the write is raised on all of them.
    """

    def __init__(self, run: RunDir, parallel: Parallel, *, keep: Keep) -> None:
        self._run, self._parallel, self._keep = run, parallel, keep
        # One thread: saves stay in order, and no two need buffers at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[Any] | None = None
        self._was_saved = True
        self._copy = HostCopy()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, raised: type[BaseException] | None, *unused: object) -> None:
        """Let the write that is under way come to its end; leaving without an error also raises what it met."""
        try:
            if raised is None:
                self.wait()
        finally:
            # Also where training failed: a half-written folder would be thrown away, a whole one is one step less to
            # repeat.
            self._thread.shutdown()

    def save(self, state: TrainState, moments: Mapping[str, Tensor]) -> None:
        """Begin to write `state` as it is now, with the optimizer state `moments` by name.

        Raises:
            LmkError: the write before this one ended the run; see `RunDir.save_checkpoint`.
        """
        # Counters are read now, on every rank alike; the thread must not look at a state that trains on.
        tensors, facts, pinned = state.tensors(moments), state.facts(), {state.patience.best_step}

        def write() -> None:
            copy = self._copy.on_host()
            self._was_saved = self._run.save_checkpoint(copy, facts, keep=self._keep, pinned=pinned)

        self._parallel.on_main(lambda: self._begin(tensors, write))

    def keep_weights(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begin to write a snapshot of the weights as they are now; raises as `save` does."""
        self._parallel.on_main(
            lambda: self._begin(state.weights(), lambda: self._run.save_snapshot(self._copy.on_host(), meta))
        )

    def wait(self) -> bool:
        """Wait until nothing is being written; was the last save a success?

        Raises:
            LmkError: the write ended the run.
        """
        beat("write")  # a disk that wrote beside training until now is waited for here, which is slower than a save
        return self._parallel.on_main(self._finish)

    def _begin(self, tensors: Tensors, write: Callable[[], Any]) -> None:
        self._finish()
        self._copy.take(tensors)
        self._write = self._thread.submit(write)

    def _finish(self) -> bool:
        if self._write is not None:
            write, self._write = self._write, None
            write.result()
        return self._was_saved


class HostCopy:
    """A copy of tensors that may change the moment `take` returns."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._files: tuple[str, ...] = ()
        self._taken: dict[tuple[str, str], Tensor] = {}
        self._ready: accelerator.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Tensors) -> None:
        """Copy; the caller waits for memory to be read once, where it is. `on_host` must be done with the last one."""
        sources = {(file, name): value for file, group in tensors.items() for name, value in group.items()}
        on_device = [key for key, value in sources.items() if _is_away(value)]
        at_home = [key for key, value in sources.items() if not _is_away(value)]
        try:
            places = {key: torch.empty_like(v) if _is_away(v) else self._buffer(key, v) for key, v in sources.items()}
        # A save must not end a run that fits: slower, and only this time.
        except torch.OutOfMemoryError:
            log.warning("no device memory for a copy of the state: training waits until it is on the host")
            places = {key: self._buffer(key, value) for key, value in sources.items()}
        for keys in filter(None, (on_device, at_home)):  # one call copies all at once only where all are in one place
            torch._foreach_copy_([places[key] for key in keys], [sources[key] for key in keys])
        self._files, self._taken = tuple(tensors), places
        # The thread waits for the clones, not for what the device is given after them.
        self._ready = accelerator.queued(sources[on_device[0]].device) if on_device else None

    @torch.no_grad()
    def on_host(self) -> Tensors:
        """The copy by file and name, in host memory; for the writing thread."""
        away = {key: value for key, value in self._taken.items() if _is_away(value)}
        if away:
            places = {key: self._buffer(key, value) for key, value in away.items()}
            # Its own stream, so that the copy to the host does not wait behind the kernels of the next steps.
            with accelerator.SideStream(next(iter(away.values())).device).work(after=self._ready):
                torch._foreach_copy_(list(places.values()), list(away.values()), non_blocking=True)
            self._taken |= places
        files: dict[str, dict[str, Tensor]] = {file: {} for file in self._files}
        for (file, name), value in self._taken.items():
            files[file][name] = value
        return files

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        """Host memory of the size, type and layout of `like`: the same as last time where that still fits."""
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (like.shape, like.dtype, like.stride()):
            # Pinned memory takes long to get and is used for every save of the run.
            buffer = self._buffers[key] = torch.empty_like(like, device="cpu", pin_memory=_is_away(like))
        return buffer


def _is_away(value: Tensor) -> bool:
    return value.device.type != "cpu"
