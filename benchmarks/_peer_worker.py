"""One network in a process of its own, started by `peers`: a step whenever the other end says so.

Memory is what this process, or its share of the device, holds at its highest during a step beyond what it held before
the network was built, with everything imported.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from _peer_networks import Shape, build
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import EmaConfig
from ddpm_lmk.engine.training_state import Ema
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import choose_norm
from ddpm_lmk.models.weight_standardization import OncePerStep
from ddpm_lmk.system.machine import keep_freed_memory

EMA_DECAY, CLIP = 0.995, 1.0


@dataclass(frozen=True)
class Spec:
    """What one process runs.

    Attributes:
        way: what a step is besides forward and backward. "plain": AdamW in one kernel, for every network alike.
            "released": micro-batches whose gradients add up, a synchronising read of the loss, clipping by value, AdamW
            as it comes, the average parameter by parameter. "ours": the same mathematics as the engine does it.
        micro_batches: of `shape.batch` images; "ours" takes them at once.
        save: write model, optimizer and average after the step, as the released loop does ("released" only).
        keeps_memory: freed memory is not returned to the system, as in a run of ours on a CPU.
    """

    network: str
    shape: Shape
    layout: str
    precision: str
    device: str
    threads: int
    way: str = "plain"
    micro_batches: int = 1
    save: bool = False
    keeps_memory: bool = False


def serve(spec: Spec, pipe: Connection) -> None:
    """Build, say so, and step on demand until the other end closes."""
    os.dup2(2, 1)  # what packages print goes with their warnings
    try:
        torch.set_num_threads(spec.threads)
        device = torch.device(spec.device)
        build(spec.network, Shape((32,), 16, 1))  # everything imported
        _warm(device)
        memory = Memory(device)
        with tempfile.TemporaryDirectory() as folder:
            step = make_step(spec, device, Path(folder))
            pipe.send({"ready": True})
            while pipe.recv():
                pipe.send(measure(step, memory, device))
    except EOFError:
        return
    except Exception as error:  # one that fails is left out, whatever its package raised
        pipe.send(f"{type(error).__name__}: {error}")


def measure(step: Callable[[], None], memory: Memory, device: torch.device) -> dict[str, float | None]:
    """Clocks and memory of one step."""
    memory.restart()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    wall, cpu = time.perf_counter(), time.process_time()
    if events:
        events[0].record()
    step()
    if events:
        events[1].record()
        torch.cuda.synchronize(device)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    device_s = events[0].elapsed_time(events[1]) / 1e3 if events else None
    return {"wall_s": wall_s, "cpu_s": cpu_s, "device_s": device_s, "peak_mib": memory.peak_mib()}


class Memory:
    """The highest use since `restart`, beyond that of the moment this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = self._now()

    def restart(self) -> None:
        """Forget the highest use so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def peak_mib(self) -> float:
        """MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.base
        return _status_mib("VmHWM") - self.base

    def _now(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20
        return _status_mib("VmRSS")


def make_step(
    spec: Spec, device: torch.device, folder: Path, *, note: Callable[[float], None] | None = None
) -> Callable[[], None]:
    """The network on its device with random images that stay, and what one step does.

    Args:
        folder: where a step that saves does so.
        note: is told every loss, at the price of waiting for the device.
    """
    torch.manual_seed(0)
    model, call = build(spec.network, spec.shape)
    layout = torch.channels_last if spec.layout == "channels-last" else torch.contiguous_format
    model.to(device).train()
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs do not know it
    if spec.network.startswith("ours"):
        use_norm(model, choose_norm("auto", device, is_compiled=False))  # as a run does it
    if spec.keeps_memory:
        keep_freed_memory()
    size = spec.shape.size_px
    images = spec.shape.batch * spec.micro_batches
    x = torch.rand(images, 1, size, size, device=device).contiguous(memory_format=layout)
    t = torch.randint(1, 500, (images,), device=device)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.precision == "bf16"):
            out = call(x, t)
        value = F.mse_loss(out.float(), x)
        if note is not None:
            note(value.item())
        return value

    if spec.way == "released":
        return _released_way(spec, model, loss, x, t, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if spec.way == "ours":
        return _our_way(spec, model, optimizer, lambda: loss(x, t))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x, t).backward()
        optimizer.step()

    return step


def _our_way(
    spec: Spec, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]
) -> Callable[[], None]:
    """A step as the engine does it: weights standardised once, all images at once, whole lists in one kernel."""
    average = Ema(EmaConfig(decay=EMA_DECAY), model)
    standard = OncePerStep(model, dtype=torch.bfloat16 if spec.precision == "bf16" else None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        standard.begin()
        loss().backward()
        standard.end()
        torch.nn.utils.clip_grad_value_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        average.update(1)

    return step


def _released_way(
    spec: Spec, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, folder: Path
) -> Callable[[], None]:
    """A step of the released training loop (docs/method.md, section 2 and 6)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = copy.deepcopy(model).requires_grad_(False)

    def step() -> None:
        for part in range(spec.micro_batches):
            chosen = slice(part * spec.shape.batch, (part + 1) * spec.shape.batch)
            value = loss(x[chosen], t[chosen])
            value.backward()
            value.item()
        torch.nn.utils.clip_grad_value_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for old, new in zip(average.parameters(), model.parameters()):
            old.data = old.data * EMA_DECAY + (1 - EMA_DECAY) * new.data
        if spec.save:
            state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
            torch.save(state, folder / "last_model.pt")
            torch.save({"model_state_dict": average.state_dict()}, folder / "last_ema_model.pt")

    return step


def _warm(device: torch.device) -> None:
    """Have the libraries loaded and their working memory made."""
    layer = nn.Conv2d(8, 8, 3).to(device)
    layer(torch.rand(1, 8, 8, 8, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _status_mib(key: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1]) / 1024
