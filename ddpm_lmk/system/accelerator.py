"""The accelerator: all that this package asks of `torch.cuda`, with what a CPU answers in its place.

Callers pass the device they have and do not ask of which kind it is; `tests/test_imports.py` finds every other use.
The one module of `system` that imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ddpm_lmk.system import machine

Device = torch.device | str
Event = torch.cuda.Event


def is_available() -> bool:
    """Is there a CUDA device, and can this torch use it?"""
    return torch.cuda.is_available()


def devices() -> list[torch.device]:
    """The CUDA devices this process may use."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def name(device: Device) -> str | None:
    """The kind of a GPU; None for a CPU, whose kind is `machine.cpu_name`."""
    return torch.cuda.get_device_name(device) if _is_cuda(device) else None


def capability(gpu: Device) -> tuple[int, int]:
    """The compute capability of a GPU: 9, 0 for Hopper."""
    return torch.cuda.get_device_capability(gpu)


def has_bf16() -> bool:
    """Does the GPU multiply bf16 numbers itself? Where there is none to ask, what is planned is for one that does."""
    return not is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def total_bytes(device: Device, *, processes: int = 1) -> int:
    """Memory of a device; of a CPU the share that one of `processes` has of this machine's, or container's."""
    if _is_cuda(device):
        return torch.cuda.get_device_properties(device).total_memory
    return machine.total_bytes() // processes


def free_bytes(device: Device, *, processes: int = 1) -> int:
    """What of it is free now."""
    return torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else machine.available_bytes() // processes


def release_memory(device: Device) -> None:
    """Give back what is kept for tensors to come, so that whoever is next begins with all of the device."""
    if _is_cuda(device):
        torch.cuda.empty_cache()


def fork_rng(device: Device) -> AbstractContextManager[None]:
    """Leave the random state of the host and of `device` as it was before the block."""
    return torch.random.fork_rng(devices=[device] if _is_cuda(device) else [])


def to_device(values: Tensor, device: Device) -> Tensor:
    """`values` on `device`, in their memory layout; no element may be there twice, as after `expand`.

    The host does not wait for the device: only from pinned memory is copied beside what it does.
    """
    if _is_cuda(device) and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def synchronize(device: Device) -> None:
    """Wait until all that was queued is done; a CPU has done it."""
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: Device) -> tuple[float, float, float | None]:
    """Seconds of a call by three clocks: wall, processor, and the device's own, which a CPU does not have."""
    events = [Event(enable_timing=True) for _ in range(2)] if _is_cuda(device) else []
    synchronize(device)  # nothing queued before may count
    wall, cpu = time.perf_counter(), time.process_time()
    for event in events[:1]:
        event.record(torch.cuda.current_stream(device))
    call()
    for event in events[1:]:
        event.record(torch.cuda.current_stream(device))
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, events[0].elapsed_time(events[1]) / 1e3 if events else None


def queued(device: Device) -> Event | None:
    """The moment when all that is queued until now is done; None of a CPU, where it is past."""
    return torch.cuda.current_stream(device).record_event() if _is_cuda(device) else None


class SideStream:
    """A queue beside that of training, for a thread that waits for what it queues; of a CPU none is needed.

    Attributes:
        cuda: the stream; None on a CPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.cuda = torch.cuda.Stream(device) if _is_cuda(device) else None

    @contextmanager
    def work(self, *, after: Event | None = None) -> Iterator[None]:
        """Queue here what the block does, behind the moment `after`; at its end it is done."""
        with torch.cuda.stream(self.cuda):  # does nothing where there is no stream
            if self.cuda is not None and after is not None:
                self.cuda.wait_event(after)
            yield
            if self.cuda is not None:
                self.cuda.synchronize()

    def give(self, made: Tensor) -> None:
        """Let training use what was made here: its memory is taken for nothing else before that is done."""
        if self.cuda is not None:
            made.record_stream(torch.cuda.default_stream(self._device))


def _is_cuda(device: Device) -> bool:
    return torch.device(device).type == "cuda"
