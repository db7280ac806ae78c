"""A run as a folder that the Hugging Face hub takes: weights, how to use them, and a card from the run's own files.

`model.safetensors` has the weights that were selected (their average where there is one). `config.json` is the manifest
of the folder: the network and the task, the scores, the radius, size and digest of every file. `README.md` is the card.
`ddpm_lmk.load`, `predict`, `evaluate` and `init.weights` take such a folder as they take a run.

Nothing leads back to a place or a patient: folders become names of datasets, ids of images stay behind, and the card
has a picture only of phantoms. Weights are another matter, and the card says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddpm_lmk.config import LandmarksConfig, RunConfig
from ddpm_lmk.config.load import validate
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.report import refuse_seen
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import CheckpointError, DataError, ResourceError, RunConflictError
from ddpm_lmk.inference import calibration, radius
from ddpm_lmk.inference.load import pixel_settings
from ddpm_lmk.inference.scoring import mean_and_std
from ddpm_lmk.report.collect import PROTOCOLS, Run, RunFolder, average, collect, labels_text
from ddpm_lmk.report.figures import SIDE, draw_image
from ddpm_lmk.report.html import plain_spread
from ddpm_lmk.rundir import checkpoint
from ddpm_lmk.rundir.checkpoint import HUB, HUB_WEIGHTS, LIBRARY
from ddpm_lmk.system import files
from ddpm_lmk.system.files import read_json

CARD, PICTURE = "README.md", "example.jpg"
UNSPECIFIED = "unspecified"
# What results.json says that a user of the weights may want, and that names no file: ids of images are not in it.
RESULTS = (
    *("kind", "name", "dataset", "spec", "split", "seed", "draw", "shots", "labels", "train", "num_images", "pixels"),
    *("protocols", "mean_shape", "mean_shape_points", "coarse", "reliability", "calibration", "radius", "validation"),
)
# Of these, what is said of the weights that were selected, and of no other snapshot.
SCORES = ("protocols", "coarse", "reliability", "calibration", "radius", "validation")
VERDICTS = ("status", "images", "kinds", "patients_not_compared")
# The identifiers of licences that the hub knows and that weights are given; any other is `other` with a name there.
LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0"),
)


def export_hub(run: str | Path, *, out: str | Path | None = None, license: str | None = None) -> Path:  # noqa: A002
    """Write RUN/export/NAME-hub, or the new folder `out`; returns where.

    Args:
        run: a finished run, or one of its snapshots; one that was not selected has no scores.
        license: identifier of the licence of the weights (apache-2.0, cc-by-nc-4.0, ...); None: the card says that it
            is unspecified.

    Raises:
        CheckpointError: no finished weights there.
        RunConflictError: the folder exists.
        ResourceError: no room or no rights.
    """
    weights, meta = checkpoint.load_weights(run, "auto")
    if "config" not in meta or "results" in meta:
        raise CheckpointError(f"{run} is no run; wanted a run directory or one of its snapshots")
    # Of RUN/snapshots/STEP, which may be named from inside.
    home = Path(run) if (Path(run) / "config.yaml").is_file() else Path(meta["path"]).resolve().parent.parent
    source = _Source(home, meta)
    folder = Path(out) if out is not None else source.folder.path / "export" / f"{source.cfg.name}-hub"
    if folder.exists():
        raise RunConflictError(f"{folder} exists and is kept; name another --out, or remove it")
    picture = source.picture()
    card = _Card(source, license, has_picture=picture is not None)
    contents: dict[str, Any] = {HUB_WEIGHTS: checkpoint.pieces(weights), CARD: [files.to_utf8(card.text())]}
    if picture is not None:
        contents[PICTURE] = [picture]
    if source.leakage is not None:
        contents[report.FILE_NAME] = [files.to_json(source.leakage)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_directory(folder, contents.items(), manifest=HUB, facts=source.facts())
    except OSError as error:
        raise ResourceError(
            f"cannot write {folder}: {error.strerror}; free or unlock the disk and run again"
        ) from error
    return folder


class _Source:
    """A run, and what of it may leave."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = RunFolder(path), meta
        self.cfg = validate(RunConfig, meta["config"], source=str(path))
        self.spec = None if self.cfg.task.stage == "pretrain" else DatasetSpec.model_validate(meta["spec"])

    @property
    def is_selected(self) -> bool:
        """Are these the weights that the run was scored with?"""
        return bool(self.meta.get("selected"))

    @cached_property
    def runs(self) -> list[Run]:
        """The scored run, or its part for each dataset of a mixture; none where nothing was scored."""
        if not self.is_selected:
            return []
        try:
            return [run for study in collect([self.folder.path]) for run in study.runs]
        except DataError:
            return []

    @cached_property
    def datasets(self) -> list[str]:
        """Names of the datasets of `data.path`."""
        whole = self.folder.results
        named = [part["dataset"] for part in whole.get("parts", [whole]) if "dataset" in part]
        if self.leakage is not None:
            named = [each["dataset"] for each in self.leakage["trained_on"]]
        known = len(named) == len(self.cfg.data.path)
        return named if known else [Path(path).name or "dataset" for path in self.cfg.data.path]

    @cached_property
    def parent(self) -> str | None:
        """Name of the run, or of the file, that the weights started from."""
        if self.cfg.init.weights is None:
            return None
        path = Path(self.cfg.init.weights)
        return next((name for run in self.runs if run.parent and (name := run.parent.facts.get("name"))), path.name)

    @cached_property
    def leakage(self) -> dict[str, Any] | None:
        """What a pre-training run wrote of what it left out, less folders and ids; None of other runs."""
        record = read_json(self.folder.path / report.FILE_NAME)
        if record is None:
            return None
        sources = {
            key: [{name: value for name, value in each.items() if name != "path"} for each in record[key]]
            for key in ("trained_on", "protected")
        }
        return {key: value for key, value in record.items() if key != "listed"} | sources

    @cached_property
    def packs(self) -> list[Manifest]:
        """The datasets it learnt from; empty where they are not at hand."""
        try:
            return [Manifest.open(path) for path in self.cfg.data.path]
        except DataError:
            return []

    @property
    def is_of_phantoms(self) -> bool:
        """Are all of them at hand, and drawn?"""
        return bool(self.packs) and all(pack.settings.get("kind") == "phantom" for pack in self.packs)

    def facts(self) -> dict[str, Any]:
        """The content of config.json but for its list of files."""
        kept = ("step", "images", "use", "out_channels", "full_size", "spec", "export", "fingerprint")
        places = (self.folder.path, *sorted(self.folder.path.glob("parts/*")))
        results = self._results(self.folder.results)
        if "pixels" not in results and self.packs:  # of a run that was not scored
            results["pixels"] = pixel_settings(self.packs[0])
        return {
            "library": LIBRARY,
            "library_version": self.folder.facts.get("versions", {}).get(LIBRARY),
            **{key: self.meta[key] for key in kept if key in self.meta},
            "config": self._config(),
            "results": results,
            "calibration": calibration.read(self.folder.path),
            "radius": [facts for place in places if (facts := read_json(place / radius.FILE_NAME)) is not None],
        }

    def _config(self) -> dict[str, Any]:
        """The run file without folders and ids."""
        config = json.loads(self.cfg.model_dump_json())
        data = config["data"]
        data |= {"path": self.datasets, "protect": []}
        if data["draw"] == "listed":
            data["draw"] = "first"
            del data["images"]
        if data.get("propagate"):
            data["propagate"]["path"] = None
        config["init"]["weights"] = self.parent
        config["runtime"]["cache_dir"] = None
        return config

    def _results(self, results: Mapping[str, Any]) -> dict[str, Any]:
        told = RESULTS if self.is_selected else tuple(key for key in RESULTS if key not in SCORES)
        kept = {key: results[key] for key in told if key in results}
        if "start" in results:
            kept["start"] = {**results["start"], "weights": self.parent}
        if results.get("leakage") and results["kind"] in ("landmarks", "mixture"):
            kept["leakage"] = {
                stage: {key: found[key] for key in VERDICTS if key in found}
                for stage, found in results["leakage"].items()
            }
        if "pool" in results:
            kept["pool"] = {key: value for key, value in results["pool"].items() if isinstance(value, int | float)}
        if "parts" in results:
            kept["parts"] = [self._results(part) for part in results["parts"]]
        return kept

    def picture(self) -> bytes | None:
        """The scored phantom of median error with its points; None of anything else, which may show a patient."""
        if not self.is_of_phantoms or not self.runs or not self.runs[0].errors:
            return None
        errors = sorted(self.runs[0].image_errors().items(), key=lambda item: item[1])
        return draw_image(self.runs[0], errors[len(errors) // 2][0], SIDE, dict(zip(self.cfg.data.path, self.packs)))


class _Card:
    """The text of README.md: YAML for the hub, Markdown for a reader. Numbers are those of the run's files."""

    def __init__(self, source: _Source, license: str | None, *, has_picture: bool) -> None:  # noqa: A002
        self.source, self.license, self.has_picture = source, license, has_picture
        self.cfg, self.results, self.runs = source.cfg, source.folder.results, source.runs

    def text(self) -> str:
        """The whole card."""
        front = yaml.safe_dump(self._front(), sort_keys=False, allow_unicode=True, width=120)
        parts = [self._title(), self._use(), self._training(), *map(self._scores, self.runs), self._leakage()]
        return f"---\n{front}---\n\n" + "\n\n".join([*filter(None, parts), self._intended(), self._licence()]) + "\n"

    def _front(self) -> dict[str, Any]:
        front: dict[str, Any] = {"library_name": LIBRARY}
        if self.license is not None:
            is_known = self.license.lower() in LICENCES
            front |= (
                {"license": self.license.lower()} if is_known else {"license": "other", "license_name": self.license}
            )
        front["tags"] = ["x-ray", "medical-imaging", "anatomical-landmark-detection", "few-shot-learning"]
        if self.source.spec is not None:
            front["pipeline_tag"] = "keypoint-detection"
        if self.runs:
            results = [_model_index(run) for run in self.runs]
            front["model-index"] = [{"name": self.cfg.name, "results": results}]
        return front

    def _title(self) -> str:
        spec = self.source.spec
        if spec is None:
            images = self.results.get("num_images", 0)
            return (
                f"# {self.cfg.name}\n\nWeights pre-trained by {_words(self.cfg.task.kind)} on {images:,} x-rays "
                "without labels, to start the training of a landmark network from. They find no landmarks by "
                "themselves."
            )
        learnt = " and ".join(f"the {part.num_landmarks} landmarks of {part.name}" for part in spec.domains)
        lines = [f"# {self.cfg.name}\n\nFinds {learnt} in x-rays."]
        if self.has_picture:
            lines.append(
                f"![a phantom with found and true points]({PICTURE})\n\nA phantom of median error: crosses are found, "
                "rings are true."
            )
        for part in spec.domains:
            names = ", ".join(part.landmark_names)
            lines.append(f"<details><summary>Landmarks of {part.name}</summary>\n\n{names}\n\n</details>")
        return "\n\n".join(lines)

    def _use(self) -> str:
        spec = self.source.spec
        if spec is None:
            return (
                "## Use\n\n```bash\nddpm-lmk finetune RUN_FILE.yaml init.weights=FOLDER   # this folder\n```\n\n"
                "The section `model` of the run file has to be that of `config.json`."
            )
        dataset = f', dataset="{spec.domains[0].name}"' if spec.parts else ""
        option = f" --dataset {spec.domains[0].name}" if spec.parts else ""
        return (
            "## Use\n\n```python\nimport ddpm_lmk\n\n"
            f'detector = ddpm_lmk.load("FOLDER"{dataset})   # this folder\n'
            'found = detector.predict("film.png")   # or a DICOM file, a Pillow image, a numpy array\n'
            "print(found.names, found.points)   # pixels of the film, (x, y)\n```\n\n"
            f"or `ddpm-lmk predict FOLDER FILMS --out DIR{option}`. Pictures are prepared as those it was trained on."
        )

    def _training(self) -> str:
        cfg, train, facts = self.cfg, self.source.folder.train, self.source.folder.facts
        rows = [("data", "; ".join(_dataset(self.source, run) for run in self.runs) or ", ".join(self.source.datasets))]
        if self.source.spec is None:
            rows[0] = ("data", f"{rows[0][1]}: {self.results.get('num_images', 0):,} images, no labels")
        rows += [
            ("starting weights", self.source.parent or "random"),
            ("network", cfg.model.describe(cfg.data.image_size)),
            ("training", f"{train.get('steps', 0):,} steps of {cfg.train.global_batch_size} images, seed {cfg.seed}"),
            ("weights", f"step {self.source.meta['step']:,}, {_words(self.source.meta['use'])}"),
            ("made with", f"{LIBRARY} {facts.get('versions', {}).get(LIBRARY, '')}, torch "
                          f"{facts.get('versions', {}).get('torch', '')}"),
        ]  # fmt: skip
        if isinstance(cfg.task, LandmarksConfig) and (refine := cfg.task.refine) is not None:
            rows.insert(3, ("second look", f"a second such network, on crops of {refine.crop:g} of the side"))
        if (pool := self.results.get("pool")) is not None:
            rows.insert(1, ("pseudo-labels", f"in {pool['images']:,} images without labels"))
        body = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return f"## Training\n\n| what | value |\n|---|---|\n{body}"

    def _scores(self, run: Run) -> str:
        """Scores of one dataset, with what each deviation is over."""
        results, unit = run.results, run.unit
        scores = {name: (results["protocols"][name], results["mean_shape"][name]) for name in PROTOCOLS}
        thresholds = list(results["protocols"]["original"]["sdr"])
        head = f"| protocol | MRE | SDR {' / '.join(thresholds)} {unit} | mean shape, MRE |\n|---|---|---|---|"
        body = "\n".join(
            f"| {name} | {ours['mre']:.2f} {ours['unit']} | "
            f"{' / '.join(f'{value:.1f}' for value in ours['sdr'].values())} % | {shape['mre']:.2f} {shape['unit']} |"
            for name, (ours, shape) in scores.items()
        )
        count, landmarks = results["num_images"], len(results["protocols"]["original"]["per_landmark"])
        lines = [
            f"## Scores on {results['spec']}, split {results['split']}",
            f"{count} images with {landmarks} landmarks each; {labels_text(run.labels, 'training')}, "
            f"{labels_text(results['labels']['validation'], 'validation')}. MRE is the mean distance between found and "
            "true points, SDR the share of points within a distance. The mean shape is a predictor that never looks at "
            "the image. Protocol `original` measures in original pixels, `paper` as the code of the paper does, on a "
            "grid of 256 pixels.",
            f"{head}\n{body}",
        ]
        if run.errors:
            means, points = list(run.image_errors().values()), np.concatenate(list(run.errors.values()))
            over_images, over_points = mean_and_std(means), mean_and_std(points.tolist())
            lines.append(
                f"MRE (original) {plain_spread(over_images)} {unit} over the mean errors of {over_images[2]} images, "
                f"{plain_spread(over_points)} {unit} over {over_points[2]:,} points."
            )
        if (seeds := self._seeds(run)) is not None:
            lines.append(seeds)
        if (measured := results.get("radius")) is not None:
            lines.append(
                f"Radius: {measured['within_pct']:.1f} % of the true points lie within theirs, wanted "
                f"{100 * measured['coverage']:g} %; mean {measured['mean']:.2f} {measured['unit']}."
            )
        rows = "\n".join(_landmark_rows(run))
        lines.append(
            f"<details><summary>Every landmark</summary>\n\n| landmark | MRE ({unit}), deviation over images | median |"
            f"\n|---|---|---|\n{rows}\n\n</details>"
        )
        return "\n\n".join(lines)

    def _seeds(self, run: Run) -> str | None:
        """What other seeds of the same sweep gave; None where there is no sweep."""
        cells = self.source.folder.path.resolve().parent
        if cells.name != "cells" or not (cells.parent / "sweep.json").is_file():
            return None
        path = run.path.resolve()
        # Another evaluation of a cell is in another study, and so is each dataset of a mixture.
        pairs = ((study, own) for study in collect([cells.parent]) for own in study.runs)
        study, start = next((study, own.start) for study, own in pairs if own.path.resolve() == path)
        alike = [each.results for each in study.select(start, run.labels)]
        # Labels for validation are labels too, as in `Study.rows`.
        alike = [each for each in alike if each["labels"] == run.results["labels"]]
        if len(alike) < 2:
            return None
        mre = average([each["protocols"]["original"] for each in alike]).mre
        differs = "shots and order" if run.results["draw"] == "random" else "the same shots in another order"
        return f"Over the {mre[2]} seeds of its sweep ({differs}): {plain_spread(mre)} {run.unit}. This is one of them."

    def _leakage(self) -> str:
        if self.source.spec is None:
            return self._left_out()
        if not self.runs:
            return "## Leakage\n\nNothing was scored, so no image of a test split was looked for in the training data."
        lines = []
        for run in self.runs:
            stages = run.results.get("leakage") or {}
            words = [f"{_STAGES[stage]}: {_verdict(found)}" for stage, found in stages.items()]
            lines.append(f"Scored images of {run.results['spec']}: {'; '.join(words) or 'not compared'}.")
            lines += [line for line in refuse_seen([run.results], acknowledged=True) if line.startswith("Leakage")]
        text = "Whether images that are scored were trained on (same pixels, near copies, same patient)."
        return "\n\n".join(["## Leakage", text, *lines])

    def _left_out(self) -> str:
        record = self.source.leakage
        if record is None:
            return ""
        protected = ", ".join(f"{each['dataset']} ({', '.join(each['splits'])})" for each in record["protected"])
        counts = report.summary(record)
        return (
            f"## Leakage\n\nProtected splits: {protected or 'none'}. {counts['leaks']} images of them were found in "
            f"the training data, and {counts['copies']} copies; {counts['left_out']} images were left out, and "
            f"{counts['overlap']} of protected splits trained on all the same."
        )

    def _intended(self) -> str:
        is_landmarks = self.source.spec is not None
        lines = ["## Intended use"]
        if is_landmarks:
            lines += [
                "Research: finding these landmarks in x-rays like those it was trained and scored on, with every point "
                "looked at by a person before it is used. It is no medical device, and was validated for no clinical "
                "use.",
                "It names a point for every landmark in every picture, also in one of another body part or view. "
                "Scores hold for the images named above; other machines, ages and views have to be measured first "
                "(`ddpm-lmk evaluate FOLDER --data SHARDS`).",
            ]
        else:
            lines.append("Research: starting weights for networks on x-rays like those it was trained on.")
        if self.source.is_of_phantoms and self.source.parent is None and "pool" not in self.results:
            lines.append("It has seen synthetic phantoms only, and no x-ray of a person.")
        else:
            lines.append(
                "Weights trained on images of patients can give some of them away: share these as the images may be "
                "shared."
            )
        return "\n\n".join(lines)

    def _licence(self) -> str:
        return f"## Licence\n\nOf these weights: {self.license or UNSPECIFIED}."


_STAGES = {"pretraining": "pre-training", "training": "labelled training images", "pool": "pseudo-labelled images"}


def _words(name: str) -> str:
    known = {"denoise": "denoising (DDPM)", "mocov3": "MoCo v3", "simclrv2": "SimCLR v2", "dino": "DINO"}
    return known.get(name) or {"ema": "their moving average", "model": "as trained"}[name]


def _verdict(found: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in (found.get("kinds") or {}).items())
    words = {"none": "there was none", "clean": "none found", "unknown": "not known"}
    text = words.get(found["status"]) or f"{found['images']} images ({counts or 'as recorded'})"
    return "; ".join([text, *found.get("patients_not_compared", ())])


def _dataset(source: _Source, run: Run) -> str:
    """What was learnt from one dataset."""
    results = run.results
    shots = {"first": "the first by name", "random": f"drawn with seed {results['seed']}", "listed": "chosen by hand"}
    how = "" if results.get("shots") is None else f" ({shots[results['draw']]})"
    pixels = results.get("pixels") or {}
    packed = f", packed at {pixels['size']} pixels" if "size" in pixels else ""
    labels = labels_text(run.labels, "training")
    return f"{results['dataset']}: {labels}{how}{packed}, seen at {source.cfg.data.image_size}"


def _landmark_rows(run: Run) -> Iterator[str]:
    per_landmark: Sequence[Mapping[str, Any]] = run.results["protocols"]["original"]["per_landmark"]
    errors = np.stack(list(run.errors.values())) if run.errors else None  # [M, N]
    for index, each in enumerate(per_landmark):
        spread = (each["mre"], None, 0) if errors is None else mean_and_std(errors[:, index].tolist())
        yield f"| {each['name']} | {plain_spread(spread)} | {each['median']:.2f} |"


def _model_index(run: Run) -> dict[str, Any]:
    """Scores of the original protocol as the hub lists them."""
    scores = run.results["protocols"]["original"]
    metrics = [{"type": "mre", "name": f"MRE ({scores['unit']})", "value": round(scores["mre"], 4)}]
    metrics += [
        {"type": "sdr", "name": f"SDR {threshold} {scores['unit']} (%)", "value": round(value, 2)}
        for threshold, value in scores["sdr"].items()
    ]
    dataset = {"type": run.results["spec"], "name": run.results["dataset"], "split": run.results["split"]}
    task = {"type": "keypoint-detection", "name": "anatomical landmark detection"}
    return {"task": task, "dataset": dataset, "metrics": metrics}
