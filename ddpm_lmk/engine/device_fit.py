"""What `auto` becomes on this device: precision, micro-batch, recomputed levels, compilation.

A pass of the network over tensors without memory says how much a setting needs, a count of operations which of those
that fit is fastest, and on CUDA one step with random images whether it really fits; where it does not, the next best is
tried. What was chosen is printed and kept in `run.json`, and a resumed run takes it from there. None of it is decided
by a clock, so that a run does not depend on how busy the machine was when it began.

Precision: on CUDA bf16, where the device multiplies in it. On a CPU bf16 too, where this process may use instructions
for it and the network is large enough for them to make up for the conversions (benchmarks/README.md); else fp32.
Without instructions PyTorch computes bf16 and fp16 on a CPU in plain loops: steps took 10 to 14 times as long as in
fp32 on processors with AVX2. Scoring and prediction on a CPU stay in fp32.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_lmk.config import RunConfig, UNetConfig
from ddpm_lmk.engine.optim import parameter_groups
from ddpm_lmk.engine.parallel import Parallel, Precision
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import ResourceError, StoppedError
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.blocks import use_norm
from ddpm_lmk.models.kernels.group_norm import Norm, choose_norm
from ddpm_lmk.system import accelerator
from ddpm_lmk.tasks import Task

GIB = 2**30
USABLE = 0.9  # of a device's memory; the rest goes to the CUDA context, workspaces of kernels and fragmentation
FIRST_STEPS = 3  # in these, running out of memory means that the micro-batch is too large
CPU_WORDS = "can't allocate memory"  # of the RuntimeError of torch's CPU allocator, which has no class of its own
TRACED_IMAGES = 32  # at most: norms of fp32 go image by image
LOST_PER_PASS = 0.5  # images that a pass of a micro-batch costs beside its own: launches, and matrices that are small
COMPILED_FROM = 5000  # steps of a run that make up for a compilation
LEAST_FLOPS = 2e8  # of a forward pass of one image, from which on bf16 pays on a CPU
# Of oneDNN's names of instruction sets (dnnl_cpu_isa_t) those without products in bf16. Others, and words that it does
# not know and so ignores, leave it what the processor has.
ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
ATEN_WITHOUT_BF16 = {"default", "avx2"}
WORTH_SAYING = 1.5  # times as long as fp32

Levels = bool | tuple[bool, ...]  # which levels of the U-Net are recomputed in the backward pass
Probe = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Fitted:
    """What a run does on this device; the content of `fit` in run.json."""

    precision: Precision
    precision_reason: str
    compile: bool
    micro_batch: int | None
    checkpointing: Levels
    predicted_gib: float | None = None  # where something was to be chosen
    device_gib: float | None = None

    def applied(self, cfg: RunConfig) -> RunConfig:
        """The run with numbers in the place of `auto`, precision aside, which belongs to training only."""
        train: dict[str, Any] = {"compile": self.compile}
        if cfg.train.micro_batch == "auto":
            train["micro_batch"] = self.micro_batch
        model = cfg.model
        if getattr(model, "checkpointing", False) == "auto":
            model = model.model_copy(update={"checkpointing": self.checkpointing})
        return cfg.model_copy(update={"model": model, "train": cfg.train.model_copy(update=train)})

    def __str__(self) -> str:
        words = [f"precision={self.precision} ({self.precision_reason})"]
        if self.predicted_gib is not None:
            levels = self.checkpointing
            names = "all" if levels is True else [i for i, is_so in enumerate(levels) if is_so] if levels else "none"
            words.append(f"micro_batch={self.micro_batch}, recomputed levels: {names}")
            words.append(f"about {self.predicted_gib:.1f} of {self.device_gib:.1f} GiB")
        return ", ".join([*words, *(["compiled"] if self.compile else [])])

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Fitted:
        """Back from run.json."""
        levels = facts["checkpointing"]
        return cls(**{**facts, "checkpointing": tuple(levels) if isinstance(levels, list) else levels})


def fit_to_device(
    cfg: RunConfig, task: Task, parallel: Parallel, *, steps: int, room: int | None = None, probe: Probe | None = None
) -> Fitted:
    """Choose for this device; the same on all ranks.

    Args:
        steps: length of the run.
        room: bytes there are; None: the device's own.
        probe: does one step of this run fit? None: one is computed where the device is CUDA and something is auto.

    Raises:
        ResourceError: nothing fits by the estimate, or nothing that it allows really fits.
    """
    precision, reason = choose_precision(cfg, parallel.device.type)
    # The smallest device decides: all ranks compute micro-batches of one size.
    own = accelerator.total_bytes(parallel.device, processes=parallel.world)
    room = min(parallel.gather(own if room is None else room))
    compiled = cfg.train.compile
    if compiled == "auto":
        compiled = parallel.device.type == "cuda" and cfg.train.exactness != "exact" and steps >= COMPILED_FROM
    levels = getattr(cfg.model, "checkpointing", False)
    fixed = Fitted(precision, reason, compiled, None, levels)
    if cfg.train.micro_batch != "auto" and levels != "auto":
        return fixed
    fixed = replace(fixed, device_gib=round(room / GIB, 2))
    if probe is None and parallel.device.type == "cuda":
        probe = _Step(task, parallel, precision)
    tried = 0
    for candidate in _candidates(cfg, task, parallel, fixed):
        assert candidate.predicted_gib is not None
        if candidate.predicted_gib * GIB > USABLE * room:
            continue
        # Every rank tries: another process may sit on one of the GPUs.
        if probe is None or all(parallel.gather(probe(candidate.applied(cfg)))):
            return candidate
        tried += 1
    raise ResourceError(
        f"no micro-batch fits the {room / GIB:.1f} GiB of this device{f', {tried} were tried' if tried else ''}; use a "
        "smaller model.width, smaller images, or a device with more memory"
    )


def _candidates(cfg: RunConfig, task: Task, parallel: Parallel, fixed: Fitted) -> Iterator[Fitted]:
    """Every way to do the run, the fastest first, by operations and what each pass loses; memory is traced in turn."""
    share = max(1, cfg.train.global_batch_size // parallel.world)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if cfg.train.micro_batch != "auto":
        sizes = [cfg.train.micro_batch or share]
    ways: list[tuple[float, Fitted]] = []
    for levels in _recomputable(cfg):
        model = replace(fixed, checkpointing=levels).applied(cfg).model
        flops = model_cost(model, cfg.data.image_size, task.out_channels, full_size=task.full_size).flops_train
        for size in sizes:
            way = replace(fixed, checkpointing=levels, micro_batch=size)
            ways.append((flops * (1 + LOST_PER_PASS / size), way))
    memories: dict[Levels, Memory] = {}
    for _, way in sorted(ways, key=lambda pair: pair[0]):
        if way.checkpointing not in memories:
            run = replace(way, micro_batch=sizes[-1]).applied(cfg)
            memories[way.checkpointing] = Memory(run, task, parallel.device.type, fixed.precision)
        assert way.micro_batch is not None
        memory = memories[way.checkpointing]
        needed = memory.process_bytes(way.applied(cfg), way.micro_batch, world=parallel.world, zero=parallel.zero)
        yield replace(way, predicted_gib=round(needed / GIB, 2))


def _recomputable(cfg: RunConfig) -> Iterator[Levels]:
    """What may be recomputed: nothing, then more and more levels from the first, whose maps are the largest."""
    given = getattr(cfg.model, "checkpointing", False)
    if given != "auto":
        yield given
        return
    levels = len(getattr(cfg.model, "multipliers", ()))
    yield False
    for count in range(1, levels):
        yield tuple(level < count for level in range(levels))
    yield True


class _Step:
    """Forward and backward pass of random images, and room for what the first update adds."""

    def __init__(self, task: Task, parallel: Parallel, precision: Precision) -> None:
        self._task, self._parallel, self._precision = task, parallel, precision

    def __call__(self, cfg: RunConfig) -> bool:
        device = self._parallel.device
        images = cfg.train.given_micro_batch or cfg.train.global_batch_size // self._parallel.world
        try:
            model = _network(cfg, self._task).to(device)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            trained = self._task.wrap(model)
            # Moments and average, which the optimizer makes after the first step only.
            later = [torch.empty_like(p) for p in trained.parameters() for _ in range(2 + (cfg.train.ema is not None))]
            with self._parallel.autocast(self._precision):
                out = model(*_inputs(cfg, math.ceil(images * _passes(cfg, self._task)), device))
            out.float().square().mean().backward()
            del model, trained, later, out
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            accelerator.release_memory(device)  # the next try, and the run, begin with all of it
        return True


def _network(cfg: RunConfig, task: Task) -> nn.Module:
    return build_model(cfg.model, out_channels=task.out_channels, full_size=task.full_size, domains=task.domains)


def _passes(cfg: RunConfig, task: Task) -> float:
    """Passes of a training image through the network: of several of it, or of views and crops of the image."""
    per_pass = model_cost(cfg.model, cfg.data.image_size, task.out_channels, full_size=task.full_size)
    return task.cost(cfg.model, cfg.data.image_size).flops_train / per_pass.flops_train


def _inputs(cfg: RunConfig, images: int, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    side, is_told = cfg.data.image_size, isinstance(cfg.model, UNetConfig) and cfg.is_time_conditioned
    x = torch.rand(images, 1, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.ones(images, dtype=torch.long, device=device) if is_told else None


# Memory


class Memory:
    """What passes of a run's network need, measured on the device `meta`, whose tensors have no memory.

    Two passes, of one image and of as many as a process computes at once, say what every image takes; between them
    memory is taken to grow evenly. Kernels may need more than PyTorch hands out, for which `USABLE` leaves room.
    """

    def __init__(self, cfg: RunConfig, task: Task, device: str, precision: Precision | None = None) -> None:
        is_half = (precision or choose_precision(cfg, device).name) != "fp32"
        chosen = choose_norm(cfg.train.group_norm, torch.device(device), is_compiled=cfg.train.compile is True).name
        norm: Literal["native", "folded"] = "native" if chosen == "native" else "folded"  # keeps what Triton's keeps
        most = min(cfg.train.given_micro_batch or cfg.train.global_batch_size, TRACED_IMAGES)
        self._sizes = (1, max(2, most))
        with torch.device("meta"):
            network = _network(cfg, task)
            trained = task.wrap(network)
        groups = parameter_groups(cfg.optim, trained)  # what is frozen keeps nothing for a backward pass
        learning = sum(p.nbytes for group in groups for p in group["params"])
        self._weights, self._learning = sum(p.nbytes for p in trained.parameters()), learning
        self._beside = learning // 2 if is_half else 0  # gradients stay in fp32, and the pass is counted in 16 bits
        use_norm(network, Norm(norm, ""))
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._peaks = [_peak_of_a_pass(cfg, network, size, is_half=is_half) for size in self._sizes]
        self._passes = _passes(cfg, task)

    def process_bytes(self, cfg: RunConfig, images: int, *, world: int = 1, zero: int = 0) -> int:
        """Peak of one process of `world` that computes so many images at once."""
        (few, many), (least, most) = self._sizes, self._peaks
        each = (most - least) / (many - few)
        activations = least + each * (images * self._passes - few)
        copies = copies_of_weights(cfg, world=world, zero=zero) - 2  # weights and gradient are counted already
        return int(self._weights + self._learning * copies + self._beside + activations)

    def images_that_fit(self, cfg: RunConfig, room: int, *, world: int = 1, zero: int = 0) -> int:
        """The most images a process can compute at once in so many bytes; 0 where not one fits."""
        one, two = (self.process_bytes(cfg, images, world=world, zero=zero) for images in (1, 2))
        return max(0, 1 + int((USABLE * room - one) // max(1, two - one)))


def _peak_of_a_pass(cfg: RunConfig, model: nn.Module, images: int, *, is_half: bool) -> int:
    """Most bytes alive in a forward and backward pass, beside the weights."""
    inputs = _inputs(cfg, images, "meta")
    with _LiveBytes(is_half=is_half) as live:
        model(*inputs).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive.

    Args:
        is_half: count them in 16 bits but for softmaxes, which autocast leaves in fp32. (The device `meta` has no
            autocast, so the pass itself is in fp32.)
    """

    def __init__(self, *, is_half: bool) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._is_half = is_half
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and take note of what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                is_wide = not self._is_half or func is torch.ops.aten._softmax.default
                self._add(value.untyped_storage(), is_wide=is_wide)
        return out

    def _add(self, storage: torch.UntypedStorage, *, is_wide: bool) -> None:
        # Storages and not tensors: views of one map are counted once.
        key, size = storage._cdata, storage.nbytes() // (1 if is_wide else 2)
        if key in self._alive:
            return
        self._now += size
        self.peak = max(self.peak, self._now)
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self._now -= size


