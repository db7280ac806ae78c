"""What a run would do, without doing it: data, model, cost, memory, steps and, where it was measured, time.

Memory is an estimate: weights, gradients, optimizer moments and average in full precision, plus the activations of one
micro-batch. Time is a forecast from results of `ddpm-lmk bench` on this machine (see `forecast`), never a guess.
"""

from __future__ import annotations

from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.corpora import training_corpora
from ddpm_lmk.data.manifest import Manifest
from ddpm_lmk.data.order import GroupPlan
from ddpm_lmk.data.spec import mixture
from ddpm_lmk.engine.autofit import Fitted, fit_to_device
from ddpm_lmk.engine.memory import device_bytes, is_half, process_bytes, training_cost, uses_fused
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.precision import choose_precision, emulation_warning
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.forecast import estimate_step
from ddpm_lmk.launcher import Placement
from ddpm_lmk.runfile import config_hash
from ddpm_lmk.tasks import Task, build_task


def plan_run(cfg: RunConfig, placement: Placement, out: Path) -> list[tuple[str, str]]:
    """Rows (what, how much) for `--dry-run`; raises what opening the data raises."""
    manifests = [Manifest.open(path) for path in cfg.data.path]
    counts = _images(cfg, manifests)
    if cfg.data.shots is not None and cfg.data.shots > min(counts):
        raise ConfigError(
            f"data.shots={cfg.data.shots}, but there are {min(counts)} training images; use fewer, or null"
        )
    num_images = sum(_learnt(cfg, count) for count in counts)
    drop_last = cfg.task.stage == "pretrain"  # as the loader
    groups = GroupPlan(
        num_images, cfg.train.group_size, cfg.train.given_micro_batch, cfg.train.windows, drop_last=drop_last
    )
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
    specs = [manifest.spec for manifest in manifests]
    task = build_task(cfg, specs[0] if cfg.task.stage == "pretrain" else mixture(specs))
    cfg, fitted = _fitted(cfg, task, placement, steps)
    rows.append(("fit", str(fitted)))
    if warning := emulation_warning(cfg, fitted.precision, placement.device):
        rows.append(("warning", warning))
    rows += _model_rows(cfg, task, placement)
    rows.append(("length", f"{steps:,} steps, {images:,} images, {images / num_images:,.1f} passes over the data"))
    rows.append(("weights from", cfg.init.weights or f"random, seed {cfg.seed}"))
    return [*rows, ("time", _time(cfg, placement, images, task))]


def _fitted(cfg: RunConfig, task: Task, placement: Placement, steps: int) -> tuple[RunConfig, Fitted]:
    """What `auto` becomes, by the memory model alone; a run on a GPU also tries a step."""
    parallel = Parallel("cuda" if placement.device == "cuda" else "cpu")
    room = device_bytes(parallel) // (placement.processes if placement.device == "cpu" else 1)
    share = cfg.train.group_size // (placement.processes * placement.nodes)
    one = cfg.model_copy(update={"train": cfg.train.model_copy(update={"group_size": share})})
    fitted = fit_to_device(one, task.out_channels, parallel, steps=steps, room=room, probe=lambda run: True)
    return fitted.applied(cfg), fitted


def _learnt(cfg: RunConfig, count: int) -> int:
    """Images of a set of `count` that are trained on."""
    shots, hold_out = cfg.data.shots or count, cfg.data.hold_out
    return shots if hold_out is None else shots - len(range(hold_out.fold, shots, hold_out.of))


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


def memory_gib(cfg: RunConfig, task: Task, *, device: str, micro_batch: int, world: int = 1, zero: int = 0) -> float:
    """Estimated memory of one process: weights, gradients, moments and average, and a micro-batch's activations."""
    cost = training_cost(cfg, task, is_fused=uses_fused(cfg, device))
    return (
        process_bytes(cfg, cost, micro_batch, device=device, is_half=is_half(cfg, device), world=world, zero=zero)
        / 2**30
    )


def _time(cfg: RunConfig, placement: Placement, images: int, task: Task) -> str:
    """Rate, hours and process-hours on this machine, from measurements only; without any, how to get them."""
    world = placement.processes * placement.nodes
    share = cfg.train.group_size // world
    found = estimate_step(cfg, task, placement.device, images=share, processes=placement.processes)
    if found is None:
        precision = choose_precision(cfg, placement.device).name
        return (
            f"not known: no result of this machine with {precision} and {cfg.model.kind}; run `ddpm-lmk bench device` "
            "and `ddpm-lmk bench step --run RUN.yaml`"
        )
    rate = cfg.train.group_size / found.step_s
    hours = images / rate / 3600
    kind = "GPU-hours" if placement.device == "cuda" else "process-hours"
    spent = f"{hours:,.2f} h at {rate:,.3g} images/s, {hours * world:,.2f} {kind}"
    beyond = ", the reduction between processes not counted" if world > 1 else ""
    return f"about {spent} on an idle machine{beyond}; from {found.how}: {found.source}; {found.trust}"
