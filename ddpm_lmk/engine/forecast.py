"""How long a run takes on this machine: seconds of its steps, timed here and now, times what it has left to do.

Timed is what the run does, on random images: its network, task, optimizer and average, in its precision, with its
threads and its number of processes side by side. So are validation, the score at the end and drawing samples, an image
each. A step too long for the few seconds this may take is timed on some of its images.

Not counted: compilation, waiting for data, writing to disk. Importing this does not import torch.
`launcher.time_runs` does the timing in processes of their own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading.corpus import HELD_OUT
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.data.shards.manifest import Manifest, open_datasets
from ddpm_lmk.data.shards.remote import CacheSettings
from ddpm_lmk.rundir import retention
from ddpm_lmk.rundir.lock import PSEUDO_LABELS, TEACHER, is_finished
from ddpm_lmk.system.console import about, duration
from ddpm_lmk.system.heartbeat import beat

if TYPE_CHECKING:
    from ddpm_lmk.data.batch import Batch
    from ddpm_lmk.engine.parallel import Parallel, Precision
    from ddpm_lmk.engine.session import Session
    from ddpm_lmk.tasks import Task

LONG_S = 4 * 3600.0  # from here on a command says which run file fits the machine
BUDGET_S = 4.0  # for the steps of one run, about, and again for its scoring
STEPS = 3
FORWARD_SHARE = 1 / 3  # of a training pass, where even one image takes longer than the budget


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
        manifests = [] if counts is not None else open_datasets(cfg)
        of_each = [len(manifest.rows(cfg.data.splits)) for manifest in manifests]
        images = sum(images_trained_on(cfg, count) for count in of_each or [(counts or {}).get("train", 0)])
        train, is_pretraining = cfg.train, cfg.task.stage == "pretrain"
        plan = BatchPlan.of(cfg, max(1, images))

        def in_steps(length: Any) -> int:
            return length.steps(train.global_batch_size, max(1, images), plan.steps_per_epoch)

        def count(split: str | None) -> int:
            if split is None:
                return 0
            if split == HELD_OUT and cfg.data.hold_out is not None:
                return sum(min(cfg.data.shots or each, each) for each in of_each) - images
            return (counts or {}).get(split, 0) + sum(len(manifest.rows([split])) for manifest in manifests)

        total = in_steps(train.duration) if steps is None else steps
        every = total if train.evaluate_every is None else max(1, in_steps(train.evaluate_every))
        evaluations = -(-total // every) - done // every if cfg.data.validation_split and total > done else 0
        return cls(
            steps=max(0, total - done),
            group=plan.largest,
            evaluations=evaluations,
            validated=count(cfg.data.validation_split),
            scored=0 if is_pretraining else count(cfg.evaluate.split),
            drawn=cfg.evaluate.samples if cfg.task.kind == "denoise" else 0,
        )

    @classmethod
    def left(cls, cfg: RunConfig, out: Path, *, steps: int | None = None) -> Work:
        """Of a run in `out`, with the teachers it waits for and what they find; `steps` as in `of`."""
        work, teacher = cls.of(cfg, steps=steps, done=steps_done(out)), cfg.teacher
        if teacher is None or (out / PSEUDO_LABELS).is_file():
            return work
        work = replace(work, scored=work.scored + images_without_labels(cfg))
        if is_finished(out / TEACHER, teacher):
            return work
        before = cls.left(teacher, out / TEACHER, steps=steps)
        return replace(
            work,
            steps=work.steps + before.steps,
            evaluations=work.evaluations + before.evaluations,
            scored=work.scored + before.scored,
        )


def images_trained_on(cfg: RunConfig, count: int) -> int:
    """Images of a set of `count` that are trained on."""
    shots, hold_out = min(cfg.data.shots or count, count), cfg.data.hold_out
    return shots if hold_out is None else shots - len(range(hold_out.fold, shots, hold_out.of))


def images_without_labels(cfg: RunConfig) -> int:
    """Images of `data.propagate`, but for those left out because they are found twice."""
    if cfg.data.propagate is None:
        return 0
    splits, labelled = cfg.data.propagate.splits, {manifest.fingerprint for manifest in open_datasets(cfg)}
    count = 0
    for manifest in (Manifest.open(path, CacheSettings.of(cfg)) for path in cfg.data.unlabelled_path):
        rows = len(manifest.rows([split for split in splits if split in manifest.splits]))
        count += max(0, rows - min(cfg.data.shots or rows, rows)) if manifest.fingerprint in labelled else rows
    return count


def steps_done(run: Path) -> int:
    """Steps of the newest checkpoint of a run directory: where it would resume."""
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


def time_steps(
    cfg: RunConfig,
    task: Task,
    parallel: Parallel,
    *,
    precision: Precision,
    session: Session,
    is_scored: bool = False,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time steps of this run; call it on every rank, before the run takes its network from the same session.

    Args:
        cfg: with numbers in place of `auto`, precision aside.
        precision: that of training.
        is_scored: time a prediction, though this run has none to make; the one that learns from it has.

    Raises:
        ResourceError: no memory for a step.
    """
    from ddpm_lmk.engine.device_fit import explained_out_of_memory
    from ddpm_lmk.engine.loop import build_updater
    from ddpm_lmk.engine.rank_checks import kernels
    from ddpm_lmk.engine.training_state import TrainState
    from ddpm_lmk.system import accelerator

    device = parallel.device

    def now() -> float:
        beat("setup")
        accelerator.synchronize(device)
        return clock()

    # Timing must leave no trace in the run that follows: neither in random state nor in its weights.
    with accelerator.fork_rng(device), kernels(cfg.train.exactness, device):
        model = session.model(cfg, task, device)
        state = TrainState.fresh(cfg, model)
        share = -(-cfg.train.global_batch_size // parallel.world)
        micro = min(cfg.train.given_micro_batch or share, share)
        is_compiled = cfg.train.compile is True  # for one size of a batch at a time: only those of the run are timed
        parts: list[tuple[float, float]] = []  # passes and update of every step

        def step(images: int) -> float:
            count = max(1, images // micro)
            batch = random_batch(cfg, task, images // count).to(device)
            began = now()
            for number in range(count):
                with updater.micro_batch(number, of=count):
                    with parallel.autocast(cfg.train.precision):
                        losses = task.loss(updater.net, batch)
                    updater.add(losses.float().sum(), images)
            between = now()
            updater.finish(0.0)
            updater.apply(cfg.optim.clip)
            state.ema.update(1)
            task.after_step(model, 1)
            updater.clear()
            parts.append((between - began, now() - between))
            # All ranks must call the same sizes, so they go by one clock.
            return max(parallel.gather(sum(parts[-1])))

        # Batch statistics need two images.
        least = min(2 if cfg.model.couples_images else 1, micro)
        model.train()
        with (
            explained_out_of_memory(cfg, task, state, parallel),
            parallel.training_in(precision),
            closing(build_updater(cfg, state, parallel)) as updater,
        ):
            sizes = {micro, share} if is_compiled else {least, max(least, micro // 4), micro, share}
            images, taken = repeated(step, sorted(sizes), budget_s, is_compiled=is_compiled)
        image_s, update_s = (statistics.median(column) for column in zip(*parts[-len(taken) :], strict=True))
        seconds = {"image_s": image_s / images, "update_s": update_s}
        model.eval()
        for name, use, passes in _uses(cfg, task, model, parallel, precision, is_scored=is_scored):
            forward_s = seconds["image_s"] * FORWARD_SHARE
            seconds[name] = passes * forward_s
            if (forward_s if name == "draw_s" else seconds[name]) < budget_s / STEPS:

                def once(images: int, use: Callable[[int], None] = use) -> float:
                    began = now()
                    use(images)
                    return max(parallel.gather(now() - began))

                batch = cfg.evaluate.batch
                most, taken_s = repeated(
                    once,
                    [batch] if is_compiled else sorted({1, min(4, batch), batch}),
                    budget_s / 2,
                    is_compiled=is_compiled,
                )
                seconds[name] = statistics.median(taken_s) / most * (passes if name == "draw_s" else 1)
        parallel.release()
    # The slowest rank is the pace of all.
    seconds = {name: max(parallel.gather(value)) for name, value in seconds.items()}
    return Timing(**seconds, images=images, of=share, steps=len(taken), processes=parallel.world)


def repeated(
    call: Callable[[int], float], sizes: Sequence[int], budget_s: float, *, is_compiled: bool = False
) -> tuple[int, list[float]]:
    """The largest of `sizes` there is time for, and the seconds of up to three calls of it.

    A first call at a size chooses kernels and asks for memory, and counts only where it leaves no time for a second;
    where it compiles the network (`is_compiled`), never.
    """
    size, taken, spent = sizes[0], [0.0], 0.0
    for candidate in sizes:
        if taken[0] / size * candidate > budget_s:  # at most: more images at once take less each
            break
        size, taken = candidate, [call(candidate)]
        if taken[0] > 2 * budget_s and not is_compiled:
            break
        taken = [call(candidate)]
        spent += taken[0]
    while len(taken) < STEPS and spent + taken[0] < budget_s:
        taken.append(call(size))
        spent += taken[-1]
    return size, taken


def _uses(
    cfg: RunConfig, task: Task, model: Any, parallel: Parallel, precision: Precision, *, is_scored: bool
) -> Iterator[tuple[str, Callable[[int], None], float]]:
    """What the network is used for beside training, for so many images, and its passes of each in those of a step.

    A sample is drawn in so many passes; one of them is done here.
    """
    import torch

    from ddpm_lmk.inference.sample import NUM_STEPS
    from ddpm_lmk.tasks import DenoiseTask, LandmarkTask
    from ddpm_lmk.tasks.noise_schedule import ddim_sample

    def validate(images: int) -> None:
        batch = random_batch(cfg, task, images).to(parallel.device)
        with torch.no_grad(), parallel.training_in(precision), parallel.autocast(cfg.train.precision):
            task.evaluate(model, batch)

    if cfg.data.validation_split is not None:
        yield "validate_s", validate, 1
    is_scored |= cfg.evaluate.split is not None or cfg.data.propagate is not None
    if isinstance(task, LandmarkTask) and is_scored:
        predict = task.predict

        def score(images: int) -> None:
            batch = random_batch(cfg, task, images).to(parallel.device)
            with torch.inference_mode(), parallel.autocast(cfg.train.precision):
                predict(model, batch)

        yield "score_s", score, task.prediction_passes
    if isinstance(task, DenoiseTask) and cfg.evaluate.samples:
        denoise = task

        def draw(images: int) -> None:  # not by `sample`, whose heartbeats would tell the pace of smaller batches
            noise, schedule = random_batch(cfg, task, images).to(parallel.device).images, denoise.schedule
            with torch.no_grad(), parallel.autocast(cfg.train.precision):
                for _ in ddim_sample(model, schedule, noise, num_steps=1, target=denoise.cfg.target):
                    pass

        yield "draw_s", draw, min(NUM_STEPS, task.schedule.num_timesteps - 1)


def random_batch(cfg: RunConfig, task: Task, count: int, *, seed: int = 0) -> Batch:
    """Random pixels, and random points where the task needs some; in host memory."""
    import torch

    from ddpm_lmk.data.batch import Batch
    from ddpm_lmk.data.loading.augment import resize_matrix

    size, landmarks = cfg.data.image_size, task.out_channels if cfg.task.stage == "finetune" else 0
    generator = torch.Generator().manual_seed(seed)
    finer: dict[str, Any] = {}
    if (fine_size := cfg.data.fine_size) is not None:
        shape = (count, 1, fine_size, fine_size)
        finer["fine"] = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        finer["to_fine"] = torch.from_numpy(resize_matrix(size, fine_size)).float().repeat(count, 1, 1)
    return Batch(
        images=torch.rand(count, 1, size, size, generator=generator).contiguous(memory_format=torch.channels_last),
        points=torch.rand(count, landmarks, 2, generator=generator) * (size - 1) if landmarks else None,
        to_native=torch.eye(2, 3).repeat(count, 1, 1),
        native_size=torch.full((count, 2), float(size)),
        mm_per_px=torch.full((count,), torch.nan),
        positions=torch.arange(seed * count, (seed + 1) * count),
        weight=torch.ones(count),
        ids=tuple(map(str, range(count))),
        domain=torch.zeros(count, dtype=torch.long) if len(task.domains) > 1 else None,
        **finer,
    )