def memory_gib(cfg: RunConfig, task: Task, *, device: str, micro_batch: int, world: int = 1, zero: int = 0) -> float:
    """Peak memory of a process of this run on this kind of device, in GiB."""
    run = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": micro_batch})})
    return Memory(run, task, device).process_bytes(run, micro_batch, world=world, zero=zero) / GIB


def copies_of_weights(cfg: RunConfig, *, world: int, zero: int) -> float:
    """How many times the size of the weights that learn a process keeps in fp32, activations aside.

    Weights and average are whole everywhere. ZeRO shares out AdamW's moments and keeps a second copy of the weights,
    shared out too; stage 2 shares out the gradient. Class exact keeps the partial sums of its tree.
    """
    moments, average = 2 * (cfg.optim.kind != "sgd"), cfg.train.ema is not None
    if zero:
        return 1 + average + (moments + 1) / world + (1 if zero == 1 else 1 / world)
    leaves = cfg.train.global_batch_size // ((cfg.train.given_micro_batch or cfg.train.global_batch_size) * world)
    sums = leaves.bit_length() + 1 if cfg.train.exactness == "exact" else 0
    return 2 + moments + average + sums


def is_out_of_memory(error: BaseException | None) -> bool:
    """Did the device, or the host, have no memory left?"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and CPU_WORDS in str(error)
    )


@contextmanager
def explained_out_of_memory(cfg: RunConfig, task: Task, state: TrainState, parallel: Parallel) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one that says what to do (docs/faults.md, C3).

    In the first steps the answer is a smaller micro-batch, which the user has to choose: it is never changed silently,
    since that would change the bits. Later it is bad luck (another process, fragmentation): the state is in the middle
    of a step and cannot be saved, and a restart from the last checkpoint at the same micro-batch is the answer.

    Raises:
        ResourceError: in the first steps. StoppedError: later.
    """
    first = state.step
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if state.step - first < FIRST_STEPS:
            advice = _smaller_micro_batch(cfg, task, parallel)
            raise ResourceError(f"out of memory in step {state.step + 1}: {advice}") from error
        raise StoppedError(
            f"out of memory in step {state.step + 1}, after {state.step - first} steps that fitted; nothing of this "
            "step can be saved; the same command continues from the last checkpoint at the same micro-batch"
        ) from error


