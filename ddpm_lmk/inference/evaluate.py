"""Scores a landmark model on a split: predictions in native pixels, both protocols, the mean shape beside them.

`evaluate_split` serves the end of a run, `evaluate_run` a finished run on any packed set. Both write `predictions.csv`
(one row per image and landmark; all a report needs) and `results.json`, whole or not at all. New pictures are in
`predict`, samples of a denoising model in `sampling`.

Scores of a run that has learnt several labelled packs at once: each by itself, in its own unit.

RUN/parts/DATASET holds what a run on that dataset alone would have written (`results.json`, `predictions.csv`), and the
run's own `results.json` holds them all as `parts`. There is no score over all of them: millimetres and pixels do not
add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.loading.corpus import Corpus, evaluation_corpora, training_corpora
from ddpm_lmk.data.shards.verify import Manifest
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference import calibration, scoring
from ddpm_lmk.inference.calibration import write_reliability
from ddpm_lmk.inference.load import LoadedRun, open_run, pixel_settings
from ddpm_lmk.inference.predictions import Found, peak_error, predictions_csv, to_native
from ddpm_lmk.inference.scoring import read_labels, score_points, training_shape
from ddpm_lmk.rundir.lock import check_writable
from ddpm_lmk.system import files
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.tasks import LandmarkTask
from ddpm_lmk.tasks.codecs import ContourCodec


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
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Predict every labelled image of `split` once, over all ranks, and score it; call on every rank.

    Args:
        out: folder that gets `predictions.csv` and `results.json` (written by rank 0).
        cache: pixels kept resident between the runs of a sweep, as `open_loader` takes it.
        train: what training took (steps, images, wall_s), copied into the results.
        show: is told how many of this rank's images are done, and of how many.

    Returns the content of `results.json`, on every rank.

    Raises:
        DataError: an image was predicted twice or not at all, a prediction is not finite, or a spacing is missing.
    """
    found = predict_split(cfg, task, model, parallel, split=split, cache=cache, show=show)

    def score() -> dict[str, Any]:
        corpus = evaluation_corpora(cfg, split)[0]
        shots = training_corpora(cfg)[0]
        shape = training_shape(shots)
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
            "leakage": report.of_score(cfg.init.weights, corpus, shots),
            "calibration": calibration.summary(out),
        }
        return _score_and_write(task, task.spec, found, corpus, shape, out, facts)

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
    settings = loaded.cfg.data.model_copy(update={"path": (str(data),), "packed": {}})
    cfg = loaded.cfg.model_copy(update={"data": settings})
    corpus = evaluation_corpora(cfg, split)[0]
    spec = corpus.manifest.spec
    loaded = loaded.for_landmarks_of(spec)
    assert isinstance(loaded.task, LandmarkTask)
    found = predict_split(cfg, loaded.task, loaded.model, loaded.parallel, split=split)
    kept = ("name", "seed", "draw", "shots", "start", "labels", "train", "pixels", "calibration")
    facts = {key: loaded.results.get(key) for key in kept}
    facts |= {"dataset": corpus.manifest.dataset, "spec": spec.name, "split": split, "run": str(loaded.path)}
    facts["leakage"] = report.of_score(loaded.cfg.init.weights, corpus, _training_films(loaded))
    return _score_and_write(loaded.task, spec, found, corpus, _shape_of(loaded), Path(out), facts)


def _training_films(loaded: LoadedRun) -> Corpus | None:
    """The labelled films a run learnt from, where they are still there."""
    names = loaded.spec.landmark_names
    try:
        return next((c for c in training_corpora(loaded.cfg) if c.manifest.spec.landmark_names == names), None)
    except DataError:
        return None


def _shape_of(loaded: LoadedRun) -> np.ndarray:
    """Mean shape of the run's own shots: as it noted it, or from its training data."""
    if "mean_shape_points" in loaded.results:
        return np.array(loaded.results["mean_shape_points"])
    shots = _training_films(loaded)
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
    split: str,
    cache: dict[str, Any] | None = None,
    show: Callable[[int, int], None] | None = None,
) -> dict[str, Found]:
    """What `model` finds in every labelled image of `split`, by image id, gathered from all ranks."""
    loader = open_loader(
        cfg,
        stage="evaluate",
        rank=parallel.rank,
        world=parallel.world,
        device=str(parallel.device),
        split=split,
        cache=cache,
    )
    was_training = model.training
    model.eval()
    rows: list[tuple[str, Found]] = []
    try:
        for batch in loader:
            beat("score")
            batch = batch.to(parallel.device)
            with parallel.autocast(cfg.train.precision):
                predictions = task.predict(model, batch)
            is_real = (batch.weight > 0).tolist()
            found = to_native(predictions, batch)
            rows += [(name, each) for name, each, real in zip(batch.ids, found, is_real, strict=True) if real]
            if show is not None:
                show(len(rows), -(-loader.num_images // parallel.world))
    finally:
        model.train(was_training)
        loader.close()
    gathered = [row for part in parallel.gather(rows) for row in part]
    names = [name for name, _ in gathered]
    scoring.check_ids(names, names)
    return dict(gathered)


def _score_and_write(
    task: LandmarkTask,
    spec: DatasetSpec,
    found: Mapping[str, Found],
    corpus: Corpus,
    shape: np.ndarray,
    out: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Score what was found in a corpus, write predictions.csv and results.json, and return the latter's content."""
    labels = read_labels(corpus)
    scoring.check_ids(list(found), labels.ids)
    points = np.stack([found[name].points for name in labels.ids])
    failed = np.stack([found[name].failed for name in labels.ids])
    results: dict[str, Any] = {
        "kind": "landmarks",
        **facts,
        "num_images": len(labels.ids),
        "protocols": score_points(spec, points, labels, failed),
        "mean_shape": score_points(spec, scoring.place_shape(shape, labels.native_size), labels),
        "mean_shape_points": shape.round(6).tolist(),
    }
    if isinstance(task.codec, ContourCodec):
        scale = labels.mm_per_px[:, None] if spec.unit == "mm" else 1.0
        spread = np.stack([found[name].spread_px for name in labels.ids]) * scale
        errors = np.linalg.norm(points - labels.points, axis=-1) * scale
        results["reliability"] = write_reliability(out, spread, errors, unit=spec.unit, title=facts["name"])
        results["reliability"] |= peak_error([found[name] for name in labels.ids], labels)
    files.write_text(out / "predictions.csv", predictions_csv(spec, found, labels))
    files.write_json(out / "results.json", results)
    return results


def _count_validation(cfg: RunConfig) -> int:
    """Labelled images a run looked at for its schedule, stopping or choice of weights: labels too."""
    if cfg.data.validation_split is None:
        return 0
    return sum(len(corpus.rows) for corpus in evaluation_corpora(cfg, cfg.data.validation_split))


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
