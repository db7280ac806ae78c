"""Seconds of the optimizer steps of a run, on this machine and now.

Timed is what the run does, on random images: its network, task, optimizer and average, in its precision, with its
threads and its number of processes side by side. So are validation, the score at the end and drawing samples, an image
each. A step too long for the few seconds this may take is timed on some of its images.

Importing this does not import torch. `time_steps` measures in the process that will train, `time_apart` in processes
of its own (`python -m ddpm_lmk.timing`, its job on standard input).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ddpm_lmk import checks, lifeline, stop
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import LmkError
from ddpm_lmk.forecast import Timing
from ddpm_lmk.launcher import Device, Placement, visible_gpus
from ddpm_lmk.sweep.run import worker_environment
from ddpm_lmk.system.processes import die_with_parent

if TYPE_CHECKING:
    from ddpm_lmk.data.batch import Batch
    from ddpm_lmk.engine.parallel import Parallel, Precision
    from ddpm_lmk.tasks import Task
    from ddpm_lmk.workbench import Workbench

BUDGET_S = 4.0  # for the steps of one run, about, and again for its scoring
STEPS = 3
FORWARD_SHARE = 1 / 3  # of a training pass, where even one image takes longer than the budget
DAYS_S = 2 * 24 * 3600.0  # of one run: what the others take is no news then
NO_DEVICE = "its device is not on this machine"
AFTER_DAYS = "another run of it takes days"
TOO_SLOW = "this machine is too slow, or too busy, to time a step"
PATIENCE_S = 120.0  # for processes that time steps to start, beside what they may take


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

    from ddpm_lmk.engine.exactness import kernels
    from ddpm_lmk.engine.memory import MemoryWatch
    from ddpm_lmk.engine.state import TrainState
    from ddpm_lmk.engine.updater import build_updater

    device = parallel.device
    cuda = [device] if device.type == "cuda" else []

    def now() -> float:
        lifeline.beat("setup")
        if cuda:
            torch.cuda.synchronize(device)
        return clock()

    with torch.random.fork_rng(devices=cuda), kernels(cfg.train.exactness, device):
        model = workbench.model(cfg, task, device)
        state = TrainState.fresh(cfg, model)
        share = -(-cfg.train.group_size // parallel.world)
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

    from ddpm_lmk.diffusion import ddim_sample
    from ddpm_lmk.sampling import NUM_STEPS
    from ddpm_lmk.tasks import DenoiseTask, LandmarkTask

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


def time_run(
    cfg: RunConfig, spec: DatasetSpec, placement: Placement, *, budget_s: float = BUDGET_S, is_apart: bool = False
) -> Timing | str:
    """Time steps of a run as it would be placed; or why that cannot be done.

    Args:
        is_apart: never in this process, which would hold a GPU from then on.
    """
    world = placement.processes * placement.nodes
    share = cfg.model_copy(update={"train": cfg.train.model_copy(update={"group_size": cfg.train.group_size // world})})
    if not is_apart and placement.processes == 1 and (placement.device == "cpu" or visible_gpus()):
        found: Timing | str = time_here(share, spec, placement.device, budget_s=budget_s)
    else:
        place: dict[str, Any] = {"processes": placement.processes, "device": placement.device}
        [found] = time_apart([share], **place, specs=[spec], budget_s=budget_s)
    return found if isinstance(found, str) else replace(found, processes=world)


def time_apart(
    runs: Sequence[RunConfig],
    *,
    processes: int,
    device: Device,
    specs: Sequence[DatasetSpec],
    devices: int | None = None,
    budget_s: float = BUDGET_S,
    steps: Sequence[int] | None = None,
) -> list[Timing | str]:
    """Time steps of each of `runs` in `processes` processes side by side, each as if it were alone with its batch.

    Args:
        specs: what the runs' data is.
        devices: GPUs that the processes share in turn; None: one each.
        steps: how long the runs are; where one of them takes days, those after it are not timed.

    Returns why instead, for a run that cannot be timed here.
    """
    if device == "cuda" and not visible_gpus():
        return [NO_DEVICE] * len(runs)
    each = [
        {"cfg": cfg.model_dump(mode="json"), "spec": spec.model_dump(mode="json"), "steps": length}
        for cfg, spec, length in zip(runs, specs, steps or [0] * len(runs), strict=True)
    ]
    facts = {"device": device, "processes": processes, "budget_s": budget_s, "parent": os.getpid()}
    job = json.dumps({"runs": each, **facts})
    began = time.monotonic()
    with ExitStack() as leaving:
        children = [
            leaving.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "ddpm_lmk.timing"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=worker_environment(device, slot, processes, devices=devices or processes),
                )
            )
            for slot in range(processes)
        ]
        leaving.callback(_end, children)
        overdue = threading.Timer(PATIENCE_S + 6 * budget_s * len(runs), _end, [children])
        leaving.callback(overdue.cancel)
        overdue.start()
        for child in children:
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(job)
        told = [list(map(json.loads, child.stdout or ())) for child in children]
    return [
        _together([lines[number] if len(lines) > number else TOO_SLOW for lines in told], began)
        for number in range(len(runs))
    ]


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        child.kill()


def _together(told: Sequence[dict[str, Any] | str], began: float) -> Timing | str:
    """The mean of what processes have seen of one run; nothing is known where one of them could not do it."""
    seen = [Timing(**facts) for facts in told if not isinstance(facts, str)]
    if why := next((each for each in told if isinstance(each, str)), ""):
        return why
    names = ("image_s", "update_s", "validate_s", "score_s", "draw_s", "start_s")
    mean: dict[str, Any] = {name: statistics.fmean(getattr(each, name) for each in seen) for name in names}
    return replace(seen[0], **mean | {"start_s": max(0.0, mean["start_s"] - began)})


def spec_of(cfg: RunConfig) -> DatasetSpec:
    """Facts of the run's data, together where it has several labelled sets."""
    return checks.spec_of(cfg, [Manifest.open(path).spec for path in cfg.data.path])