def _smaller_micro_batch(cfg: RunConfig, task: Task, parallel: Parallel) -> str:
    share = cfg.train.global_batch_size // parallel.world
    tried = cfg.train.given_micro_batch or share
    sizes = [size for size in range(1, tried) if share % size == 0]
    if not sizes:
        return "not even one image fits; use model.checkpointing=true, a smaller model or smaller images"
    memory = Memory(cfg, task, parallel.device.type)
    room = accelerator.total_bytes(parallel.device, processes=parallel.world)
    most = memory.images_that_fit(cfg, room, world=parallel.world, zero=parallel.zero)
    size = max([size for size in sizes if size <= most], default=sizes[0])
    return (
        f"train.micro_batch={tried} images at once do not fit; by the model's estimate {size} would; set "
        f"train.micro_batch={size} (it changes the order of sums, so it is not done for you)"
    )


# Precision


class ChosenPrecision(NamedTuple):
    """The type of a run's products, and why."""

    name: Literal["fp32", "bf16", "fp16"]
    reason: str


def choose_precision(cfg: RunConfig, device: str) -> ChosenPrecision:
    """The precision of a run on this kind of device."""
    if cfg.train.precision != "auto":
        return ChosenPrecision(cfg.train.precision, "as asked for")
    if device == "cuda":
        if accelerator.has_bf16():
            return ChosenPrecision("bf16", "on CUDA")
        return ChosenPrecision("fp32", "this GPU has no instructions for bf16; train.precision=fp16 may be faster")
    if missing := missing_bf16():
        return ChosenPrecision("fp32", missing)
    if not isinstance(cfg.model, UNetConfig):
        return ChosenPrecision("fp32", f"model.kind={cfg.model.kind} was not measured in bf16 on a CPU")
    if cfg.train.exactness == "exact":
        return ChosenPrecision("fp32", "class exact is to be the same on CPUs without bf16")
    if model_cost(cfg.model, cfg.data.image_size, 1).flops_executed < LEAST_FLOPS:
        return ChosenPrecision("fp32", "so small a network loses more by converting than it gains")
    return ChosenPrecision("bf16", "this processor has instructions for it")


