"""One run from its run file to its results: open, fit, evaluate.

Where its weights come from is decided in `engine.starting_weights`. A run with pseudo-labels does its teacher first, a
run like any other in RUN/teacher, which may have a teacher itself (docs/method.md, section 10). A `Session` outlives a
run: a sweep's worker keeps there what its next cell may use.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.leakage import Uncompared
from ddpm_lmk.data.loading.backend import choose_backend
from ddpm_lmk.data.loading.corpus import (
    Corpus,
    fingerprint,
    images_left_out,
    packs_of,
    spec_of,
    training_corpora,
    unlabelled_corpora,
)
from ddpm_lmk.engine.device_fit import Fitted, emulation_warning, fit_to_device
from ddpm_lmk.engine.forecast import LONG_S, Forecast, Work, steps_done, time_steps
from ddpm_lmk.engine.loop import Loaders, Pace, fit
from ddpm_lmk.engine.parallel import AllRanks, Parallel
from ddpm_lmk.engine.rank_checks import check_devices, check_same_facts, checksum, class_kept
from ddpm_lmk.engine.session import Session
from ddpm_lmk.engine.starting_weights import starting_state
from ddpm_lmk.engine.trackers import Trackers
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.inference import calibration, pseudo_labels
from ddpm_lmk.inference.evaluate import evaluate_parts, evaluate_split
from ddpm_lmk.inference.propagate import Pool, pseudo_labelled
from ddpm_lmk.inference.sample import draw_samples, to_png
from ddpm_lmk.inference.scoring import check_temperatures
from ddpm_lmk.rundir.directory import RunDir, copy_checkpoint
from ddpm_lmk.rundir.lock import PSEUDO_LABELS, TEACHER, check_same_data
from ddpm_lmk.system import accelerator
from ddpm_lmk.system.console import Whole, about, print_status, progress
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.system.machine import code_digest, granted_cores, versions
from ddpm_lmk.tasks import DenoiseTask, LandmarkTask, Task, build_task
from ddpm_lmk.tasks.task import OneRank

log = logging.getLogger(__name__)

PACKAGES = ("ddpm-lmk", "torch", "accelerate", "numpy", "safetensors")
Show = Callable[[int, int], None]  # is told how many images are done, and of how many


@dataclass(frozen=True)
class Past:
    """What the directory of a run holds when the run begins; read by rank 0, the same on all ranks.

    Attributes:
        results: of this very run, where it is finished.
        facts: run.json of the run that is resumed; empty for a new one.
        forked: where the checkpoint comes from that a fork begins with.
        steps_done: of the newest checkpoint.
    """

    results: dict[str, Any] | None
    facts: dict[str, Any]
    forked: dict[str, Any] | None = None
    steps_done: int = 0


def execute(
    cfg: RunConfig,
    out: Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    parallel: Parallel | None = None,
    session: Session | None = None,
    fork: Path | None = None,
    is_strict: bool = False,
    is_foretold: bool = False,
    forecast: Forecast | None = None,
    instead: str | None = None,
    whole: Whole | None = None,
    then: Sequence[Work] = (),
    group: str | None = None,
) -> dict[str, Any]:
    """Do a run in the directory `out`, or what is left of it, and return its results, on every rank.

    Args:
        fork: directory of another run, whose newest checkpoint a new run begins with.
        is_strict: refuse several kinds of devices, and end where a validation on the way fails.
        is_foretold: time some steps before the first one, and say how long the run takes here.
        forecast: how long it takes, where that is known without.
        instead: what to say where that is very long.
        whole: what the run is a stage of, so that what is shown as left is all of that.
        then: what the runs that learn from this one have to do, which is foretold with it.
        group: the sweep it is part of, for trackers.

    Raises:
        LmkError: on all ranks alike where it is found before training; see `rundir`, `data` and `engine.loop`.
    """
    parallel = parallel or Parallel(device)
    session = session or Session()
    beat("setup")
    with (
        _locked_directory(cfg, Path(out), parallel, is_fork=fork is not None) as run,
        Trackers(cfg, run, group=group) as trackers,
    ):
        past = parallel.on_main(lambda: _look_back(cfg, run, fork))
        if past.results is not None:
            return past.results
        devices = check_devices(parallel, past.facts.get("devices", []), is_strict=is_strict)
        # On one rank: a large pool takes minutes and gigabytes to compare.
        left_out = parallel.on_main(lambda: images_left_out(cfg))
        with parallel.together():
            # Opened once, before the settings are fitted: steps, outputs and loaders all follow from it.
            corpora = training_corpora(cfg, left_out)
            unlabelled = unlabelled_corpora(cfg, left_out)
            task = build_task(cfg, spec_of(cfg, [corpus.manifest.spec for corpus in corpora]))
        if cfg.teacher is not None and is_foretold:
            whole = whole or Whole(cfg.name, time.monotonic(), then_s=0.0)
        common: dict[str, Any] = {"device": device, "parallel": parallel, "session": session, "is_strict": is_strict}
        common |= {"group": group}
        telling: dict[str, Any] = {"is_foretold": is_foretold, "instead": instead, "whole": whole}
        taught_by = _run_teacher(cfg, run, past, corpora, unlabelled, then, **common, **telling)
        fitted = _fit(cfg, task, corpora, past, parallel)
        here = fitted.applied(cfg)
        began = past.facts.get("pool")
        pool = pseudo_labelled(here, task, unlabelled, run, parallel, session, began=began, taught_by=taught_by)
        with _opened(here, corpora, pool, past, parallel, session) as loaders:
            pace = Pace.of(here, loaders.train)
            if is_foretold and not parallel.zero:  # whose state is made once
                work = Work.of(here, steps=pace.total, done=past.steps_done)
                more: dict[str, Any] = {"session": session, "is_scored": bool(then)}
                timing = time_steps(here, task, parallel, precision=fitted.precision, **more)
                forecast, then_s = timing.forecast(work), sum(timing.forecast(each).total_s for each in then)
                whole = whole if whole is None else replace(whole, then_s=whole.then_s + then_s)
                _tell_forecast(cfg, forecast, instead, parallel, num_after=len(then), then_s=then_s)
            state, parent = starting_state(here, task, session=session, parallel=parallel, run=run)
            # After the weights are loaded and before anything is written: a rank with other code would train another
            # run.
            _check_same_everywhere(here, loaders, state, parallel)
            facts = _facts(cfg, loaders, parallel, devices, past.forked or parent) | {"fit": fitted.facts()}
            facts |= {} if pool.facts is None else {"pool": pool.facts}
            parallel.on_main(lambda: _begin(cfg, run, corpora, facts, step=state.step))
            trackers.start()
            collectives = AllRanks(parallel.rank, parallel.world) if parallel.world > 1 else OneRank()
            task.prepare(collectives, total_steps=pace.total)
            # Not for the score, which is computed in what `auto` means to everybody.
            with parallel.training_in(fitted.precision):
                fit(here, task, state, loaders, parallel, run, is_strict=is_strict, forecast=forecast, whole=whole)
            with _shown_conclusion(cfg, parallel, forecast, whole) as show:
                results = _conclude(cfg, task, state, loaders, pool, parallel, run, session, show)
        parallel.on_main(lambda: run.finish(cfg, results))
        trackers.conclude(results)
        return results


def _locked_directory(cfg: RunConfig, out: Path, parallel: Parallel, *, is_fork: bool) -> RunDir:
    """The run directory, locked by rank 0; on the others one that only reads."""
    with parallel.together():
        return RunDir.lock(out, cfg, is_fork=is_fork) if parallel.is_main else RunDir(out, writes=False)


def _look_back(cfg: RunConfig, run: RunDir, fork: Path | None) -> Past:
    """What the directory holds, with the checkpoint of `fork` in it; on rank 0."""
    results = run.results(cfg)
    if results is not None:
        return Past(results, {})
    check_temperatures(cfg, run.path)
    forked = None if fork is None else copy_checkpoint(fork, run.path)
    return Past(None, run.facts(), forked, steps_done(run.path))


def _run_teacher(
    cfg: RunConfig,
    run: RunDir,
    past: Past,
    corpora: Sequence[Corpus],
    unlabelled: Sequence[Corpus],
    then: Sequence[Work],
    *,
    parallel: Parallel,
    **how: Any,
) -> dict[str, Any] | None:
    """Do the run that makes the pseudo-labels of this one; its results, None where there is nothing to learn from it.

    Its directory may go once this run has begun with the labels it has made.
    """
    teacher = cfg.teacher
    if teacher is None:
        return None
    has_labels = parallel.on_main((run.path / PSEUDO_LABELS).is_file)
    if has_labels and "pool" in past.facts:
        return None
    parallel.on_main(lambda: run.claim(cfg))  # from here on the directory holds something
    # One that has finished would not look at its data again.
    packs = packs_of(teacher, corpora)
    parallel.on_main(lambda: check_same_data(run.path / TEACHER, fingerprint(corpora), packs))
    work = Work.of(cfg, done=past.steps_done)
    if not has_labels:
        work = replace(work, scored=work.scored + sum(len(corpus.rows) for corpus in unlabelled))
    return execute(teacher, run.path / TEACHER, parallel=parallel, then=(work, *then), **how)


def _fit(cfg: RunConfig, task: Task, corpora: Sequence[Corpus], past: Past, parallel: Parallel) -> Fitted:
    """What this run does on this device: as before where it is resumed, else chosen now."""
    if "fit" in past.facts:
        fitted = Fitted.of(past.facts["fit"])
    else:
        images = sum(len(corpus.rows) for corpus in corpora)
        # About: only whether compilation pays depends on it.
        steps = cfg.train.duration.steps(cfg.train.global_batch_size, images)
        fitted = fit_to_device(cfg, task, parallel, steps=steps)
        if parallel.is_main:
            print_status(str(fitted))
    if parallel.is_main and (warning := emulation_warning(cfg, fitted.precision, parallel.device.type)):
        log.warning(warning)
    return fitted


@contextmanager
def _opened(
    cfg: RunConfig, corpora: Sequence[Corpus], pool: Pool, past: Past, parallel: Parallel, session: Session
) -> Iterator[Loaders]:
    """The loaders of training and validation, closed when the block is left."""
    place: dict[str, Any] = {"rank": parallel.rank, "world": parallel.world, "device": str(parallel.device)}
    before = past.facts.get("loader")
    backend = parallel.on_main(lambda: choose_backend(cfg, device=parallel.device, world=parallel.world, before=before))
    place |= {"cache": session.cache, "backend": backend.name}
    if parallel.is_main:
        print_status(f"loader={backend.name} ({backend.reason})")
    with parallel.together():
        train = open_loader(cfg, stage="train", corpora=corpora, pseudo_labelled=pool.corpora, **place)
        split = cfg.data.validation_split
        validation = None if split is None else open_loader(cfg, stage="evaluate", split=split, **place)
    loaders = Loaders(train, validation, backend)
    try:
        yield loaders
    finally:
        loaders.close()
        parallel.release()


def _tell_forecast(
    cfg: RunConfig, forecast: Forecast, instead: str | None, parallel: Parallel, *, num_after: int, then_s: float
) -> None:
    if parallel.is_main:
        runs = "the run that learns" if num_after == 1 else f"the {num_after} runs that learn"
        after = f"; with {runs} from it {about(forecast.total_s + then_s)}" if num_after else ""
        print_status(f"{cfg.name}: {forecast}{after}")
        if instead is not None and forecast.total_s + then_s > LONG_S:
            print_status(instead)


def _check_same_everywhere(cfg: RunConfig, loaders: Loaders, state: TrainState, parallel: Parallel) -> None:
    """All ranks must run the same code, for the same run, on the same data, from the same weights (A16)."""
    mine = {
        "code": code_digest(),
        "torch": torch.__version__,
        "run file": config_hash(cfg),
        "data": loaders.train.fingerprint,
        "start": f"step {state.step}, weights {checksum(state.model).item() % 2**64:016x}",
    }
    check_same_facts(mine, parallel)


def _facts(
    cfg: RunConfig, loaders: Loaders, parallel: Parallel, devices: list[str], parent: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "name": cfg.name,
        "seed": cfg.seed,
        "config_hash": config_hash(cfg),
        "fingerprint": loaders.train.fingerprint,
        "num_images": loaders.train.num_images,
        "parent": parent,
        "loader": None if loaders.backend is None else asdict(loaders.backend),
        "exactness": class_kept(cfg, devices),
        "devices": devices,
        "zero": parallel.zero,
        "code": code_digest(),
        "versions": versions(*PACKAGES),
        "hardware": {
            "device": accelerator.name(parallel.device) or platform.machine(),
            "processes": parallel.world,
            "cpus": granted_cores(),
            "threads": torch.get_num_threads(),
        },
    }


def _begin(cfg: RunConfig, run: RunDir, corpora: Sequence[Corpus], facts: dict[str, Any], *, step: int) -> None:
    """Write what this run is, what it leaves out, and drop lines after `step`, which it will write again; on rank 0."""
    run.begin(cfg, facts | {"packs": packs_of(cfg, corpora)})
    run.log.rewind_metrics(step)
    if cfg.task.stage != "pretrain":
        return
    record = report.write_record(cfg, run.path)
    counts = report.summary(record)
    run.event("data.compared", **counts)
    for pair in record["patients_not_compared"]:
        log.warning("%s", Uncompared(**pair))
    if counts["leaks"] or counts["copies"]:
        log.warning(
            "%d images are left out, of %d in protected splits and %d copies; %s says which",
            *(counts["left_out"], counts["leaks"], counts["copies"], run.path / report.FILE_NAME),
        )


def _shown_conclusion(
    cfg: RunConfig, parallel: Parallel, forecast: Forecast | None, whole: Whole | None
) -> AbstractContextManager[Show]:
    """Shows what follows the last step: a bar on a terminal, else a line before it. Yields a function of (done, of)."""
    split, doing = cfg.evaluate.split, ""
    if cfg.task.kind == "denoise" and cfg.evaluate.samples:
        doing = "drawing samples"
    elif cfg.task.kind == "landmarks" and split is not None:
        doing = f"scoring split {split}"
    if not doing or not parallel.is_main:
        return nullcontext(lambda done, total: None)
    if whole is None and not sys.stderr.isatty():
        print_status(f"{cfg.name}: {doing}" + (f", {about(forecast.conclude_s)}" if forecast is not None else ""))
    return progress(doing, lines=False)


def _conclude(
    cfg: RunConfig,
    task: Task,
    state: TrainState,
    loaders: Loaders,
    pool: Pool,
    parallel: Parallel,
    run: RunDir,
    session: Session,
    show: Show,
) -> dict[str, Any]:
    """Score what was learnt: a task that finds points on its split, any other by the losses it ended with."""
    train: dict[str, Any] = {
        "steps": state.step,
        "images": state.images,
        "wall_s": round(state.seconds, 2),
        "skipped": state.divergence.skipped,
        # Operations of training as executed, 10^12.
        "tflop": round(task.cost(cfg.model, cfg.data.image_size).flops_train * state.images / 1e12, 6),
    }
    if pool.facts is not None:  # what a run costs is what it took to get there
        train |= {key: round(train[key] + pool.facts["teachers"][key], 6) for key in pseudo_labels.COSTS}
    if isinstance(task, LandmarkTask) and task.second_look is not None:  # how much of it was spent on crops
        share = task.cost_of_crops(cfg.model).flops_train / task.cost(cfg.model, cfg.data.image_size).flops_train
        train["tflop_crops"] = round(train["tflop"] * share, 6)
    with state.ema.applied() as model:
        calibration.after_training(cfg, task, model, run, parallel, session)
        if isinstance(task, LandmarkTask) and cfg.evaluate.split is not None:
            split, cache = cfg.evaluate.split, session.cache
            more: dict[str, Any] = {"split": split, "out": run.path, "train": train, "cache": cache, "show": show}
            if len(cfg.data.path) > 1:
                return evaluate_parts(cfg, task, model, parallel, **more)
            return evaluate_split(cfg, task, model, parallel, pool=pool.facts, **more)
        if isinstance(task, DenoiseTask) and cfg.evaluate.samples:
            images = draw_samples(cfg, task, model, parallel, count=cfg.evaluate.samples, show=show)
            parallel.on_main(lambda: to_png(images, run.path / "samples.png"))
    return parallel.on_main(lambda: _unscored(cfg, loaders, run, train, pool))


def _unscored(cfg: RunConfig, loaders: Loaders, run: RunDir, train: dict[str, Any], pool: Pool) -> dict[str, Any]:
    """Results of a run that finds no points, from what it noted on the way; on rank 0."""
    trained, validated = run.log.last_metrics()
    # A fine-tuning run that scores nothing compares nothing.
    leakage = report.summary(report.read_record(run.path)) if cfg.task.stage == "pretrain" else None
    return {
        "kind": cfg.task.kind,
        "name": cfg.name,
        "dataset": loaders.train.spec.name,
        "num_images": loaders.train.num_images,
        "seed": cfg.seed,
        "start": cfg.init.model_dump(mode="json"),
        "train": {**train, **{key: trained.get(key) for key in ("loss", "images_per_s", "data_wait")}},
        "validation": validated.get("validation"),
        "validated_step": validated.get("step"),
        "leakage": leakage,
    } | ({} if pool.facts is None else {"pool": pool.facts})


def run_job(job: dict[str, Any]) -> int:
    """Do the run of a job ({"config": resolved run, "out": directory, "device": "cpu" or "cuda", "zero": stage}).

    `fork` and `strict` of the command line are in it too, and what `execute` says of its time (`is_foretold`,
    `forecast`, `instead`, `whole`), and the sweep it is part of (`group`).
    """
    parallel = Parallel(job.get("device", "auto"), zero=job.get("zero", 0))
    execute(
        RunConfig.model_validate(job["config"]),
        Path(job["out"]),
        parallel=parallel,
        fork=Path(job["fork"]) if job.get("fork") else None,
        is_strict=job.get("strict", False),
        is_foretold=job.get("is_foretold", True),
        forecast=Forecast(**job["forecast"]) if job.get("forecast") else None,
        instead=job.get("instead"),
        whole=Whole(**job["whole"]) if job.get("whole") else None,
        group=job.get("group"),
    )
    # Ends the process group here, since its destructor may run after that of the interpreter.
    parallel.close()
    return 0
