"""One run from its run file to its results: assemble, fit, evaluate.

`starting_state` is the one place that decides where weights come from. A `Workbench` outlives a run: a sweep's worker
keeps there what its next cell may want.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.leakage import Uncompared
from ddpm_lmk.data.loading.backend import choose_backend
from ddpm_lmk.data.loading.corpus import fingerprints_of
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.engine.collectives import AllRanks
from ddpm_lmk.engine.device_fit import Fitted, fit_to_device, is_free
from ddpm_lmk.engine.forecast import LONG_S, Forecast, Work, steps_done
from ddpm_lmk.engine.loop import Loaders, Pace, fit
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.precision import emulation_warning
from ddpm_lmk.engine.rank_checks import checksum, device_kinds, kept, want_same_facts
from ddpm_lmk.engine.session import Workbench
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.engine.step_timing import time_steps
from ddpm_lmk.inference import calibration
from ddpm_lmk.inference.evaluate import evaluate_parts, evaluate_split
from ddpm_lmk.inference.sample import draw_samples, to_png
from ddpm_lmk.models.encoder_unet import want_file
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import load_checkpoint
from ddpm_lmk.rundir.directory import RunDir, bring_checkpoint
from ddpm_lmk.system.console import Whole, about, progress, say
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.system.machine import code_digest, granted_cores, versions
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask, Task, build_task
from ddpm_lmk.tasks.starting_weights import put_weights
from ddpm_lmk.tasks.task import Everyone

log = logging.getLogger(__name__)

PACKAGES = ("ddpm-lmk", "torch", "accelerate", "numpy", "safetensors")


def execute(
    cfg: RunConfig,
    out: Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    parallel: Parallel | None = None,
    workbench: Workbench | None = None,
    fork: Path | None = None,
    is_strict: bool = False,
    is_foretold: bool = False,
    forecast: Forecast | None = None,
    instead: str | None = None,
    whole: Whole | None = None,
) -> dict[str, Any]:
    """Do a run in the directory `out`, or what is left of it, and return its results, on every rank.

    Args:
        fork: directory of another run, whose newest checkpoint a new run begins with.
        is_strict: refuse several kinds of devices, and end where a validation on the way fails.
        is_foretold: time some steps before the first one, and say how long the run takes here.
        forecast: how long it takes, where that is known without.
        instead: what to say where that is very long.
        whole: what the run is a stage of, so that what is shown as left is all of that.

    Raises:
        LmkError: on all ranks alike where it is found before training; see `rundir`, `data` and `engine.loop`.
    """
    parallel = parallel or Parallel(device)
    beat("setup")
    workbench = workbench or Workbench()
    with parallel.together():
        place = Path(out)
        is_fork = fork is not None
        claimed = RunDir.claim(place, cfg, is_fork=is_fork) if parallel.is_main else RunDir(place, writes=False)
    with claimed as run:
        finished = parallel.on_main(lambda: run.results(cfg))
        if finished is not None:
            return finished
        kinds = device_kinds(parallel, run, is_strict=is_strict)
        forked = None if fork is None else parallel.on_main(lambda: bring_checkpoint(fork, run.path))
        fitted = _fitted(cfg, parallel, run)
        here = fitted.applied(cfg)
        with _open_loaders(here, parallel, workbench, run) as loaders:
            with parallel.together():
                task = build_task(cfg, loaders.train.spec)
            if is_foretold and not parallel.zero:  # its state is made once
                forecast = _foretell(here, task, loaders, parallel, fitted, run, workbench)
                if parallel.is_main:
                    say(f"{cfg.name}: {forecast}")
                    if instead is not None and forecast.total_s > LONG_S:
                        say(instead)
            calibration.before_training(cfg, task, run, parallel, workbench, execute=execute)
            state, parent = starting_state(here, task, workbench=workbench, parallel=parallel, run=run)
            _want_same_everywhere(here, loaders, state, parallel)
            facts = _facts(cfg, loaders, parallel, kinds, forked or parent) | {"fit": fitted.facts()}
            parallel.on_main(lambda: run.begin(cfg, facts | {"packs": _packs(cfg)}))
            if cfg.task.stage == "pretrain":
                parallel.on_main(lambda: _note_left_out(cfg, run))
            run.journal.rewind_metrics(state.step)
            everyone = AllRanks(parallel.rank, parallel.world) if parallel.world > 1 else Everyone()
            task.meet(everyone, total=Pace.of(cfg, loaders.train).total)
            with parallel.training_in(fitted.precision):
                shown: dict[str, Any] = {"forecast": forecast, "whole": whole}
                fit(here, task, state, loaders, parallel, run, is_strict=is_strict, **shown)
            with _concluding(cfg, loaders, parallel, forecast, whole) as show:
                results = _conclude(cfg, task, state, loaders, parallel, run, workbench, show)
        parallel.on_main(lambda: run.finish(cfg, results))
        return results


def _foretell(
    cfg: RunConfig,
    task: Task,
    loaders: Loaders,
    parallel: Parallel,
    fitted: Fitted,
    run: RunDir,
    workbench: Workbench,
) -> Forecast:
    """How long it takes from here on."""
    done = parallel.on_main(lambda: steps_done(run.path))
    work = Work.of(cfg, steps=Pace.of(cfg, loaders.train).total, done=done)
    return time_steps(cfg, task, parallel, precision=fitted.precision, workbench=workbench).forecast(work)


@contextmanager
def _concluding(
    cfg: RunConfig, loaders: Loaders, parallel: Parallel, forecast: Forecast | None, whole: Whole | None
) -> Iterator[Callable[[int, int], None]]:
    """Shows what follows the last step: a bar on a terminal, else a line before it. Yields a function of (done, of)."""
    split = cfg.evaluate.split
    doing = "drawing samples" if cfg.task.kind == "denoise" and cfg.evaluate.samples else ""
    doing = f"scoring split {split}" if cfg.task.kind == "landmarks" and split is not None else doing
    if not doing or not parallel.is_main:
        yield lambda done, total: None
        return
    if whole is None and not sys.stderr.isatty():
        say(f"{cfg.name}: {doing}" + (f", {about(forecast.conclude_s)}" if forecast is not None else ""))
    with progress(doing, lines=False) as show:
        yield show


def starting_state(
    cfg: RunConfig, task: Task, *, workbench: Workbench, parallel: Parallel, run: RunDir
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state a run begins with, and the facts of its parent weights, if any. The first that applies:

    1. The newest good checkpoint of the run directory: everything continues as it was.
    2. `init.weights`, into a network that is otherwise random from `seed`. All of it where the parent learnt the same
       task with the same outputs on the same dataset; the encoder where that is all the weights have of the network;
       else all but the output layer, which stays random from `seed`.
    3. Random from `seed`.
    """
    with parallel.together():
        verified = run.load_latest() if parallel.is_main else None
    newest = parallel.broadcast(None if verified is None else verified.path)
    with parallel.together():
        model = workbench.model(cfg, task, parallel.device)
        parent = None
        if newest is None and cfg.init.weights is not None:
            parent = _load_parent(cfg, task, model, workbench)
        state = TrainState.fresh(cfg, model)
        if newest is not None:
            state.load(verified or load_checkpoint(newest), load_all=load_all)
    return state, parent


