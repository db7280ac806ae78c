"""Scores of a run that has learnt several labelled packs at once: each by itself, in its own unit.

RUN/parts/DATASET holds what a run on that dataset alone would have written (`results.json`, `predictions.csv`), and the
run's own `results.json` holds them all as `parts`. There is no score over all of them: millimetres and pixels do not
add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.shards.verify import Manifest
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.inference.evaluate import evaluate_split
from ddpm_lmk.tasks import LandmarkTask

FOLDER = "parts"


def evaluate_parts(
    cfg: RunConfig,
    task: LandmarkTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    split: str,
    out: Path,
    train: Mapping[str, Any],
    cache: dict[str, Any] | None = None,
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score every dataset of a mixture on its `split`; call on every rank. Raises as `inference.evaluate_split`.

    Returns:
        The content of the run's `results.json`, on every rank.
    """
    blocks = []
    names: list[str] = []
    for path in cfg.data.path:
        manifest = Manifest.open(path)
        name = manifest.dataset if manifest.dataset not in names else f"{manifest.dataset}-{len(names)}"
        names.append(name)
        block = evaluate_split(
            only(cfg, path),
            task.part(manifest.spec),
            model,
            parallel,
            split=split,
            out=out / FOLDER / name,
            train=train,
            cache=cache,
            show=show,
        )
        blocks.append({**block, "dataset": name, "folder": f"{FOLDER}/{name}"})
    return {
        "kind": "mixture",
        "name": cfg.name,
        "seed": cfg.seed,
        "start": cfg.init.model_dump(mode="json"),
        "train": dict(train),
        "parts": blocks,
    }


def only(cfg: RunConfig, path: str) -> RunConfig:
    """The run with one of its packed sets."""
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": (path,), "weights": None})})
