"""A training loop as one writes it by hand, and a loader that makes the engine take turns with it.

`BareLoop` does the maths of a step and nothing else: draw timestep and noise, loss, backward, clip, AdamW, average. No
keyed randomness, no check of what is finite, no exchange, no metrics, no signals: what the engine adds to that is its
overhead. `TurnTaking` hands out groups that are in memory already and lets another step run before each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from _subject import Subject, spec_of
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.bench import Timings
from ddpm_lmk.data.batch import Batch, GlobalBatch
from ddpm_lmk.data.loading.bad_samples import Quarantine
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.engine.session import Session
from ddpm_lmk.tasks import DenoiseTask


class BareLoop:
    """The same network, from the same weights, with its own optimizer and average."""

    def __init__(self, subject: Subject) -> None:
        cfg = subject.cfg
        self._cfg, self._task, self._parallel = cfg, subject.task, subject.parallel
        self._model = Session().model(cfg, subject.task, subject.parallel.device).train()
        self._parameters: list[Tensor] = list(self._model.parameters())
        decay, optim = cfg.optim.weight_decay, cfg.optim
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=decay, fused=True
        )
        self._average = [parameter.detach().clone() for parameter in self._parameters] if cfg.train.ema else []

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        with self._parallel.autocast(self._cfg.train.precision):
            loss = self._loss(batch)
        loss.backward()
        clip = self._cfg.optim.clip
        if clip is not None and clip.kind == "norm":
            torch.nn.utils.clip_grad_norm_(self._parameters, clip.limit)
        elif clip is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, clip.limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average:
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 0.005)

    def _loss(self, batch: Batch) -> Tensor:
        task, x_0 = self._task, batch.images
        if not isinstance(task, DenoiseTask):
            return task.loss(self._model, batch).mean()
        t = torch.randint(task.cfg.t_min, task.t_max + 1, (len(x_0),), device=x_0.device)
        eps = torch.randn_like(x_0)
        output = self._model(task.schedule.q_sample(x_0, t, eps), t).float()
        target = task.schedule.regression_target(x_0, t, eps, task.cfg.target)
        return F.l1_loss(output, target) if task.cfg.loss == "l1" else F.mse_loss(output, target)


@dataclass
class Turns:
    """What two loops that take turns needed, step by step."""

    engine: Timings = field(default_factory=Timings)
    bare: Timings = field(default_factory=Timings)


class TurnTaking:
    """Stands in for a training loader; the engine's time runs from handing out a group to being asked for the next."""

    def __init__(self, subject: Subject, other: Callable[[Batch], None], *, warm_up: int) -> None:
        cfg = subject.cfg
        self.spec, self.fingerprint = spec_of(cfg), "benchmark"
        self.num_images = 4 * subject.batch_images
        self.plan = BatchPlan(
            self.num_images, cfg.train.global_batch_size, cfg.train.given_micro_batch, cfg.train.epoch_boundary
        )
        self.quarantine = Quarantine([], 0.0)
        self.turns = Turns(Timings(warm_up=warm_up), Timings(warm_up=warm_up))
        self._batches: Sequence[Batch] = [subject.random_batch(seed=seed) for seed in range(4)]
        self._micro_batches = cfg.train.global_batch_size // subject.batch_images
        self._other, self._device, self._warm_up = other, subject.device, warm_up

    def global_batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Groups without end, each after a step of the other loop on the same images."""
        step = start_step
        while True:
            batch = self._batches[step % len(self._batches)]
            kept = step - start_step >= self._warm_up
            begin = self._now()
            for _ in range(self._micro_batches):
                self._other(batch)
            _note(self.turns.bare, begin, self._now(), is_kept=kept)
            begin = self._now()
            yield GlobalBatch(self.plan.size(step), [batch] * self._micro_batches, 0.0)
            _note(self.turns.engine, begin, self._now(), is_kept=kept)
            step += 1

    def close(self) -> None:
        """Nothing runs in the background."""

    def _now(self) -> tuple[float, float]:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def _note(timings: Timings, begin: tuple[float, float], end: tuple[float, float], *, is_kept: bool) -> None:
    if is_kept:
        timings.wall_s.append(end[0] - begin[0])
        timings.cpu_s.append(end[1] - begin[1])
