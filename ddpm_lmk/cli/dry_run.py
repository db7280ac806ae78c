"""What a run would do, without doing it: data, model, cost, memory, steps and time.

Memory is that of a pass of one micro-batch, measured without computing it, beside weights, moments and average. Time
is that of steps timed here and now (see `forecast`).
"""

from __future__ import annotations

from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data.loading.corpus import training_corpora
from ddpm_lmk.data.loading.order import GroupPlan
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.device_fit import Fitted, device_bytes, emulation_warning, fit_to_device, memory_gib
from ddpm_lmk.engine.forecast import LONG_S, Work, images_trained_on, steps_done
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.launcher import Placement, preflight
from ddpm_lmk.launcher.time_runs import time_run
from ddpm_lmk.tasks import Task, build_task


def plan_run(cfg: RunConfig, placement: Placement, out: Path, *, instead: str | None = None) -> list[tuple[str, str]]:
    """Rows (what, how much) for `--dry-run`, of a run that `checks` has let through.

    Args:
        instead: what to say where the run takes very long.
    """
    manifests = [Manifest.open(path) for path in cfg.data.path]
    counts = _images(cfg, manifests)
    num_images = sum(images_trained_on(cfg, count) for count in counts)
    groups = GroupPlan.of(cfg, num_images)
    steps = cfg.train.length.steps(cfg.train.group_size, num_images, groups.steps_per_epoch)
    images = groups.images(steps)
    rows = [
        ("run", f"{cfg.name}: {cfg.task.kind}, seed {cfg.seed}, config {config_hash(cfg)}"),
        ("directory", f"{out} ({'exists: continued if it holds this run' if out.exists() else 'new'})"),
        ("processes", str(placement)),
    ]
    rows += [(f"data {m.root}", f"{n} images of {', '.join(cfg.data.splits)}") for m, n in zip(manifests, counts)]
    if cfg.data.shots is not None:
        each = " of each set" if len(counts) > 1 else " of them"
        rows.append(("shots", f"{cfg.data.shots}{each}, {cfg.data.draw}"))
    spec = preflight.spec_of(cfg, [manifest.spec for manifest in manifests])
    task = build_task(cfg, spec)
    given = cfg
    cfg, fitted = _fitted(cfg, task, placement, steps)
    rows.append(("fit", str(fitted)))
    if warning := emulation_warning(cfg, fitted.precision, placement.device):
        rows.append(("warning", warning))
    rows += _model_rows(cfg, task, placement)
    rows.append(("length", f"{steps:,} steps, {images:,} images, {images / num_images:,.1f} passes over the data"))
    rows.append(("weights from", cfg.init.weights or f"random, seed {cfg.seed}"))
    return [*rows, *_time(given, placement, out, spec, steps, instead)]


def _fitted(cfg: RunConfig, task: Task, placement: Placement, steps: int) -> tuple[RunConfig, Fitted]:
    """What `auto` becomes, by the estimate of memory alone; a run on a GPU also tries a step."""
    parallel = Parallel("cuda" if placement.device == "cuda" else "cpu")
    room = device_bytes(parallel) // (placement.processes if placement.device == "cpu" else 1)
    share = cfg.train.group_size // (placement.processes * placement.nodes)
    one = cfg.model_copy(update={"train": cfg.train.model_copy(update={"group_size": share})})
    fitted = fit_to_device(one, task, parallel, steps=steps, room=room, probe=lambda run: True)
    return fitted.applied(cfg), fitted


def _images(cfg: RunConfig, manifests: list[Manifest]) -> list[int]:
    """Images of each set, for pre-training without those left out."""
    if cfg.task.stage == "pretrain":
        return [len(corpus.rows) for corpus in training_corpora(cfg)]
    return [len(manifest.rows(cfg.data.splits)) for manifest in manifests]


def _model_rows(cfg: RunConfig, task: Task, placement: Placement) -> list[tuple[str, str]]:
    cost = task.cost(cfg.model, cfg.data.image_size)
    group = cfg.train.group_size
    micro_batch = cfg.train.given_micro_batch or group // (placement.processes * placement.nodes)
    world = placement.processes * placement.nodes
    memory = memory_gib(cfg, task, device=placement.device, micro_batch=micro_batch, world=world, zero=placement.zero)
    size = f"{cost.params:,} parameters, {cost.flops_forward / 1e9:,.2f} GFLOP forward per image"
    return [
        ("model", f"{cfg.model.kind}, {size}"),
        ("step", f"{group} images, {micro_batch} at once, {cost.flops_train * group / 1e12:,.3f} TFLOP"),
        ("memory", f"about {memory:,.2f} GiB per process (estimate)"),
    ]


def _time(
    cfg: RunConfig, placement: Placement, out: Path, spec: DatasetSpec, steps: int, instead: str | None
) -> list[tuple[str, str]]:
    """How long it takes from here on, from steps timed on this machine by as many processes as the run will have."""
    timing = time_run(cfg, spec, placement)
    if isinstance(timing, str):
        return [("time", f"not known: {timing}")]
    found = timing.forecast(Work.of(cfg, steps=steps, done=steps_done(out)))
    more = [] if placement.processes == 1 else ["without what processes tell one another"]
    more += [f"{placement.nodes} nodes like this one"] if placement.nodes > 1 else []
    rows = [("time", ", ".join([str(found), *more]))]
    return [*rows, ("", instead)] if instead is not None and found.total_s > LONG_S else rows
