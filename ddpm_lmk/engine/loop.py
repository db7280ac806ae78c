"""`fit`, the only training loop, and `evaluate`.

The loop knows groups, a task, a state, the process group and a run directory. It does not ask what is learnt. A task
gives one loss per image; the loop adds them over micro-batches and ranks and divides once by the group's global size,
so gradients depend neither on the number of processes, nor on the micro-batch, nor on a short last group.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_lmk.config import Duration, RunConfig
from ddpm_lmk.data.batch import Batch, Group
from ddpm_lmk.data.torch_loader import EvalLoader, TrainLoader
from ddpm_lmk.engine.meter import Meter
from ddpm_lmk.engine.optim import clip, global_norm, gradients, learning_rate, set_learning_rate
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.saver import Saver
from ddpm_lmk.engine.state import TrainState
from ddpm_lmk.engine.stop import StopRequest, stopped
from ddpm_lmk.errors import ConfigError, DivergedError, ResourceError
from ddpm_lmk.retention import Keep
from ddpm_lmk.rundir import RunDir
from ddpm_lmk.tasks.task import Task

MOST_SKIPS_IN_A_ROW = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaders:
    """Where groups and validation batches come from."""

    train: TrainLoader
    validation: EvalLoader | None = None

    def close(self) -> None:
        """Stop prefetching."""
        self.train.close()


@dataclass(frozen=True)
class Pace:
    """The durations of a run file in optimizer steps; None: never on the way."""

    total: int
    warmup: int
    log: int
    checkpoint: int
    keep: int | None
    snapshot: int | None
    evaluate: int | None

    @classmethod
    def of(cls, cfg: RunConfig, train: TrainLoader) -> Pace:
        """Raises `ConfigError` for an interval of no steps."""

        def steps(length: Duration) -> int:
            return length.steps(cfg.train.group_size, train.num_images, train.plan.steps_per_epoch)

        def interval(name: str) -> int:
            length: Duration = getattr(cfg.train, name)
            if not steps(length):
                raise ConfigError(f"train.{name}={length} is no interval; wanted at least 1 step")
            return steps(length)

        return cls(
            total=steps(cfg.train.length),
            warmup=steps(cfg.optim.warmup),
            log=interval("log_every"),
            checkpoint=interval("checkpoint_every"),
            keep=None if cfg.train.keep_every is None else interval("keep_every"),
            snapshot=None if cfg.train.snapshot_every is None else interval("snapshot_every"),
            evaluate=None if cfg.train.evaluate_every is None else interval("evaluate_every"),
        )


def is_due(every: int | None, step: int) -> bool:
    """Does an interval end at `step`?"""
    return every is not None and step > 0 and step % every == 0


def fit(cfg: RunConfig, task: Task, state: TrainState, loaders: Loaders, parallel: Parallel, run: RunDir) -> TrainState:
    """Train `state` to the end of the run; what is kept on the way and at the end goes to `run`.

    Raises:
        StoppedError: a signal; the state is saved.
        DivergedError: more than 5 steps in a row were not finite; nothing of them is saved.
        ResourceError: the disk refused three checkpoints in a row, or the final weights.
    """
    pace = Pace.of(cfg, loaders.train)
    rate = learning_rate(cfg.optim, warmup=pace.warmup, total=pace.total)
    _warn(state.ema.warning(pace.total), run, parallel)
    net = parallel.prepare(state.model).train()
    groups = loaders.train.groups(state.step)
    meter = Meter(state, parallel, write=run.metrics, total=pace.total, every=pace.log)
    saver = Saver(run, parallel, keep=Keep(cfg.train.keep_checkpoints, pace.keep))
    stop_level = 0.0

    with StopRequest() as stop, meter, closing(groups), saver:
        while True:
            # What is due at this step. A resumed run arrives here first, and makes up for what a signal cut short.
            is_last = state.step >= pace.total
            is_unseen = loaders.validation is not None and state.evaluated_at < state.step
            if is_unseen and not stop_level and (is_last or is_due(pace.evaluate, state.step)):
                with meter.paused(), state.ema.applied() as model:
                    assert loaders.validation is not None
                    figures = evaluate(task, model, loaders.validation, parallel, cfg.train.precision)
                state.see(figures["score"])
                meter.validated(figures)
            is_last = is_last or state.patience.is_exhausted
            if is_due(pace.snapshot, state.step) and not is_last:
                with meter.paused():
                    _keep_weights(cfg, task, state, loaders, parallel, run, is_final=False)
            if stop_level or is_due(pace.checkpoint, state.step) or (is_last and state.step > pace.checkpoint):
                with meter.paused():
                    saver.save(state)
                if stop_level:
                    where = str(run.path) if saver.wait() else "no place (disk full)"
                    raise stopped(stop_level, step=state.step, where=where)
            if is_last:
                break

            # One optimizer step: the micro-batches of a group, one reduction, one update.
            begin = time.perf_counter()
            group = next(groups)
            wait_s = time.perf_counter() - begin
            lr = rate(state.step) * state.plateau.factor
            set_learning_rate(state.optimizer, lr)
            loss_sum = torch.zeros((), device=parallel.device)
            for number, batch in enumerate(group.micro_batches, start=1):
                batch = batch.to(parallel.device)
                with parallel.accumulate(net, is_last=number == len(group.micro_batches)):
                    with parallel.autocast(cfg.train.precision):
                        losses = task.loss(net, batch)  # [B]
                    total = (losses.float() * batch.weight).sum()
                    parallel.backward(total / _divisor(cfg.train.gradient, batch, group))
                loss_sum += total.detach()
            grads = gradients(state.model)
            norm = global_norm(grads)
            is_finite = torch.isfinite(loss_sum) & torch.isfinite(norm)
            flags = torch.stack([1.0 - is_finite.float(), loss_sum.new_tensor(stop.level)])
            is_skipped, stop_level = parallel.agree(flags)
            if not is_skipped:
                clip(cfg.optim.clip, grads, norm)
                state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.images += group.size
            if not is_skipped:
                state.ema.update(state.step)
                task.after_step(state.model, state.step)
            _count_skips(state, bool(is_skipped), run)
            meter.step(loss_sum, norm, size=group.size, wait_s=wait_s, is_skipped=bool(is_skipped), lr=lr)

    state.select_best()
    _keep_weights(cfg, task, state, loaders, parallel, run, is_final=True)
    return state


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    loader: EvalLoader,
    parallel: Parallel,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> dict[str, float]:
    """Figures of `task` over every sample of `loader`, the same on all ranks; `score` is the one that selects."""
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    for batch in loader:
        with parallel.autocast(precision):
            part = task.evaluate(model, batch.to(parallel.device))
        for key, value in part.items():
            sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64, device=parallel.device)) + value
    model.train(was_training)
    return task.summarize(parallel.sum_mappings({key: value.item() for key, value in sums.items()}))


def _divisor(gradient: Literal["mean", "sum"], batch: Batch, group: Group) -> Tensor | int:
    """What a micro-batch's summed loss is divided by: the group, or for "sum" its own number of images."""
    return group.size if gradient == "mean" else batch.weight.sum().clamp(min=1.0)