def missing_bf16(environment: Mapping[str, str] = os.environ) -> str:
    """Why this process cannot multiply bf16 numbers by instructions (AVX512_BF16 or AMX); empty where it can.

    ONEDNN_MAX_CPU_ISA (before it DNNL_MAX_CPU_ISA) keeps convolutions and products from instructions that the processor
    has, ATEN_CPU_CAPABILITY everything else.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "this processor has no instructions for bf16"
    name = next((name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if environment.get(name)), "")
    if environment.get(name, "").upper() in ISA_WITHOUT_BF16:
        return f"{name}={environment[name]} keeps this processor from its instructions for bf16"
    if (limit := environment.get("ATEN_CPU_CAPABILITY", "")) in ATEN_WITHOUT_BF16:
        return f"ATEN_CPU_CAPABILITY={limit} keeps this processor from its instructions for bf16"
    return ""


def is_emulated(name: str, device: str) -> bool:
    """Does this device compute in this precision without instructions for it, as far as is known?"""
    return device == "cpu" and (name == "fp16" or (name == "bf16" and bool(missing_bf16())))


def emulation_warning(cfg: RunConfig, name: str, device: str) -> str | None:
    """What to tell, before the first step, whoever trains in `name` on a CPU that only emulates it; else None.

    Args:
        name: what the run trains in; not what `auto` is here where the run began on another machine.
    """
    if not is_emulated(name, device) or (factor := times_fp32(name)) < WORTH_SAYING:
        return None
    found = f"{name} is emulated here: a convolution takes {factor:.0f} times as long as in fp32, measured just now"
    if cfg.train.precision == "auto":
        return f"this run began in {name} on another machine and keeps it; {found}; a new --out chooses again"
    why = missing_bf16() if name == "bf16" else "fp16 is meant for GPUs"
    return f"train.precision={found} ({why}); train.precision=auto takes what is fast"


@cache
def times_fp32(name: str) -> float:
    """How many times as long as in fp32 a small convolution takes, forward and backward; a tenth of a second or two."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    layer = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 32, 32, 32).to(memory_format=torch.channels_last)

    def seconds(*, is_half: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=is_half):
            y = layer(x)
        torch.autograd.grad(y.float().sum(), layer.weight)
        return time.perf_counter() - started

    # The fastest of a few: what others on the machine take away only ever adds.
    half, full = (min(seconds(is_half=is_half) for _ in range(4)) for is_half in (True, False))
    return half / full