def time_here(
    cfg: RunConfig, spec: DatasetSpec, device: Device, *, beside: int = 1, budget_s: float = BUDGET_S
) -> Timing:
    """Time steps of a run in this process, alone or `beside` others; raises `LmkError` where it cannot be done."""
    from ddpm_lmk.engine.autofit import fit_to_device
    from ddpm_lmk.engine.memory import device_bytes
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.tasks import build_task
    from ddpm_lmk.workbench import Workbench

    task, parallel = build_task(cfg, spec), Parallel(device)
    room = device_bytes(parallel) // (beside if device == "cpu" else 1)
    fitted = fit_to_device(cfg, task.out_channels, parallel, steps=1, room=room)
    here, workbench = fitted.applied(cfg), Workbench()
    return time_steps(here, task, parallel, precision=fitted.precision, workbench=workbench, budget_s=budget_s)


def main() -> int:
    """Do the job on standard input: a line of JSON for each run."""
    job: dict[str, Any] = json.load(sys.stdin)
    die_with_parent(job["parent"])
    with stop.leaving_at_once():
        import ddpm_lmk.runs  # noqa: F401  # as a worker does: what it takes to start is told too

        began = time.monotonic()  # the clock of all processes of a machine
        longest_s = 0.0
        for each in job["runs"]:
            cfg, spec = RunConfig.model_validate(each["cfg"]), DatasetSpec.model_validate(each["spec"])
            told: dict[str, Any] | str = AFTER_DAYS
            if longest_s < DAYS_S:
                try:
                    found = time_here(cfg, spec, job["device"], beside=job["processes"], budget_s=job["budget_s"])
                    told = asdict(replace(found, start_s=began))
                    longest_s = max(longest_s, each["steps"] * cfg.train.group_size * found.image_s)
                except LmkError as error:
                    told = str(error)
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
