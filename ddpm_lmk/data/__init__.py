"""From packed shards to batches: `open_loader` is the one door. Importing it does not import torch, calling it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddpm_lmk.config import RunConfig
    from ddpm_lmk.data.loading.corpus import Corpus
    from ddpm_lmk.data.loading.loader import EvalLoader, Name, TrainLoader


@overload
def open_loader(
    cfg: RunConfig,
    *,
    stage: Literal["train"],
    rank: int = ...,
    world: int = ...,
    device: Any = ...,
    split: None = ...,
    cache: dict[Any, Any] | None = ...,
    backend: Name | None = ...,
    corpora: Sequence[Corpus] | None = ...,
    pseudo_labelled: Sequence[Corpus] = ...,
) -> TrainLoader: ...


@overload
def open_loader(
    cfg: RunConfig,
    *,
    stage: Literal["evaluate"],
    rank: int = ...,
    world: int = ...,
    device: Any = ...,
    split: str | None = ...,
    cache: dict[Any, Any] | None = ...,
    backend: Name | None = ...,
    corpora: Sequence[Corpus] | None = ...,
    skips_bad: bool = ...,
) -> EvalLoader: ...


def open_loader(
    cfg: RunConfig,
    *,
    stage: Literal["train", "evaluate"],
    rank: int = 0,
    world: int = 1,
    device: Any = "cpu",
    split: str | None = None,
    cache: dict[Any, Any] | None = None,
    backend: Name | None = None,
    corpora: Sequence[Corpus] | None = None,
    pseudo_labelled: Sequence[Corpus] = (),
    skips_bad: bool = False,
) -> TrainLoader | EvalLoader:
    """Open the data of a run for one process.

    Args:
        cfg: the run; `data`, `train`, `evaluate`, `task.kind` and `seed` are read.
        stage: "train" for the endless augmented stream, "evaluate" for one pass over a split.
        rank: this process, of `world`.
        world: number of processes.
        device: where batches are wanted (a torch device or its name).
        split: the split to evaluate; None: `evaluate.split`.
        cache: keeps decoded pixels for the next loader of the same data; the caller owns it.
        backend: what `backend.choose_backend` said, so that all loaders and ranks of a run have the same; None: ask it.
        corpora: what is trained on, or evaluated in place of a split, where it is open already.
        pseudo_labelled: what is trained on beside it (`data.propagate`).
        skips_bad: evaluate without the samples that cannot be read (`EvalLoader`).

    Raises:
        ConfigError: the run cannot be honoured (world size, shots, overlapping splits).
        DataError: the data is missing, empty or without labels.
        LaunchError: DALI is asked for and not installed.
        ResourceError: the pixels do not fit where `runtime.cache_pixels` wants them.
        StoppedError: the file system does not answer.
    """
    import torch

    from ddpm_lmk.data.loading.backend import choose_backend
    from ddpm_lmk.data.loading.loader import Seat, open_evaluation, open_training

    chosen = backend or choose_backend(cfg, device=device, world=world).name
    seat = Seat(rank, world, torch.device(device), chosen)
    if stage == "train":
        return open_training(cfg, seat, cache, corpora=corpora, pseudo_labelled=pseudo_labelled)
    return open_evaluation(cfg, seat, cache, split=split, corpora=corpora, skips_bad=skips_bad)