def _fitted(cfg: RunConfig, parallel: Parallel, run: RunDir) -> Fitted:
    """What this run does on this device: as before where it is continued, else chosen now."""
    before = parallel.on_main(lambda: run.facts().get("fit"))
    if before is not None:
        fitted = Fitted.of(before)
        _warn_of_emulation(cfg, fitted, parallel)
        return fitted
    with parallel.together():
        manifests = open_datasets(cfg.data) if _needs_data(cfg) else []
    images = sum(len(manifest.rows(cfg.data.splits)) for manifest in manifests)
    outputs = sum(manifest.spec.num_landmarks for manifest in manifests) if cfg.task.kind == "landmarks" else 1
    steps = cfg.train.length.steps(cfg.train.group_size, cfg.data.shots or images)
    fitted = fit_to_device(cfg, max(1, outputs), parallel, steps=steps)
    if parallel.is_main:
        say(str(fitted))
    _warn_of_emulation(cfg, fitted, parallel)
    return fitted


def _warn_of_emulation(cfg: RunConfig, fitted: Fitted, parallel: Parallel) -> None:
    """Say before the first step how much longer it takes in a precision that this machine has no instructions for."""
    if parallel.is_main and (warning := emulation_warning(cfg, fitted.precision, parallel.device.type)):
        log.warning(warning)


