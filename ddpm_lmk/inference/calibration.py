"""Temperatures that make the probabilities of a contour-hugging model honest.

One temperature per landmark, the one under which images the model has not learnt from are most likely: those of
`data.validation_split`, or, where no validation labels are used, each fold of the shots under a model that learnt from
the others (paper.md, section 5, for what [20] does). RUN/calibration.json keeps them; `loaded` puts them back. Whether
they help is `reliability`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lmk.config import HoldOutConfig, LandmarksConfig, RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.loading.corpus import HELD_OUT, training_corpora
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.system import files
from ddpm_lmk.system.durable import read_json
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.tasks import LandmarkTask
from ddpm_lmk.tasks.codecs import ContourCodec
from ddpm_lmk.tasks.landmarks import frame_of

FILE_NAME = "calibration.json"
SUMMARY = ("learnt_on", "labels", "surprise_before", "surprise_after")
# The likelihood is smooth in log T: between two of these a parabola is right to half a per cent (see the tests).
GRID = np.geomspace(0.1, 10.0, 41)


@dataclass
class Likelihoods:
    """-log p of the landmarks' pixels, summed over images, at every temperature of `GRID`."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros((0, len(GRID))))  # [N, G]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [N] labels

    def __add__(self, other: Likelihoods) -> Likelihoods:
        if not len(self.counts):
            return other
        return Likelihoods(self.sums + other.sums, self.counts + other.counts)

    def temperatures(self) -> np.ndarray:
        """The most likely temperature of each landmark `[N]`, within the grid; 1 where there is no label."""
        best = self.sums.argmin(1)
        inner = best.clip(1, len(GRID) - 2)
        rows = np.arange(len(best))
        before, here, after = (self.sums[rows, inner + step] for step in (-1, 0, 1))
        curvature = before - 2 * here + after
        shift = 0.5 * (before - after) / np.where(curvature > 0, curvature, np.inf)
        found = GRID[inner] * (GRID[1] / GRID[0]) ** shift.clip(-1, 1)
        found = np.where(best == inner, found, GRID[best])
        return np.where(self.counts > 0, found, 1.0)


@torch.inference_mode()
def likelihoods(
    cfg: RunConfig,
    task: LandmarkTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    split: str,
    cache: dict[str, Any] | None = None,
) -> Likelihoods:
    """Over every labelled image of `split`, once, added in the order of ranks; call on every rank."""
    assert isinstance(task.codec, ContourCodec)
    place: dict[str, Any] = {"rank": parallel.rank, "world": parallel.world, "device": str(parallel.device)}
    loader = open_loader(cfg, stage="evaluate", split=split, cache=cache, **place)
    was_training = model.training
    model.eval()
    found = Likelihoods()
    try:
        for batch in loader:
            beat("score")
            batch = batch.to(parallel.device)
            assert batch.points is not None, "landmark batches carry points"
            with parallel.autocast(cfg.train.precision):
                maps = task.maps(model, batch)
            sums, counts = _of_batch(task.codec, maps, batch.points, batch.weight, frame_of(batch))
            found += Likelihoods(sums.double().cpu().numpy(), counts.double().cpu().numpy())
    finally:
        model.train(was_training)
        loader.close()
    total = Likelihoods()
    for part in parallel.gather([found]):
        total += part[0]
    return total


def _of_batch(codec: ContourCodec, maps: Tensor, points: Tensor, weight: Tensor, frame: Any) -> tuple[Tensor, Tensor]:
    counted = codec.counts(points, frame) * weight[:, None]  # [B, N]
    columns = [codec.surprise(maps.float() / t, points, frame) for t in GRID.tolist()]
    return (torch.stack(columns, -1) * counted[..., None]).sum(0), counted.sum(0)


