"""Checks of a run before its first step, the same for `pretrain`, `finetune`, sweeps, the demo and all dry runs.

Whatever can be known without training is checked here: the settings, the datasets with their splits and labels, what
scoring will need of the labels, the directory and what it holds, and the starting weights. Left to the run is what
takes long (hashes of weights and of pixels) or may change (who works in the directory, how much memory is free).
Imports torch only where there are starting weights to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddpm_lmk.config import EncoderUNetConfig, LandmarksConfig, RunConfig
from ddpm_lmk.data.loading.corpus import (
    Corpus,
    enlarged,
    evaluation_corpora,
    fingerprint,
    packs_of,
    spec_of,
    training_corpora,
    unlabelled_corpora,
)
from ddpm_lmk.data.loading.order import BatchPlan
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.requirements import check_cuda_graphs, check_exclusions, check_trackers, check_zero
from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.inference.scoring import check_scorable, check_temperatures
from ddpm_lmk.launcher.placement import Placement
from ddpm_lmk.rundir import lock, retention


def check_run(cfg: RunConfig, out: Path, placement: Placement, *, fork: Path | None = None) -> list[str]:
    """Raise what would end this run before its first step, or after its last; returns remarks. Writes nothing.

    Args:
        out: the run directory; with `fork` the new one.
        fork: the run it is continued from.

    Raises:
        LmkError: of the kind, with the words and the exit code that the run itself would have.
    """
    check_settings(cfg, placement)
    if lock.is_finished(out, cfg):
        return []  # its data and starting weights may be gone by now
    check_temperatures(cfg, out)
    corpora = check_data(cfg)
    if placement.node_rank == 0:  # the other nodes write in the same place
        check_folder(cfg, out, corpora, fork=fork)
    check_start(cfg, out, corpora, fork=fork)
    return remarks(cfg, corpora)


def check_settings(cfg: RunConfig, placement: Placement) -> None:
    """Raise where these settings cannot be kept on so many processes of this kind.

    Raises:
        ConfigError: they contradict one another. LaunchError: something is not installed, or not on this device.
    """
    world, train = placement.processes * placement.nodes, cfg.train
    BatchPlan.of(cfg, train.global_batch_size).check_world(world)  # how many images there are does not matter for this
    at_once = train.given_micro_batch or train.global_batch_size // world
    if isinstance(cfg.model, EncoderUNetConfig) and cfg.task.stage == "pretrain" and at_once < 2:
        raise ConfigError(
            f"task {cfg.task.kind} normalises over the images a process computes at once, and {world} processes have "
            f"{at_once} each; use fewer processes or a larger train.global_batch_size"
        )
    check_exclusions(cfg, world=world, zero=placement.zero)
    check_cuda_graphs(cfg, placement.device)
    check_zero(placement.zero, world)
    check_trackers(cfg)
    if cfg.runtime.loader == "dali":
        from ddpm_lmk.data.loading.backend import check_dali

        check_dali(cfg)


def check_data(cfg: RunConfig) -> list[Corpus]:
    """Open the data that this run learns from, validates on and is scored on; returns what it learns from.

    Raises:
        ConfigError, DataError: as opening and scoring would.
    """
    corpora = training_corpora(cfg)
    unlabelled_corpora(cfg)
    if cfg.data.validation_split is not None:
        evaluation_corpora(cfg, cfg.data.validation_split)
    if not isinstance(cfg.task, LandmarksConfig):
        return corpora
    spec = spec_of(cfg, _specs(corpora))
    if spec.num_landmarks == 1 and any(codec.kind == "disc" for codec in cfg.task.codecs):
        # Its softmax runs over landmarks at each pixel: with one of them it is 1 everywhere.
        raise ConfigError(
            f"task.codec.kind=disc tells landmarks apart at every pixel, but {spec.name} has only one, so nothing "
            "would be learnt; use task.codec.kind=spatial"
        )
    if cfg.evaluate.split is not None:
        for scored, learnt in zip(evaluation_corpora(cfg, cfg.evaluate.split), corpora, strict=True):
            check_scorable(scored, learnt)
    return corpora


def _specs(corpora: Sequence[Corpus]) -> list[DatasetSpec]:
    return [corpus.manifest.spec for corpus in corpora]


def check_folder(cfg: RunConfig, out: Path, corpora: Sequence[Corpus], *, fork: Path | None = None) -> None:
    """Raise where the run cannot write into `out`, or where `out` holds anything but this run on this data.

    Raises:
        ResourceError: it cannot be written. RunConflictError: it holds another run. DataError: this run on other data.
        CheckpointError: there is nothing to fork.
    """
    lock.check_writable(out)
    lock.check_contents(out, cfg, is_fork=fork is not None)
    check_same_data(cfg, out, corpora)
    if fork is not None and not has_begun(out) and not has_begun(fork):
        raise CheckpointError(
            f"no checkpoint in {fork / 'checkpoints'} to go on from (there is none); give the run with --out"
        )


def check_same_data(cfg: RunConfig, out: Path, corpora: Sequence[Corpus]) -> None:
    """Raise `DataError` where the run in `out` was started on other data."""
    if (out / "run.json").exists():  # else nothing to compare with: a sweep has many cells, a pool may be far away
        lock.check_same_data(out, fingerprint(corpora), packs_of(cfg, corpora))


def check_start(
    cfg: RunConfig, out: Path, corpora: Sequence[Corpus], *, fork: Path | None = None, stage: RunConfig | None = None
) -> None:
    """Raise `CheckpointError` where the starting weights are missing or do not fit.

    Args:
        stage: run file of the run that will have made them by then, and is not finished yet.
    """
    if cfg.init.weights is None or fork is not None or has_begun(out):
        return  # a run that has a checkpoint needs them no more
    from ddpm_lmk.engine.starting_weights import require_fitting, require_fitting_stage

    spec = spec_of(cfg, _specs(corpora))
    if stage is None:
        require_fitting(cfg, spec)
    else:
        require_fitting_stage(cfg, spec, stage, spec_of(stage, _specs(training_corpora(stage))))


def has_begun(out: Path) -> bool:
    """Has the run in this directory a checkpoint to resume from?"""
    return bool(retention.complete(out / "checkpoints"))


def remarks(cfg: RunConfig, corpora: Sequence[Corpus]) -> list[str]:
    """What is no fault, and worth a second look before the time is spent."""
    return [line for corpus in [*corpora, *unlabelled_corpora(cfg)] for line in enlarged(cfg, corpus)]
