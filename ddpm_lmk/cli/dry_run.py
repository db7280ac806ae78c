"""What a run would do, without doing it: data, model, cost, memory, steps and time; and what fits a CPU better.

Memory is an estimate: weights, gradients, optimizer moments and average in full precision, plus the activations of one
micro-batch. Time is that of steps timed here and now (`sweep.forecast`). Imports torch only for `plan_run`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash, load_run
from ddpm_lmk.config.values import Stage
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.engine.forecast import LONG_S, images_trained_on
from ddpm_lmk.launcher import Device, Placement
from ddpm_lmk.rundir.lock import TEACHER
from ddpm_lmk.sweep import Sweep
from ddpm_lmk.sweep.file import scales_of
from ddpm_lmk.sweep.forecast import forecast_run
from ddpm_lmk.system.console import duration
from ddpm_lmk.system.shipped import shipped

CPU_FILE = "cpu.yaml"  # in configs/pretrain, configs/finetune and configs/sweep
TOO_LONG = f"that is more than {duration(LONG_S)}"
PRETRAIN_FIRST = f", after a pre-training with configs/pretrain/{CPU_FILE}, whose weights fit it"


def plan_run(cfg: RunConfig, placement: Placement, out: Path, *, instead: str | None = None) -> list[tuple[str, str]]:
    """Rows (what, how much) for `--dry-run`, of a run that `preflight.check_run` has let through.

    Args:
        instead: what to say where the run takes very long.
    """
    from ddpm_lmk.data.loading.corpus import spec_of, training_corpora, unlabelled_corpora
    from ddpm_lmk.data.shards.manifest import open_datasets
    from ddpm_lmk.engine.device_fit import emulation_warning, fit_to_device, memory_gib
    from ddpm_lmk.engine.parallel import Parallel
    from ddpm_lmk.system import accelerator
    from ddpm_lmk.tasks import build_task

    manifests = open_datasets(cfg)
    if cfg.task.stage == "pretrain":  # without the images left out as duplicates
        counts = [len(corpus.rows) for corpus in training_corpora(cfg)]
    else:
        counts = [len(manifest.rows(cfg.data.splits)) for manifest in manifests]
    num_images = sum(images_trained_on(cfg, count) for count in counts)
    batches = BatchPlan.of(cfg, num_images)
    train = cfg.train
    steps = train.duration.steps(train.global_batch_size, num_images, batches.steps_per_epoch)
    images = batches.images(steps)
    task = build_task(cfg, spec_of(cfg, [manifest.spec for manifest in manifests]))
    world = placement.processes * placement.nodes
    share = cfg.model_copy(
        update={"train": train.model_copy(update={"global_batch_size": train.global_batch_size // world})}
    )
    parallel = Parallel("cuda" if placement.device == "cuda" else "cpu")
    # Processes on the CPU share its memory, those on GPUs have one each.
    room = accelerator.total_bytes(parallel.device, processes=placement.processes)
    # What `auto` becomes, by the memory model alone: a run on a GPU also tries a step, which takes its time.
    fitted = fit_to_device(share, task, parallel, steps=steps, room=room, probe=lambda run: True)
    here = fitted.applied(cfg)
    micro_batch = here.train.given_micro_batch or train.global_batch_size // world
    device, zero = placement.device, placement.zero
    memory = memory_gib(here, task, device=device, micro_batch=micro_batch, world=world, zero=zero)
    cost = task.cost(here.model, cfg.data.image_size)

    rows = [
        ("run", f"{cfg.name}: {cfg.task.kind}, seed {cfg.seed}, config {config_hash(cfg)}"),
        ("directory", f"{out} ({'exists: continued if it holds this run' if out.exists() else 'new'})"),
        ("processes", str(placement)),
    ]
    rows += [(f"data {m.root}", f"{n} images of {', '.join(cfg.data.splits)}") for m, n in zip(manifests, counts)]
    if cfg.data.shots is not None:
        each = " of each set" if len(counts) > 1 else " of them"
        rows.append(("shots", f"{cfg.data.shots}{each}, {cfg.data.draw}"))
    pool_share = 0.0
    if cfg.data.propagate is not None:
        pool_share, teachers = cfg.data.propagate.share, cfg.teachers
        unlabelled = sum(len(corpus.rows) for corpus in unlabelled_corpora(cfg))
        where = ", ".join(cfg.data.unlabelled_path)
        rows.append(("pseudo-labels", f"{unlabelled:,} images of {where}, {pool_share:.1%} of those of a step"))
        each = f"{len(teachers)} teachers" if len(teachers) > 1 else "1 teacher"
        rows.append(("teachers", f"{each} first, in {out / TEACHER}, of {steps:,} steps each"))
    rows.append(("fit", str(fitted)))
    if warning := emulation_warning(here, fitted.precision, placement.device):
        rows.append(("warning", warning))
    passes = (1 - pool_share) * images / num_images
    size = f"{cost.params:,} parameters, {cost.flops_forward / 1e9:,.2f} GFLOP forward per image"
    tflop = cost.flops_train * train.global_batch_size / 1e12
    rows += [
        ("model", f"{cfg.model.kind}, {size}"),
        ("step", f"{train.global_batch_size} images, {micro_batch} at once, {tflop:,.3f} TFLOP"),
        ("memory", f"about {memory:,.2f} GiB per process (estimate)"),
        ("length", f"{steps:,} steps, {images:,} images, {passes:,.1f} passes over the data"),
        ("weights from", cfg.init.weights or f"random, seed {cfg.seed}"),
    ]
    return [*rows, *_time(cfg, placement, out, steps, instead)]


def _time(cfg: RunConfig, placement: Placement, out: Path, steps: int, instead: str | None) -> list[tuple[str, str]]:
    """How long it takes from here on, from steps timed on this machine by as many processes as the run will have."""
    forecast = forecast_run(cfg, out, placement, steps=steps)
    if isinstance(forecast, str):
        return [("time", f"not known: {forecast}")]
    words = [str(forecast)]
    # Steps are timed without their all-reduce, so that no process group has to be started for a forecast.
    words += ["without communication between processes"] if placement.processes > 1 else []
    words += [f"{placement.nodes} nodes like this one"] if placement.nodes > 1 else []
    rows = [("time", ", ".join(words))]
    return [*rows, ("", instead)] if instead is not None and forecast.total_s > LONG_S else rows


def smaller_run(cfg: RunConfig, command: Stage, run_file: Path, device: Device) -> str | None:
    """The run file for a CPU and the command to type, for the same data and, if they fit, weights; None on a GPU."""
    if device != "cpu":
        return None
    if run_file.name == CPU_FILE:
        return f"{TOO_LONG}; a smaller train.duration takes less"
    paths = cfg.data.path
    words = [f"data.path={paths[0] if len(paths) == 1 else '[' + ', '.join(paths) + ']'}"]
    if cfg.init.weights is None:
        return _offer(command, words)
    # Weights of a larger network would be refused by the offered command.
    if _fits_cpu_file(cfg):
        return _offer(command, [*words, f"init.weights={cfg.init.weights}"])
    return _offer(command, [*words, "init.weights=RUN"]) + PRETRAIN_FIRST


def smaller_sweep(sweep: Sweep, sweep_file: Path, device: Device, *, scale: str | None) -> str | None:
    """A smaller scale of the same file where it has one, else the sweep file for a CPU; None on a GPU."""
    if device != "cpu":
        return None
    if scale is None and (scales := scales_of(sweep_file)):
        command = shlex.join(["ddpm-lmk", "sweep", str(sweep_file), "--scale", scales[0]])
        return f"{TOO_LONG}; a variant of this file that fits a CPU: {command}"
    if sweep_file.name == CPU_FILE:
        return f"{TOO_LONG}; fewer shots or seeds take less"
    words = [f"data.path={sweep.cells[0].cfg.data.path[0]}"]
    given = (cell for cell in sweep.cells if cell.cfg.init.weights and sweep.stage_of(cell) is None)
    cell = next((cell for cell in given if _fits_cpu_file(cell.cfg)), None)
    if cell is not None:
        return _offer("sweep", [*words, f"start.pretrained={cell.cfg.init.weights}"])
    return _offer("sweep", [*words, "start.pretrained=RUN"]) + PRETRAIN_FIRST


def _fits_cpu_file(cfg: RunConfig) -> bool:
    """Has the network of the run file for a CPU the shape of this run's, whose starting weights it would be given?"""
    return cfg.model == _cpu_run().model


@cache
def _cpu_run() -> RunConfig:
    return load_run(shipped("configs") / "finetune" / CPU_FILE, ["data.path=."])


def _offer(command: str, words: Sequence[str]) -> str:
    run_file = f"configs/{command}/{CPU_FILE}"
    return f"{TOO_LONG}; a run file that fits a CPU: {shlex.join(['ddpm-lmk', command, run_file, *words])}"