def _needs_data(cfg: RunConfig) -> bool:
    """Does what is chosen depend on the data's landmarks, or its number of images?"""
    return is_free(cfg) or (cfg.train.compile == "auto" and cfg.train.length.unit == "epochs")


def _note_left_out(cfg: RunConfig, run: RunDir) -> None:
    """Write what is not trained on, and why, and say so in one line."""
    record = report.write_record(cfg, run.path)
    found = report.summary(record)
    run.event("data.compared", **found)
    for pair in record["patients_not_compared"]:
        log.warning("%s", Uncompared(**pair))
    if found["leaks"] or found["copies"]:
        log.warning(
            "%d images are left out, of %d in protected splits and %d copies; %s says which",
            *(found["left_out"], found["leaks"], found["copies"], run.path / report.FILE_NAME),
        )


def _load_parent(cfg: RunConfig, task: Task, model: nn.Module, workbench: Workbench) -> dict[str, Any]:
    """Put `init.weights` into `model`; returns what is worth knowing about them later."""
    assert cfg.init.weights is not None
    if cfg.model.kind == "encoder_unet":
        want_file(cfg.init.weights)
    weights, meta = workbench.weights(cfg.init)
    part = put_weights(cfg, task, model, weights, meta)
    facts: dict[str, Any] = {key: meta[key] for key in ("path", "use", "step", "fingerprint", "files") if key in meta}
    return {**facts, "loaded": part}


@contextmanager
def _open_loaders(cfg: RunConfig, parallel: Parallel, workbench: Workbench, run: RunDir) -> Iterator[Loaders]:
    place: dict[str, Any] = {
        "rank": parallel.rank,
        "world": parallel.world,
        "device": str(parallel.device),
        "cache": workbench.cache,
    }
    before = run.facts().get("loader")
    backend = parallel.on_main(lambda: choose_backend(cfg, device=parallel.device, world=parallel.world, before=before))
    place["backend"] = backend.name
    if parallel.is_main:
        say(f"loader={backend.name} ({backend.reason})")
    with parallel.together():
        train = open_loader(cfg, stage="train", **place)
        split = cfg.data.validation_split
        validation = None if split is None else open_loader(cfg, stage="evaluate", split=split, **place)
    loaders = Loaders(train, validation, backend)
    try:
        yield loaders
    finally:
        loaders.close()
        parallel.release()


def _want_same_everywhere(cfg: RunConfig, loaders: Loaders, state: TrainState, parallel: Parallel) -> None:
    """All ranks must run the same code, for the same run, on the same data, from the same weights (A16)."""
    mine = {
        "code": code_digest(),
        "torch": torch.__version__,
        "run file": config_hash(cfg),
        "data": loaders.train.fingerprint,
        "start": f"step {state.step}, weights {checksum(state.model).item() % 2**64:016x}",
    }
    want_same_facts(mine, parallel)


