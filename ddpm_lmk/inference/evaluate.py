"""Scores a landmark model on a split: predictions in native pixels, both protocols, the mean shape beside them.

`evaluate_split` and `evaluate_parts` serve the end of a run, `evaluate_run` a finished run on any packed set. All write
`predictions.csv` (one row per image and landmark; all a report needs) and `results.json`, whole or not at all.

A run that has learnt several labelled datasets at once is scored on each by itself, in its own unit: RUN/parts/DATASET
holds what a run on that dataset alone would have written, and the run's `results.json` holds them all as `parts`. There
is no score over all of them: millimetres and pixels do not add.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.loading.bad_samples import BadSample
from ddpm_lmk.data.loading.corpus import Corpus, enlarged, evaluation_corpora, training_corpora, unlabelled_corpora
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference import calibration, radius, scoring
from ddpm_lmk.inference.calibration import write_reliability
from ddpm_lmk.inference.load import LoadedRun, open_run, pixel_settings
from ddpm_lmk.inference.predictions import ImagePrediction, peak_error, predictions_csv, to_native
from ddpm_lmk.inference.scoring import read_labels, score_points, training_shape
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.system import files
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.tasks import LandmarkTask
from ddpm_lmk.tasks.codecs import ContourCodec

log = logging.getLogger(__name__)


def evaluate_split(
    cfg: RunConfig,
    task: LandmarkTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    split: str,
    out: Path,
    cache: dict[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    pool: Mapping[str, Any] | None = None,
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Predict every labelled image of `split` once, over all ranks, and score it; call on every rank.

    Args:
        out: folder that gets `predictions.csv` and `results.json` (written by rank 0).
        cache: pixels kept resident between the runs of a sweep, as `open_loader` takes it.
        train: what training took (steps, images, wall_s), copied into the results.
        pool: images without labels that it learnt from, copied likewise.
        show: called with how many of this rank's images are done, and of how many.

    Returns:
        The content of `results.json`, on every rank.

    Raises:
        DataError: an image was predicted twice or not at all, a prediction is not finite, or a spacing is missing.
    """
    predictions = predict_split(cfg, task, model, parallel, split=split, cache=cache, show=show)

    def score() -> dict[str, Any]:
        corpus = evaluation_corpora(cfg, split)[0]
        shots = training_corpora(cfg)[0]
        facts = {
            "name": cfg.name,
            "dataset": corpus.manifest.dataset,
            "spec": task.spec.name,
            "split": split,
            "seed": cfg.seed,
            "draw": cfg.data.draw,
            "shots": cfg.data.shots,
            "start": cfg.init.model_dump(mode="json"),
            "labels": {"training": len(shots.rows), "validation": _count_validation(cfg)},
            "train": None if train is None else dict(train),
            "pixels": pixel_settings(corpus.manifest),
            "leakage": report.of_score(cfg.init.weights, corpus, shots, _unlabelled_images(cfg)),
            "calibration": calibration.summary(out),
        }
        facts |= {} if pool is None else {"pool": dict(pool)}
        learnt = None if train is None else radius.read(out, task.spec, steps=train["steps"])
        return _score_and_write(task, predictions, corpus, training_shape(shots), out, facts, learnt)

    return parallel.on_main(score)


def evaluate_run(
    run: str | Path,
    *,
    data: str | Path,
    split: str,
    out: Path,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, Any]:
    """Score a finished landmark run on a split of a packed set with the same landmarks; writes and returns the results.

    Raises:
        DataError: the set has other landmarks, or the run cannot say what it learnt from.
    """
    check_writable(Path(out))  # before minutes of scoring
    loaded = open_run(run, kind="landmarks", device=device)
    # `packed` says how the training data had to be made; a foreign set may be made otherwise
    settings = loaded.cfg.data.model_copy(update={"path": (str(data),), "require_dataset": {}})
    cfg = loaded.cfg.model_copy(update={"data": settings})
    corpus = evaluation_corpora(cfg, split)[0]
    for line in enlarged(cfg, corpus):
        log.warning("%s", line)
    loaded = loaded.for_landmarks_of(corpus.manifest.spec)
    assert isinstance(loaded.task, LandmarkTask)
    predictions = predict_split(cfg, loaded.task, loaded.model, loaded.parallel, split=split)
    shots = _training_images(loaded)
    copied = ("name", "seed", "draw", "shots", "start", "labels", "train", "pixels", "calibration")
    facts = {key: loaded.results.get(key) for key in copied}
    facts |= {"dataset": corpus.manifest.dataset, "spec": corpus.manifest.spec.name, "split": split}
    facts |= {"pool": loaded.results["pool"]} if "pool" in loaded.results else {}
    leakage = report.of_score(loaded.cfg.init.weights, corpus, shots, _unlabelled_images(loaded.cfg))
    facts |= {"run": str(loaded.path), "leakage": leakage}
    return _score_and_write(loaded.task, predictions, corpus, _shape_of(loaded, shots), Path(out), facts, loaded.radius)


def _training_images(loaded: LoadedRun) -> Corpus | None:
    """The labelled images a run learnt from, where they are still there."""
    names = loaded.spec.landmark_names
    try:
        return next((c for c in training_corpora(loaded.cfg) if c.manifest.spec.landmark_names == names), None)
    except DataError:
        return None


def _unlabelled_images(cfg: RunConfig) -> list[Corpus] | None:
    """The images with pseudo-labels that a run learnt from, and those in which none was accepted; None: not there."""
    try:
        return unlabelled_corpora(cfg)
    except DataError:
        return None


