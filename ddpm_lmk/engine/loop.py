"""`fit`, the only training loop.

The loop knows global batches, a task, a state, the process group and a run directory. It does not ask what is learnt.
A task gives one loss per image; the loop adds them over micro-batches and ranks and divides once by the size of the
global batch, so gradients depend neither on the number of processes, nor on the micro-batch, nor on a short last batch.
How they are added, and with it the exactness class, is in `gradients`.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ddpm_lmk.config import Duration, RunConfig, TrainConfig
from ddpm_lmk.data.batch import Batch, GlobalBatch
from ddpm_lmk.data.loading.backend import Backend
from ddpm_lmk.data.loading.loader import EvalLoader, TrainLoader
from ddpm_lmk.engine.background_saver import Checkpointer
from ddpm_lmk.engine.data_feed import NO_DATA, DataFeed
from ddpm_lmk.engine.device_fit import explained_out_of_memory
from ddpm_lmk.engine.evaluate import Validation
from ddpm_lmk.engine.gradients import ExactUpdater, OrderedUpdater, Updater
from ddpm_lmk.engine.logger import CompileClock, TrainLogger
from ddpm_lmk.engine.optim import learning_rate, set_learning_rate
from ddpm_lmk.engine.parallel import Parallel, RunningStatistics
from ddpm_lmk.engine.rank_checks import announce_class, check_same_weights, kernels
from ddpm_lmk.engine.requirements import check_exclusions
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.engine.zero import ZeroUpdater
from ddpm_lmk.errors import DivergedError, ResourceError, StoppedError
from ddpm_lmk.models.weight_standardization import OncePerStep
from ddpm_lmk.rundir.checkpoint import load_checkpoint, newest_where
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.retention import Keep
from ddpm_lmk.system.console import Whole
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.system.signals import StopRequest, stopped
from ddpm_lmk.tasks.task import Task

if TYPE_CHECKING:
    from ddpm_lmk.engine.forecast import Forecast

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaders:
    """Where global batches and validation batches come from, and what works on their pixels."""

    train: TrainLoader
    validation: EvalLoader | None = None
    backend: Backend | None = None

    def close(self) -> None:
        """Stop prefetching."""
        self.train.close()


@dataclass(frozen=True)
class Pace:
    """The durations of a run file in optimizer steps; None: never on the way."""

    total: int
    warmup: int
    cycle: int
    log: int
    checkpoint: int
    keep: int | None
    snapshot: int | None
    evaluate: int | None
    compare: int

    @classmethod
    def of(cls, cfg: RunConfig, train: TrainLoader) -> Pace:
        """As this run's images and global batches make them."""

        def steps(length: Duration) -> int:
            return length.steps(cfg.train.global_batch_size, train.num_images, train.plan.steps_per_epoch)

        def interval(length: Duration | None) -> int | None:
            return None if length is None else steps(length)

        return cls(
            total=steps(cfg.train.duration),
            warmup=steps(cfg.optim.warmup),
            cycle=0 if cfg.optim.cycle is None else steps(cfg.optim.cycle),
            log=steps(cfg.runtime.log_every),
            checkpoint=steps(cfg.runtime.checkpoint_every),
            keep=interval(cfg.runtime.keep_every),
            compare=steps(cfg.runtime.compare_every),
            snapshot=interval(cfg.train.snapshot_every),
            evaluate=interval(cfg.train.evaluate_every),
        )


def is_due(every: int | None, step: int) -> bool:
    """Does an interval end at `step`?"""
    return every is not None and step > 0 and step % every == 0


