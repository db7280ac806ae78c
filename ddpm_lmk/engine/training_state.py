"""All that changes while training: weights, their average, the optimizer, the rules that look at losses and scores.

`TrainState` goes into a checkpoint and comes back from one. Not here: the learning rate (a function of the step),
random state (there is none) and the loader's place (the step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lmk.config import EmaConfig, PlateauConfig, RunConfig, SpikeConfig
from ddpm_lmk.engine.optim import build_optimizer, load_moments
from ddpm_lmk.engine.parallel import is_running
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.rundir.checkpoint import Checkpoint, Tensors

COUNTERS = ("step", "images", "evaluated_at", "seconds")
RULES = ("plateau", "patience", "health", "scale")  # their keys in state.json

LARGEST_SHARE_OF_START = 0.1  # of the starting weights in an average, from which on a warning is due
FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24  # of the loss in fp16
GROWS_AFTER = 2000  # updates, as in torch.amp
MOST_IN_A_ROW = 5
RECENT_STEPS = 1000
MOST_OF_RECENT = 10  # 1 %
NOT_FINITE, SPIKE, OVERFLOW = "not finite", "spike", "fp16 overflow"


class Ema:
    """Exponential moving average of a model's parameters and running statistics (docs/method.md, section 2).

    Without settings it holds and does nothing. Parameters that do not learn are their own average to the bit, so none
    is kept: freeze before the average is made. Statistics are averaged with the weights that made them: those of the
    present weights would not fit the maps of averaged ones.
    """

    def __init__(self, cfg: EmaConfig | None, model: nn.Module) -> None:
        self.cfg = cfg
        self._model = model
        self._average = {name: value.detach().clone() for name, value in self._followed()} if cfg is not None else {}

    def __bool__(self) -> bool:
        return self.cfg is not None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after the update that ended `step` (1 is the first)."""
        if self.cfg is None:
            return
        # The warm-up of TensorFlow's ExponentialMovingAverage: 0.18, 0.25, 0.31, ...
        decay = min(self.cfg.decay, (1 + step) / (10 + step)) if self.cfg.warmup else self.cfg.decay
        # One call for all tensors: an average per parameter costs more in launches than in sums.
        torch._foreach_lerp_(list(self._average.values()), [value for _, value in self._followed()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the averaged weights inside, or as it is where there is no average.

        The storages change places and back: nothing is copied, and a compiled model stays compiled.
        """
        self._swap()
        try:
            yield self._model
        finally:
            self._swap()

    def weights(self) -> dict[str, Tensor]:
        """State of the model with the average in place of its parameters; empty where there is no average."""
        if self.cfg is None:
            return {}
        return {name: self._average.get(name, value) for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put saved weights back, in the memory layout of the parameters."""
        for name, place in self._average.items():
            if name not in weights or weights[name].shape != place.shape:
                raise CheckpointError(
                    f"the moving average of {name} is missing or of another shape; wanted {list(place.shape)}"
                )
            place.copy_(weights[name])

    def warning(self, total: int) -> str | None:
        """What is wrong with this decay in a run of `total` steps, if anything."""
        if self.cfg is None or self.cfg.warmup or self.cfg.decay**total <= LARGEST_SHARE_OF_START:
            return None
        share = self.cfg.decay**total
        return (
            f"train.ema.decay={self.cfg.decay} over {total} steps leaves {share:.0%} of the starting weights in the "
            "average; lower it, or set train.ema.warmup=true"
        )

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._followed():
            if name in self._average:
                value.data, self._average[name] = self._average[name], value.data

    def _followed(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)
        yield from ((name, buffer) for name, buffer in self._model.named_buffers() if is_running(name))


class _Rule:
    """A dataclass whose fields, but for its settings, go into a checkpoint."""

    SETTINGS: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: value for name, value in vars(self).items() if name not in self.SETTINGS}

    def load(self, facts: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        for name in self.facts():
            setattr(self, name, facts[name])


@dataclass
class Plateau(_Rule):
    """Lowers the learning rate when the score stands still; without settings it never does.

    The rule of ReduceLROnPlateau: relative threshold, lower is better, more than `patience` bad evaluations in a row.
    """

    SETTINGS = ("cfg",)

    cfg: PlateauConfig | None
    factor: float = 1.0
    best: float | None = None
    num_bad: int = 0

    def add_score(self, score: float) -> None:
        """Take note of an evaluation."""
        if self.cfg is None:
            return
        if math.isfinite(score) and (self.best is None or score < self.best * (1 - self.cfg.threshold)):
            self.best, self.num_bad = score, 0
            return
        # Strictly more than `patience`, as PyTorch has it.
        self.num_bad += 1
        if self.num_bad > self.cfg.patience:
            self.factor, self.num_bad = self.factor * self.cfg.factor, 0


@dataclass
class Patience(_Rule):
    """Stops a run whose score has not improved for `limit` evaluations; without a limit it only remembers the best."""

    SETTINGS = ("limit",)

    limit: int | None
    best: float | None = None
    best_step: int | None = None
    num_bad: int = 0

    def add_score(self, score: float, step: int) -> bool:
        """Take note of an evaluation; True if it is strictly the best so far."""
        if math.isfinite(score) and (self.best is None or score < self.best):
            self.best, self.best_step, self.num_bad = score, step, 0
            return True
        self.num_bad += 1
        return False

    @property
    def is_exhausted(self) -> bool:
        """Has the run stood still for too long?"""
        return self.limit is not None and self.num_bad >= self.limit


@dataclass
class LossScale(_Rule):
    """Keeps fp16 gradients above the smallest number fp16 has: the loss is multiplied by `value`, the gradient divided.

    After an overflow the scale is halved and the update left out; after `GROWS_AFTER` updates without one it is
    doubled. In any other precision it is 1 and stays so.
    """

    SETTINGS = ("is_on",)

    is_on: bool
    value: float = 1.0
    num_good: int = 0

    def __post_init__(self) -> None:
        self.value = FIRST_SCALE if self.is_on else 1.0

    def __bool__(self) -> bool:
        return self.is_on

    def add_step(self, *, has_overflow: bool) -> None:
        """Take note of a step."""
        if not self.is_on:
            return
        self.num_good = 0 if has_overflow else self.num_good + 1
        if has_overflow:
            self.value /= 2
        elif self.num_good == GROWS_AFTER:
            self.value, self.num_good = min(2 * self.value, LARGEST_SCALE), 0

    @property
    def is_lost(self) -> bool:
        """Below 1 the scale would make gradients smaller: it is not the scale that overflows."""
        return self.value < 1


@dataclass
class Divergence(_Rule):
    """Which updates are left out, and when the run has to go back to a checkpoint (docs/faults.md, C1 and C2).

    An update is left out where loss or gradient is not finite, or where one of them is a spike: above mean + sigma
    standard deviations of the last accepted steps. More than 5 in a row, or more than 1 % of the last 1000 steps not
    finite, and the loop goes back to the last checkpoint, once. All of it is a function of the numbers of past steps
    and goes into checkpoints, so a resumed run decides as one that was never stopped.

    Attributes:
        skipped, in_a_row: updates left out, in all and since the last one taken; overflows of fp16 count in the first.
        bad_steps: the recent steps that were not finite.
        losses, norms: of the last accepted steps, as many as the spike rule looks at.
        left_out: for every return to a checkpoint, its step and the step it happened at: [from, to].
    """

    SETTINGS = ("spikes",)

    spikes: SpikeConfig | None
    skipped: int = 0
    in_a_row: int = 0
    bad_steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)

    def judge(self, step: int, *, loss: float, norm: float, is_scaled: bool = False) -> str | None:
        """Take note of the numbers of `step` (1 is the first); the reason to leave its update out, or None.

        Args:
            is_scaled: the loss was scaled for fp16, where too large a scale is the first thing to think of.
        """
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        # Not counted as trouble: overflows are how the scale finds its size, every 2000 updates.
        if not is_finite and is_scaled:
            self.skipped += 1
            return OVERFLOW
        reason = NOT_FINITE if not is_finite else SPIKE if self._is_spike(step, loss, norm) else None
        if reason is None:
            self.in_a_row = 0
            if self.spikes is not None:  # only accepted steps: a spike must not raise the limit for the next one
                self.losses = [*self.losses, loss][-self.spikes.window :]
                self.norms = [*self.norms, norm][-self.spikes.window :]
            return None
        self.skipped += 1
        self.in_a_row += 1
        if reason == NOT_FINITE:
            # Steps and not a counter: a resumed run forgets the same ones at the same time.
            self.bad_steps = [bad for bad in self.bad_steps if bad > step - RECENT_STEPS] + [step]
        return reason

    @property
    def trouble(self) -> str | None:
        """Why the run cannot go on like this, if it cannot."""
        if self.in_a_row > MOST_IN_A_ROW:
            return f"loss or gradient was not finite or a spike in {self.in_a_row} steps in a row"
        if len(self.bad_steps) > MOST_OF_RECENT:
            return f"loss or gradient was not finite in {len(self.bad_steps)} of the last {RECENT_STEPS} steps"
        return None

    def roll_back(self, *, source: int, step: int) -> None:
        """Start anew at `step` with the memory of the checkpoint of step `source`; all updates between are left out."""
        self.left_out = [*self.left_out, [source, step]]
        self.skipped += step - source
        # A second trouble has to be one of the steps after this one.
        self.in_a_row, self.bad_steps = 0, []

    def _is_spike(self, step: int, loss: float, norm: float) -> bool:
        # Early losses fall fast and vary much: the rule would call them spikes.
        if self.spikes is None or step <= self.spikes.after or len(self.losses) < self.spikes.window:
            return False
        return loss > _limit(self.losses, self.spikes.sigma) or norm > _limit(self.norms, self.spikes.sigma)


def _limit(values: list[float], sigma: float) -> float:
    # fsum: exact, so a resumed run decides by the same limit to the last bit.
    mean = math.fsum(values) / len(values)
    return mean + sigma * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        step: optimizer updates asked for so far, skipped ones included.
        images: images seen so far, over all ranks.
        evaluated_at: the last step that was validated; 0 if none was.
        seconds: wall-clock time in the loop, over all sessions of the run.
        best: weights by file (`model`, `ema`) of the best evaluation, on the host; empty unless they are wanted.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    plateau: Plateau
    patience: Patience
    divergence: Divergence
    scale: LossScale
    keeps_best: bool
    step: int = 0
    images: int = 0
    evaluated_at: int = 0
    seconds: float = 0.0
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, cfg: RunConfig, model: nn.Module) -> TrainState:
        """Step 0 of a run whose `model` already holds its first weights, on its device."""
        optimizer = build_optimizer(cfg.optim, model)  # first, since it freezes what the average then leaves out
        return cls(
            model=model,
            ema=Ema(cfg.train.ema, model),
            optimizer=optimizer,
            plateau=Plateau(cfg.optim.plateau),
            patience=Patience(cfg.train.patience),
            divergence=Divergence(cfg.train.spikes),
            scale=LossScale(cfg.train.precision == "fp16"),
            keeps_best=cfg.train.select == "best",
        )

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Weights to use, by file: `model`, and `ema` where there is one."""
        files = {"model": self.model.state_dict(), "ema": self.ema.weights()}
        return {name: tensors for name, tensors in files.items() if tensors}

    def add_score(self, score: float) -> None:
        """Take note of the validation score at this step."""
        self.evaluated_at = self.step
        self.plateau.add_score(score)
        # On the host: a second network on the device could be what does not fit.
        if self.patience.add_score(score, self.step) and self.keeps_best:
            self.best = {
                file: {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
                for file, tensors in self.weights().items()
            }

    def judge(self, *, loss: float, norm: float) -> str | None:
        """Take note of the step that ends now; the reason to leave its update out, or None."""
        reason = self.divergence.judge(self.step, loss=loss, norm=norm, is_scaled=bool(self.scale))
        self.scale.add_step(has_overflow=reason == OVERFLOW)
        return reason

    def roll_back(self, checkpoint: Checkpoint, *, load_all: Callable[[nn.Module, dict[str, Tensor]], Any]) -> None:
        """Weights, average, moments and rules of a checkpoint, at the present step: what came between is left out."""
        # The stream of images goes on: the data that led to trouble is not seen again.
        step, images, seconds = self.step, self.images, self.seconds
        self.load(checkpoint, load_all=load_all)
        self.divergence.roll_back(source=self.step, step=step)
        self.step, self.images, self.seconds = step, images, seconds

    def select_best(self) -> bool:
        """Put the best weights into the model and its average; False where they are wanted and there are none."""
        if self.best:
            self.model.load_state_dict(self.best["model"])
            self.ema.load(self.best.get("ema", {}))
        return bool(self.best) or not self.keeps_best

    def tensors(self, moments: Mapping[str, Tensor]) -> Tensors:
        """The tensor files of a checkpoint; `moments` is the optimizer state by name (`Updater.moments`)."""
        files: dict[str, Mapping[str, Tensor]] = {**self.weights(), "optim": moments}
        if self.best:
            files["best"] = {f"{file}/{name}": v for file, group in self.best.items() for name, v in group.items()}
        return files

    @property
    def _rules(self) -> dict[str, _Rule]:
        return dict(zip(RULES, (self.plateau, self.patience, self.divergence, self.scale)))

    def facts(self) -> dict[str, Any]:
        """The counters of a checkpoint (`state.json`)."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**counters, **{name: rule.facts() for name, rule in self._rules.items()}}

    def load(self, checkpoint: Checkpoint, *, load_all: Callable[[nn.Module, dict[str, Tensor]], Any]) -> None:
        """Resume from a verified checkpoint.

        Args:
            load_all: how weights get into a model, with a readable refusal (`models.weights.load_all`).

        Raises:
            CheckpointError: it belongs to another model.
        """
        files, facts = checkpoint.tensors, checkpoint.state
        # An average made up from the present weights would pass for one of the whole run.
        if ("ema" in files) != bool(self.ema) or "model" not in files:
            raise CheckpointError(f"{checkpoint.path} holds {', '.join(files)}, which is not what this run file keeps")
        if lost := sorted({*COUNTERS, *RULES} - set(facts)):
            raise CheckpointError(
                f"{checkpoint.path} says nothing of {', '.join(lost)}: it is of another version of ddpm-lmk; "
                "continue it with that one, or start again in another --out directory"
            )
        load_all(self.model, files["model"])
        self.ema.load(files.get("ema", {}))
        load_moments(self.optimizer, self.model, files["optim"])
        self.best = {}
        for name, value in files.get("best", {}).items():
            file, _, key = name.partition("/")
            self.best.setdefault(file, {})[key] = value
        for name in COUNTERS:
            setattr(self, name, facts[name])
        for name, rule in self._rules.items():
            rule.load(facts[name])