def _shape_of(loaded: LoadedRun, shots: Corpus | None) -> np.ndarray:
    """Mean shape `[N, 2]` of the run's own shots: as its results have it, or from its training data."""
    if "mean_shape_points" in loaded.results:
        return np.array(loaded.results["mean_shape_points"])
    if shots is None:
        raise DataError(f"{loaded.path} does not say what it learnt from, and its training data is not there")
    return training_shape(shots)


@torch.inference_mode()
def predict_split(
    cfg: RunConfig,
    task: LandmarkTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    split: str | None = None,
    corpora: Sequence[Corpus] | None = None,
    cache: dict[str, Any] | None = None,
    unreadable: list[BadSample] | None = None,
    show: Callable[[int, int], None] | None = None,
) -> dict[str, ImagePrediction]:
    """What `model` predicts in every labelled image of `split`, or every image of `corpora`, by image id.

    Gathered from all ranks.

    Args:
        unreadable: takes the images that cannot be read, which are then left out.

    Raises:
        DataError: an image was predicted twice, or cannot be read and there is no `unreadable`.
    """
    place: dict[str, Any] = {"rank": parallel.rank, "world": parallel.world, "device": str(parallel.device)}
    place |= {"cache": cache, "skips_bad": unreadable is not None}
    loader = open_loader(cfg, stage="evaluate", split=split, corpora=corpora, **place)
    was_training = model.training
    model.eval()
    rows: list[tuple[str, ImagePrediction]] = []
    try:
        for batch in loader:
            beat("score")
            batch = batch.to(parallel.device)
            with parallel.autocast(cfg.train.precision):
                predictions = to_native(task.predict(model, batch), batch)
            # weight 0: an image repeated so that every rank has as many batches
            is_real = (batch.weight > 0).tolist()
            rows += [(name, each) for name, each, real in zip(batch.ids, predictions, is_real, strict=True) if real]
            if show is not None:
                show(len(rows), -(-loader.num_images // parallel.world))
    finally:
        model.train(was_training)
        loader.close()
    if unreadable is not None:
        unreadable += sorted({bad for part in parallel.gather(loader.bad) for bad in part})
    gathered = [row for part in parallel.gather(rows) for row in part]
    names = [name for name, _ in gathered]
    scoring.check_ids(names, names)
    return dict(gathered)


def _score_and_write(
    task: LandmarkTask,
    predictions: Mapping[str, ImagePrediction],
    corpus: Corpus,
    shape: np.ndarray,
    out: Path,
    facts: dict[str, Any],
    learnt_radius: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Score the images of a corpus, write predictions.csv and results.json, and return the latter's content."""
    labels, spec = read_labels(corpus), corpus.manifest.spec
    scoring.check_ids(list(predictions), labels.ids)
    ordered = [predictions[name] for name in labels.ids]
    points = np.stack([each.points for each in ordered])
    failed = np.stack([each.failed for each in ordered])
    results: dict[str, Any] = {
        "kind": "landmarks",
        **facts,
        "num_images": len(labels.ids),
        "protocols": score_points(spec, points, labels, failed),
        "mean_shape": score_points(spec, scoring.place_shape(shape, labels.native_size), labels),
        "mean_shape_points": shape.round(6).tolist(),
    }
    if task.second_look is not None:  # the points it began with, so that a reader sees what it gives
        coarse = [each.coarse for each in ordered if each.coarse is not None]
        results["coarse"] = score_points(
            spec, np.stack([each.points for each in coarse]), labels, np.stack([each.failed for each in coarse])
        )
    # only these maps are probabilities, whose spread is an expected radial error
    if isinstance(task.reads_with, ContourCodec):
        scale = labels.mm_per_px[:, None] if spec.unit == "mm" else 1.0
        spread = np.stack([each.spread_px for each in ordered]) * scale
        errors = np.linalg.norm(points - labels.points, axis=-1) * scale
        results["reliability"] = write_reliability(out, spread, errors, unit=spec.unit, title=facts["name"])
        results["reliability"] |= peak_error(ordered, labels)
    # results.json last: where it is, everything else is
    files.write_text(out / "predictions.csv", predictions_csv(spec, ordered, labels))
    if learnt_radius is not None:
        results["radius"] = radius.measure(learnt_radius, radius.read_errors([out]))
    files.write_json(out / "results.json", results)
    return results


def _count_validation(cfg: RunConfig) -> int:
    """Labelled images a run looked at for its schedule, stopping or choice of weights: labels too."""
    if cfg.data.validation_split is None:
        return 0
    return sum(len(corpus.rows) for corpus in evaluation_corpora(cfg, cfg.data.validation_split))


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
    """Score every dataset of a mixture on its `split`; call on every rank. Arguments and errors as `evaluate_split`.

    Returns:
        The content of the run's `results.json`, on every rank.
    """
    parts: dict[str, dict[str, Any]] = {}
    for path in cfg.data.path:
        manifest = Manifest.open(path)
        name = manifest.dataset if manifest.dataset not in parts else f"{manifest.dataset}-{len(parts)}"
        # weights of the mixture say how often each set is drawn; one set alone has none
        alone = cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": (path,), "weights": None})})
        view, folder = task.part(manifest.spec), f"parts/{name}"
        more: dict[str, Any] = {"split": split, "out": out / folder, "train": train, "cache": cache, "show": show}
        results = evaluate_split(alone, view, model, parallel, **more)
        parts[name] = {**results, "dataset": name, "folder": folder}
    return {
        "kind": "mixture",
        "name": cfg.name,
        "seed": cfg.seed,
        "start": cfg.init.model_dump(mode="json"),
        "train": dict(train),
        "parts": list(parts.values()),
    }