def fit(
    cfg: RunConfig,
    task: Task,
    state: TrainState,
    loaders: Loaders,
    parallel: Parallel,
    run: RunDir,
    *,
    is_strict: bool = False,
    forecast: Forecast | None = None,
    whole: Whole | None = None,
) -> TrainState:
    """Train `state` to the end of the run; what is kept on the way and at the end goes to `run`.

    Args:
        is_strict: does a validation that fails end the run, with the error's own exit code?
        forecast, whole: how long it takes, and what it is a stage of, for what is shown as left.

    Raises:
        StoppedError: a signal or a file system that stays away (saved), or no memory after steps that fitted (not).
        DataError: too many samples cannot be read; the state is saved.
        DivergedError: numbers that are not finite or spikes, again after one roll-back; or ranks that differ.
        ResourceError: the disk refused three checkpoints in a row, or the final weights; no memory from the start.
    """
    pace = Pace.of(cfg, loaders.train)
    rate = learning_rate(cfg.optim, warmup=pace.warmup, total=pace.total, cycle=pace.cycle)
    _warn(state.ema.warning(pace.total), run, parallel)
    state.model.train()
    updater = build_updater(cfg, state, parallel)
    statistics = RunningStatistics(state.model, parallel)
    feed = DataFeed(loaders.train, parallel, run, start=state.step)
    clock = CompileClock(cfg, parallel, run)
    shown: dict[str, Any] = {"evaluate": pace.evaluate, "forecast": forecast, "whole": whole}
    logger = TrainLogger(state, parallel, clock, write=run.metrics, total=pace.total, every=pace.log, **shown)
    checkpointer = Checkpointer(
        run, parallel, keep=Keep(cfg.runtime.keep_checkpoints, every=pace.keep, interval=pace.checkpoint)
    )
    validation = None
    if loaders.validation is not None:
        validation = Validation(task, loaders.validation, parallel, run, cfg.train.precision, is_strict=is_strict)
    stop_level, is_owed = 0.0, False
    announce_class(cfg, step=state.step, parallel=parallel, run=run)

    with (
        StopRequest() as stop,
        kernels(cfg.train.exactness, parallel.device),
        explained_out_of_memory(cfg, task, state, parallel),
        clock,
        logger,
        feed,
        closing(updater),
        checkpointer,
    ):
        beat("train")
        while True:
            # What is due at this step. A resumed run arrives here first, and makes up for what a signal cut short.
            is_last = state.step >= pace.total
            # After a request to stop there may be seconds left: the checkpoint comes first, the successor validates.
            is_unscored = state.evaluated_at < state.step and not stop_level
            if validation is not None and is_unscored and (is_last or is_due(pace.evaluate, state.step)):
                try:
                    with logger.paused(validates=True):
                        figures = validation.score(state)
                except StoppedError as away:
                    stop_level, figures = feed.halt(away), None
                if figures is not None:
                    state.add_score(figures["score"])
                    logger.validated(figures)
            is_last = is_last or state.patience.is_exhausted
            if is_due(pace.snapshot, state.step) and not is_last:
                beat("write", step=state.step)
                with logger.paused():
                    checkpointer.keep_weights(state, _about(cfg, task, state, loaders, is_final=False))
            # A checkpoint is where a run goes back to, so none is made in between while updates are left out.
            is_good = not state.divergence.in_a_row
            is_regular = is_due(pace.checkpoint, state.step) or (is_last and state.step > pace.checkpoint)
            is_saving = bool(stop_level) or is_owed or (is_regular and is_good)
            # Before every save: a checkpoint of weights that differ between ranks would spread the fault.
            if is_saving or is_due(pace.compare, state.step):
                check_same_weights(state.model, parallel, step=state.step)
            if is_saving:
                beat("save", step=state.step)
                with logger.paused():
                    checkpointer.save(state, updater.moments())
                    is_owed = False
                if stop_level:
                    where = str(run.path) if checkpointer.wait() else "no place (disk full)"
                    feed.raise_if_halted(step=state.step, where=where)
                    raise stopped(stop_level, step=state.step, where=where)
            # After validation and saving, so that a resumed run at its last step does both.
            if is_last:
                break

            # One optimizer step: the micro-batches of a global batch, one reduction, one update.
            begin = time.perf_counter()
            global_batch, wait_s = feed.take()
            lr = rate(state.step) * state.plateau.factor
            # A function of the step, set before every update: nothing of a scheduler has to be saved.
            set_learning_rate(state.optimizer, lr)
            # Copies are small, and whether the step counts is known only after its passes.
            statistics.begin_step()
            for number, batch in enumerate(global_batch.micro_batches):
                batch = batch.to(parallel.device)
                with updater.micro_batch(number, of=len(global_batch.micro_batches)):
                    with parallel.autocast(cfg.train.precision):
                        losses = task.loss(updater.net, batch)  # [B]
                    total = (losses.float() * batch.weight).sum()
                    busy_s = time.perf_counter() - begin  # from here on it may wait for other ranks
                    updater.add(total, _divisor(cfg.train, batch, global_batch))
            outcome = updater.finish(max(stop.level, feed.level), wait_s)
            if outcome.stop_level == NO_DATA:  # a rank has no data: this step never was
                stop_level = NO_DATA
                statistics.end_step(is_kept=False)
                updater.clear()
                continue
            state.step += 1
            state.images += global_batch.size
            # Every rank judges by the same exchanged numbers, so all leave out the same updates.
            reason = state.judge(loss=outcome.loss / global_batch.size, norm=outcome.norm)
            statistics.end_step(is_kept=reason is None)
            if reason is None:
                updater.apply(cfg.optim.clip)
                # Not for an update that was left out: the average would move towards weights it has seen already.
                state.ema.update(state.step)
                task.after_step(state.model, state.step)
            else:
                run.event("update.skipped", step=state.step, reason=reason, in_a_row=state.divergence.in_a_row)
            updater.clear()
            stop_level = feed.end_step(outcome.stop_level, step=state.step)
            logger.step(outcome, size=global_batch.size, is_skipped=reason is not None, lr=lr)
            if state.scale.is_lost or state.divergence.trouble:
                _roll_back(state, parallel, run, checkpointer, every=pace.checkpoint)
                updater.reload()
                is_owed = True
            beat("step", step=state.step, busy_s=busy_s)

    # After the block: the checkpoint of the last step holds the last weights, the snapshot the best.
    if not state.select_best():
        _warn("train.select=best, but no validation gave a score; the last weights are kept", run, parallel)
    beat("write", step=state.step)
    about = _about(cfg, task, state, loaders, is_final=True)
    if not parallel.on_main(lambda: run.save_snapshot(state.weights(), about)):
        raise ResourceError(
            f"the disk took no final weights in {run.path}; free some space, the same command continues"
        )
    return state


