"""Seconds of the optimizer steps of a run, on this machine and now.

Timed is what the run does, on random images: its network, task, optimizer and average, in its precision, with its
threads and its number of processes side by side. So are validation, the score at the end and drawing samples, an image
each. A step too long for the few seconds this may take is timed on some of its images.

Importing this does not import torch. `launcher.time_runs` does it in processes of their own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.forecast import Timing
from ddpm_lmk.system import heartbeat

if TYPE_CHECKING:
    from ddpm_lmk.data.batch import Batch
    from ddpm_lmk.engine.parallel import Parallel, Precision
    from ddpm_lmk.engine.session import Workbench
    from ddpm_lmk.tasks import Task

BUDGET_S = 4.0  # for the steps of one run, about, and again for its scoring
STEPS = 3
FORWARD_SHARE = 1 / 3  # of a training pass, where even one image takes longer than the budget


def time_steps(
    cfg: RunConfig,
    task: Task,
    parallel: Parallel,
    *,
    precision: Precision,
    workbench: Workbench,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time steps of this run; call it on every rank, before the run takes its network from the same workbench.

    Args:
        cfg: with numbers in place of `auto`, precision aside.
        precision: that of training.

    Raises:
        ResourceError: no memory for a step.
    """
    import torch

    from ddpm_lmk.engine.device_fit import MemoryWatch
    from ddpm_lmk.engine.gradients import build_updater
    from ddpm_lmk.engine.rank_checks import kernels
    from ddpm_lmk.engine.state import TrainState

    device = parallel.device
    cuda = [device] if device.type == "cuda" else []

    def now() -> float:
        heartbeat.beat("setup")
        if cuda:
            torch.cuda.synchronize(device)
        return clock()

    with torch.random.fork_rng(devices=cuda), kernels(cfg.train.exactness, device):
        model = workbench.model(cfg, task, device)
        state = TrainState.fresh(cfg, model)
        share = -(-cfg.train.global_batch_size // parallel.world)
        micro = min(cfg.train.given_micro_batch or share, share)
        is_compiled = cfg.train.compile is True  # for one size of a batch at a time: only those of the run are timed
        parts: list[tuple[float, float]] = []  # passes and update of every step

        def step(images: int) -> float:
            count = max(1, images // micro)
            batch = random_batch(cfg, task, images // count).to(device)
            began = now()
            for number in range(count):
                with updater.micro_batch(number, of=count):
                    with parallel.autocast(cfg.train.precision):
                        losses = task.loss(updater.net, batch)
                    updater.add(losses.float().sum(), images)
            between = now()
            updater.finish(0.0)
            updater.apply(cfg.optim.clip)
            state.ema.update(1)
            task.after_step(model, 1)
            updater.clear()
            parts.append((between - began, now() - between))
            return max(parallel.gather(sum(parts[-1])))

        least = min(2 if cfg.model.couples_images else 1, micro)
        model.train()
        with (
            MemoryWatch(cfg, task, state, parallel),
            parallel.training_in(precision),
            closing(build_updater(cfg, state, parallel)) as updater,
        ):
            sizes = {micro, share} if is_compiled else {least, max(least, micro // 4), micro, share}
            images, taken = repeated(step, sorted(sizes), budget_s, is_compiled=is_compiled)
        image_s, update_s = (statistics.median(column) for column in zip(*parts[-len(taken) :], strict=True))
        seconds = {"image_s": image_s / images, "update_s": update_s}
        model.eval()
        for name, use, passes in _uses(cfg, task, model, parallel, precision):
            forward_s = seconds["image_s"] * FORWARD_SHARE
            seconds[name] = passes * forward_s
            if (forward_s if name == "draw_s" else seconds[name]) < budget_s / STEPS:

                def once(images: int, use: Callable[[int], None] = use) -> float:
                    began = now()
                    use(images)
                    return max(parallel.gather(now() - began))

                batch = cfg.evaluate.batch
                most, taken_s = repeated(
                    once,
                    [batch] if is_compiled else sorted({1, min(4, batch), batch}),
                    budget_s / 2,
                    is_compiled=is_compiled,
                )
                seconds[name] = statistics.median(taken_s) / most * (passes if name == "draw_s" else 1)
        parallel.release()
    seconds = {name: max(parallel.gather(value)) for name, value in seconds.items()}
    return Timing(**seconds, images=images, of=share, steps=len(taken), processes=parallel.world)


def repeated(
    call: Callable[[int], float], sizes: Sequence[int], budget_s: float, *, is_compiled: bool = False
) -> tuple[int, list[float]]:
    """The largest of `sizes` there is time for, and the seconds of up to three calls of it.

    A first call at a size chooses kernels and asks for memory, and counts only where it leaves no time for a second;
    where it compiles the network (`is_compiled`), never.
    """
    size, taken, spent = sizes[0], [0.0], 0.0
    for candidate in sizes:
        if taken[0] / size * candidate > budget_s:  # at most: more images at once take less each
            break
        size, taken = candidate, [call(candidate)]
        if taken[0] > 2 * budget_s and not is_compiled:
            break
        taken = [call(candidate)]
        spent += taken[0]
    while len(taken) < STEPS and spent + taken[0] < budget_s:
        taken.append(call(size))
        spent += taken[-1]
    return size, taken


def _uses(
    cfg: RunConfig, task: Task, model: Any, parallel: Parallel, precision: Precision
) -> Iterator[tuple[str, Callable[[int], None], int]]:
    """What the network is used for beside training, for so many images, and its passes of each.

    A sample is drawn in so many passes; one of them is done here.
    """
    import torch

    from ddpm_lmk.inference.sample import NUM_STEPS
    from ddpm_lmk.tasks import DenoiseTask, LandmarkTask
    from ddpm_lmk.tasks.diffusion import ddim_sample

    def validate(images: int) -> None:
        batch = random_batch(cfg, task, images).to(parallel.device)
        with torch.no_grad(), parallel.training_in(precision), parallel.autocast(cfg.train.precision):
            task.evaluate(model, batch)

    if cfg.data.validation_split is not None:
        yield "validate_s", validate, 1
    if isinstance(task, LandmarkTask) and cfg.evaluate.split is not None:
        found = task  # of this kind, where it is used

        def score(images: int) -> None:
            batch = random_batch(cfg, task, images).to(parallel.device)
            with torch.inference_mode(), parallel.autocast(cfg.train.precision):
                found.predict(model, batch)

        yield "score_s", score, task.cfg.views
    if isinstance(task, DenoiseTask) and cfg.evaluate.samples:
        denoise = task

        def draw(images: int) -> None:  # not by `sampling`, whose signs of life would tell the pace of smaller batches
            noise, schedule = random_batch(cfg, task, images).to(parallel.device).images, denoise.schedule
            with torch.no_grad(), parallel.autocast(cfg.train.precision):
                for _ in ddim_sample(model, schedule, noise, num_steps=1, target=denoise.cfg.target):
                    pass

        yield "draw_s", draw, min(NUM_STEPS, task.schedule.num_timesteps - 1)


def random_batch(cfg: RunConfig, task: Task, count: int, *, seed: int = 0) -> Batch:
    """Random pixels, and random points where the task wants some; in host memory."""
    import torch

    from ddpm_lmk.data.batch import Batch

    size, landmarks = cfg.data.image_size, task.out_channels if cfg.task.kind == "landmarks" else 0
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.rand(count, 1, size, size, generator=generator).contiguous(memory_format=torch.channels_last),
        points=torch.rand(count, landmarks, 2, generator=generator) * (size - 1) if landmarks else None,
        to_native=torch.eye(2, 3).expand(count, 2, 3),
        native_size=torch.full((count, 2), float(size)),
        mm_per_px=torch.full((count,), torch.nan),
        positions=torch.arange(seed * count, (seed + 1) * count),
        weight=torch.ones(count),
        ids=tuple(map(str, range(count))),
        domain=torch.zeros(count, dtype=torch.long) if len(task.domains) > 1 else None,
    )
