"""How long a run takes on this machine, from seconds of its steps (`timing`) and what it has left to do.

Not counted: compilation, waiting for data, writing to disk. Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_lmk.config import LandmarksConfig, RunConfig
from ddpm_lmk.data.loading.order import GroupPlan
from ddpm_lmk.data.shards.manifest import open_datasets
from ddpm_lmk.rundir import retention
from ddpm_lmk.system.console import about, duration

LONG_S = 4 * 3600.0  # from here on a command says which run file fits the machine


@dataclass(frozen=True)
class Work:
    """What a run has left to do, over all its processes.

    Attributes:
        group: images of an optimizer step.
        evaluations: validations on the way and after the last step.
        validated, scored, drawn: images of one of these, of the score at the end, and samples.
    """

    steps: int
    group: int
    evaluations: int = 0
    validated: int = 0
    scored: int = 0
    drawn: int = 0

    @classmethod
    def of(
        cls, cfg: RunConfig, *, done: int = 0, steps: int | None = None, counts: Mapping[str, int] | None = None
    ) -> Work:
        """Of a run that has `done` so many steps.

        Args:
            steps: all of the run, where more is known of them than its run file and packs say.
            counts: images by split of data that is not packed yet; raises what opening its packs raises without.
        """
        manifests = [] if counts is not None else open_datasets(cfg.data)
        of_each = [len(manifest.rows(cfg.data.splits)) for manifest in manifests]
        images = sum(learnt(cfg, count) for count in of_each or [(counts or {}).get("train", 0)])
        train, is_pretraining = cfg.train, cfg.task.stage == "pretrain"
        plan = GroupPlan.of(cfg, max(1, images))

        def in_steps(length: Any) -> int:
            return length.steps(train.group_size, max(1, images), plan.steps_per_epoch)

        def count(split: str | None) -> int:
            if split is None:
                return 0
            return (counts or {}).get(split, 0) + sum(len(manifest.rows([split])) for manifest in manifests)

        total = in_steps(train.length) if steps is None else steps
        every = total if train.evaluate_every is None else max(1, in_steps(train.evaluate_every))
        evaluations = -(-total // every) - done // every if cfg.data.validation_split and total > done else 0
        times = 1 if done else 1 + folds(cfg, images)  # a run per fold, before the first step
        return cls(
            steps=times * max(0, total - done),
            group=plan.largest,
            evaluations=evaluations,
            validated=count(cfg.data.validation_split),
            scored=0 if is_pretraining else count(cfg.evaluate.split),
            drawn=cfg.evaluate.samples if cfg.task.kind == "denoise" else 0,
        )


def learnt(cfg: RunConfig, count: int) -> int:
    """Images of a set of `count` that are trained on."""
    shots, hold_out = min(cfg.data.shots or count, count), cfg.data.hold_out
    return shots if hold_out is None else shots - len(range(hold_out.fold, shots, hold_out.of))


def folds(cfg: RunConfig, shots: int) -> int:
    """Runs that only fit temperatures (see `tempering`)."""
    codec = cfg.task.codec if isinstance(cfg.task, LandmarksConfig) else None
    if codec is None or codec.kind != "contour" or codec.temperatures != "fitted" or cfg.data.validation_split:
        return 0
    count = min(codec.folds, shots)
    return count if count > 1 else 0


def steps_done(run: Path) -> int:
    """Steps of the newest checkpoint of a run directory: where it would go on."""
    found = retention.complete(run / "checkpoints")
    return int(found[0].name.removeprefix("step-")) if found else 0


@dataclass(frozen=True)
class Timing:
    """Seconds of one process, while the others do the same.

    Attributes:
        image_s: forward and backward pass of a training image.
        update_s: reducing the gradient and moving the weights, once a step.
        validate_s, score_s, draw_s: an image of each.
        images: training images of a step that were timed, of `of` that a process has.
        steps: how many such steps were timed.
        processes: that shared the work of a step.
        start_s: of a process, until it could begin.
    """

    image_s: float
    update_s: float
    images: int
    of: int
    steps: int
    validate_s: float = 0.0
    score_s: float = 0.0
    draw_s: float = 0.0
    processes: int = 1
    start_s: float = 0.0

    def forecast(self, work: Work) -> Forecast:
        """Seconds of `work`."""

        def each(count: int) -> int:
            return -(-count // self.processes)

        return Forecast(
            steps=work.steps,
            step_s=each(work.group) * self.image_s + self.update_s,
            evaluations=work.evaluations,
            evaluation_s=each(work.validated) * self.validate_s,
            conclude_s=each(work.scored) * self.score_s + each(work.drawn) * self.draw_s,
            source=self.source,
            conclusion="drawing samples" if work.drawn else "scoring",
        )

    @property
    def source(self) -> str:
        """Where the seconds are from."""
        if self.images < self.of:
            return f"from {self.images} of the {self.of} images of a step, timed here"
        return f"from {self.steps} step{'s' if self.steps > 1 else ''} timed here"


@dataclass(frozen=True)
class Forecast:
    """How long a run takes, or what is left of it.

    Attributes:
        steps, step_s: optimizer steps, and seconds of one.
        evaluations, evaluation_s: validations, and seconds of one.
        conclude_s, conclusion: what follows the last step, the score or drawing samples.
        source: where the seconds are from.
    """

    steps: int
    step_s: float
    evaluations: int
    evaluation_s: float
    conclude_s: float
    source: str
    conclusion: str = "scoring"

    @property
    def train_s(self) -> float:
        """Up to the last step, validation included."""
        return self.steps * self.step_s + self.evaluations * self.evaluation_s

    @property
    def total_s(self) -> float:
        """To the end."""
        return self.train_s + self.conclude_s

    def __str__(self) -> str:
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'} of {_per_step(self.step_s)}"
        then = f", then {duration(self.conclude_s)} of {self.conclusion}" if self.conclude_s >= 1 else ""
        return f"{about(self.total_s)} here: {steps}{then} ({self.source})"


def _per_step(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"