def _facts(
    cfg: RunConfig, loaders: Loaders, parallel: Parallel, kinds: list[str], parent: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of run.json."""
    is_cuda = parallel.device.type == "cuda"
    return {
        "name": cfg.name,
        "seed": cfg.seed,
        "config_hash": config_hash(cfg),
        "fingerprint": loaders.train.fingerprint,
        "num_images": loaders.train.num_images,
        "parent": parent,
        "loader": None if loaders.backend is None else asdict(loaders.backend),
        "exactness": kept(cfg, kinds),
        "devices": kinds,
        "zero": parallel.zero,
        "code": code_digest(),
        "versions": versions(*PACKAGES),
        "hardware": {
            "device": torch.cuda.get_device_name(parallel.device) if is_cuda else platform.machine(),
            "processes": parallel.world,
            "cpus": granted_cores(),
            "threads": torch.get_num_threads(),
        },
    }


def _packs(cfg: RunConfig) -> dict[str, list[str]]:
    """The packs of a run by the keys that name their places, to know them again elsewhere."""
    data = cfg.data
    return {"data.path": fingerprints_of(data, data.path), "data.protect": fingerprints_of(data, data.protect)}


def _conclude(
    cfg: RunConfig,
    task: Task,
    state: TrainState,
    loaders: Loaders,
    parallel: Parallel,
    run: RunDir,
    workbench: Workbench,
    show: Callable[[int, int], None],
) -> dict[str, Any]:
    """Score what was learnt: a task that finds points on its split, any other by the losses it ended with."""
    train = {
        "steps": state.step,
        "images": state.images,
        "wall_s": round(state.seconds, 2),
        "skipped": state.health.skipped,
        "tflop": _tflop(cfg, task, state.images),
    }
    with state.ema.applied() as model:
        calibration.after_training(cfg, task, model, run, parallel, workbench)
        if isinstance(task, LandmarkTask) and cfg.evaluate.split is not None:
            split, cache = cfg.evaluate.split, workbench.cache
            score = evaluate_parts if len(cfg.data.path) > 1 else evaluate_split
            return score(cfg, task, model, parallel, split=split, out=run.path, train=train, cache=cache, show=show)
        if isinstance(task, DenoiseTask) and cfg.evaluate.samples:
            images = draw_samples(cfg, task, model, parallel, count=cfg.evaluate.samples, show=show)
            parallel.on_main(lambda: to_png(images, run.path / "samples.png"))
    learnt, validated = parallel.on_main(run.journal.last_metrics)
    return {
        "kind": cfg.task.kind,
        "name": cfg.name,
        "dataset": loaders.train.spec.name,
        "num_images": loaders.train.num_images,
        "seed": cfg.seed,
        "start": cfg.init.model_dump(mode="json"),
        "train": {**train, **{key: learnt.get(key) for key in ("loss", "images_per_s", "data_wait")}},
        "validation": validated.get("validation"),
        "validated_step": validated.get("step"),
        "leakage": parallel.on_main(lambda: _left_out(cfg, run)),
    }


def _left_out(cfg: RunConfig, run: RunDir) -> dict[str, int] | None:
    """What pre-training left out; a fine-tuning run that scores nothing compares nothing."""
    return report.summary(report.read_record(run.path)) if cfg.task.stage == "pretrain" else None


def _tflop(cfg: RunConfig, task: Task, images: int) -> float:
    """Operations of training as executed, 10^12."""
    return round(task.cost(cfg.model, cfg.data.image_size).flops_train * images / 1e12, 6)


def run_job(job: dict[str, Any]) -> int:
    """Do the run of a job ({"config": resolved run, "out": directory, "device": "cpu" or "cuda", "zero": stage}).

    `fork` and `strict` of the command line are in it too, and what `execute` says of its time (`is_foretold`,
    `forecast`, `instead`, `whole`).
    """
    parallel = Parallel(job.get("device", "auto"), zero=job.get("zero", 0))
    fork = Path(job["fork"]) if job.get("fork") else None
    cfg, out = RunConfig.model_validate(job["config"]), Path(job["out"])
    whole = Whole(**job["whole"]) if job.get("whole") else None
    foretold: dict[str, Any] = {"is_foretold": job.get("is_foretold", True), "instead": job.get("instead")}
    foretold["forecast"] = Forecast(**job["forecast"]) if job.get("forecast") else None
    execute(cfg, out, parallel=parallel, fork=fork, is_strict=job.get("strict", False), whole=whole, **foretold)
    parallel.close()
    return 0