def by_folds(
    cfg: RunConfig,
    task: LandmarkTask,
    parallel: Parallel,
    *,
    learn: Callable[[RunConfig, Path], nn.Module],
    folder: Path,
    cache: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Temperatures from the shots alone: each fold under the weights that the run file learns from the others.

    Args:
        learn: carries out a run in a folder and gives the network with the weights it has kept.
        folder: where the runs of the folds go, as 0, 1, ...; finished ones are not repeated.
    """
    assert isinstance(task.codec, ContourCodec)
    shots = len(training_corpora(cfg)[0].rows)
    folds = min(task.codec.cfg.folds, shots)
    if folds < 2:
        told = "nothing: a single shot cannot be left out of its own training, so every temperature is 1"
        return record(
            Likelihoods(np.zeros((task.out_channels, len(GRID))), np.zeros(task.out_channels)), task, learnt_on=told
        )
    found = Likelihoods()
    for fold in range(folds):
        part = without(cfg, fold=fold, of=folds)
        model = learn(part, folder / str(fold))
        found += likelihoods(part, task, model, parallel, split=HELD_OUT, cache=cache)
    told = f"{folds} folds of the {shots} shots, each under weights learnt from the others"
    return record(found, task, learnt_on=told)


def without(cfg: RunConfig, *, fold: int, of: int) -> RunConfig:
    """The run that learns from all shots but those of one fold, and is not scored."""
    data = cfg.data.model_copy(update={"hold_out": HoldOutConfig(fold=fold, of=of)})
    assert isinstance(cfg.task, LandmarksConfig)
    task = cfg.task.model_copy(update={"codec": cfg.task.codec.model_copy(update={"temperatures": "none"})})
    evaluate = cfg.evaluate.model_copy(update={"split": None})
    changes = {"name": f"{cfg.name}-fold{fold}"[:80], "data": data, "task": task, "evaluate": evaluate}
    return cfg.model_copy(update=changes)


def record(found: Likelihoods, task: LandmarkTask, *, learnt_on: str) -> dict[str, Any]:
    """The content of calibration.json; `learnt_on` says in words which images the temperatures are from."""
    temperatures = found.temperatures()
    one = int(np.abs(np.log(GRID)).argmin())
    grid = np.log(GRID)
    after = [float(np.interp(np.log(t), grid, sums)) for t, sums in zip(temperatures, found.sums)]
    labels = max(float(found.counts.sum()), 1.0)
    return {
        "temperatures": [round(float(t), 6) for t in temperatures],
        "landmarks": list(task.spec.landmark_names),
        "learnt_on": learnt_on,
        "labels": int(found.counts.sum()),
        "surprise_before": float(found.sums[:, one].sum()) / labels,
        "surprise_after": sum(after) / labels,
    }


def keep(facts: Mapping[str, Any], task: LandmarkTask, folder: Path, parallel: Parallel) -> None:
    """Use temperatures from here on, and write them into a run directory."""
    parallel.on_main(lambda: files.write_json(folder / FILE_NAME, dict(facts)))
    put(facts, task)


def put(facts: Mapping[str, Any] | None, task: Any) -> None:
    """Give a task the temperatures of its run, if it has some; raises CheckpointError where they fit no landmarks."""
    if facts is None or not isinstance(task, LandmarkTask) or not isinstance(task.codec, ContourCodec):
        return
    values = facts.get("temperatures")
    if (
        not isinstance(values, list)
        or len(values) != task.spec.num_landmarks
        or not all(isinstance(value, float) and 0.0 < value < 1e3 for value in values)
    ):
        raise CheckpointError(
            f"{FILE_NAME} does not hold {task.spec.num_landmarks} temperatures; calibrate again with the same run, or "
            "remove the file to do without"
        )
    task.codec.temperatures = torch.tensor(values, dtype=torch.float32)


def read(folder: Path) -> dict[str, Any] | None:
    """What `keep` wrote into a run directory; None where there is nothing."""
    return read_json(folder / FILE_NAME)


def summary(folder: Path) -> dict[str, Any] | None:
    """What results.json says of the temperatures of a run directory."""
    facts = read(folder)
    return None if facts is None else {key: facts.get(key) for key in SUMMARY}