def build_updater(cfg: RunConfig, state: TrainState, parallel: Parallel) -> Updater:
    """The way of the run's exactness class and of the launch file's ZeRO stage.

    Raises:
        ConfigError: the run asks for what cannot be kept together.
    """
    check_exclusions(cfg, world=parallel.world, zero=parallel.zero)
    if parallel.zero:
        return ZeroUpdater(state, parallel, autocast=lambda: parallel.autocast(cfg.train.precision))
    standard = None
    if cfg.train.weight_standardization != "pass":
        standard = OncePerStep(state.model, dtype=parallel.dtype(cfg.train.precision))
    return (ExactUpdater if cfg.train.exactness == "exact" else OrderedUpdater)(state, parallel, standard)


def _divisor(train: TrainConfig, batch: Batch, global_batch: GlobalBatch) -> Tensor | int:
    """What a micro-batch's summed loss is divided by: the global batch, or its own images and full parts."""
    if train.gradient == "mean":
        return global_batch.size
    # Released code divides by this number in short batches too ("nominal", docs/method.md, section 3).
    parts = (
        train.global_batch_size // (train.given_micro_batch or train.global_batch_size)
        if train.gradient == "nominal"
        else 1
    )
    return batch.weight.sum().clamp(min=1.0) * parts


def _roll_back(state: TrainState, parallel: Parallel, run: RunDir, checkpointer: Checkpointer, *, every: int) -> None:
    """Take weights, average and moments of the last good checkpoint, once; the updates since then are left out.

    Only those at the interval and before the trouble count, not those a signal made, so that an interrupted run goes
    back as far as one that was not. If this process dies before the next checkpoint, its successor does the same.

    Raises:
        DivergedError: there is none, it happened before, or fp16 overflows at any scale.
    """
    why = state.divergence.trouble or f"fp16 overflows even with a loss scale of {state.scale.value:g}"

    def is_regular(facts: dict[str, Any]) -> bool:
        return facts["step"] % every == 0 and not facts["health"]["in_a_row"]

    checkpointer.wait()
    folder = run.path / "checkpoints"
    path = parallel.on_main(lambda: newest_where(folder, is_regular)) if state.divergence.trouble else None
    if path is None or state.divergence.left_out:
        went = "; it went back to a checkpoint once already" if state.divergence.left_out else ""
        error = DivergedError(
            f"{why}, up to step {state.step}{went}; nothing of them is saved; "
            "lower optim.lr, set optim.clip or train.precision=fp32 (train.spikes=null takes every finite update)"
        )
        error.is_shared = True
        raise error
    with parallel.together():
        state.roll_back(load_checkpoint(path), load_all=lambda model, weights: model.load_state_dict(weights))
    source, step = state.divergence.left_out[-1]
    run.event("run.went_back", step=step, source=source, reason=why)
    _warn(f"{why}; went back to step {source}, the updates up to step {step} are left out", run, parallel)


def _about(cfg: RunConfig, task: Task, state: TrainState, loaders: Loaders, *, is_final: bool) -> dict[str, Any]:
    """What a snapshot says of itself: of this step on the way, of the selected weights at the end."""
    is_best = is_final and bool(state.best)
    return {
        "step": state.patience.best_step if is_best else state.step,
        "images": state.images,
        "selected": is_final,
        "config": cfg.model_dump(mode="json"),
        "out_channels": task.out_channels,
        "full_size": task.full_size,
        "spec": loaders.train.spec.model_dump(mode="json"),
        "fingerprint": loaders.train.fingerprint,
        "export": task.export(),
    }


def _warn(message: str | None, run: RunDir, parallel: Parallel) -> None:
    if message is not None and parallel.is_main:
        log.warning(message)
        run.event("warning", message=message)