def _count_skips(state: TrainState, is_skipped: bool, run: RunDir) -> None:
    """Keep count of updates left out; more than 5 in a row end the run."""
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if is_skipped else 0
    if not is_skipped:
        return
    state.skipped += 1
    run.event("update.skipped", step=state.step, in_a_row=state.skipped_in_a_row)
    if state.skipped_in_a_row > MOST_SKIPS_IN_A_ROW:
        raise DivergedError(
            f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}; "
            "nothing of them is saved; lower optim.lr, set optim.clip or train.precision=fp32, and run again"
        )


def _keep_weights(
    cfg: RunConfig, task: Task, state: TrainState, loaders: Loaders, parallel: Parallel, run: RunDir, *, is_final: bool
) -> None:
    """Write a snapshot: of this step on the way, of the selected weights at the end."""
    is_best = is_final and bool(state.best)
    meta: dict[str, Any] = {
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
    is_saved = parallel.on_main(lambda: run.save_snapshot(state.weights(), meta))
    if is_final and not is_saved:
        raise ResourceError(
            f"the disk took no final weights in {run.path}; free some space, the same command continues"
        )


def _warn(message: str | None, run: RunDir, parallel: Parallel) -> None:
    if message is not None and parallel.is_main:
        log.warning(message)
        run.event("warning", message=message)
