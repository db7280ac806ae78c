"""Finished runs found in folders, grouped into studies, with their scores averaged over seeds.

Reads results.json, predictions.csv, run.json, config.yaml and metrics.jsonl. Only means and standard deviations are
computed here. The paper's own numbers come from `paper_tables.json`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_stored
from ddpm_lmk.errors import DataError
from ddpm_lmk.inference.scoring import Spread, mean_and_std
from ddpm_lmk.rundir.log import METRICS
from ddpm_lmk.sweep import cell_folder
from ddpm_lmk.system.files import read_json

PROTOCOLS = ("original", "paper")
MEAN_SHAPE = "mean shape"  # predicts the average of the training points and never looks at an image
SCRATCH = "scratch"


@dataclass(frozen=True)
class RunFolder:
    """A run directory and what its files say; each is read once, and empty where it is not there."""

    path: Path

    @cached_property
    def results(self) -> dict[str, Any]:
        """Content of results.json."""
        return read_json(self.path / "results.json") or {}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Content of run.json: hardware, parent, fingerprint of the data."""
        return read_json(self.path / "run.json") or {}

    @cached_property
    def cfg(self) -> RunConfig | None:
        """The run file, None where it is no longer there."""
        return load_stored(self.path) if (self.path / "config.yaml").is_file() else None

    @property
    def train(self) -> dict[str, Any]:
        """What training took: steps, images, tflop, wall_s."""
        return self.results.get("train") or {}


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run, or its part about one dataset of a mixture, or another evaluation of it.

    Attributes:
        path: the folder of its results.json and predictions.csv.
        start: label of its starting weights.
        results: content of that results.json, or the part of it about one dataset.
    """

    path: Path
    start: str
    results: dict[str, Any]

    @cached_property
    def home(self) -> RunFolder:
        """The run directory; a dataset of a mixture lies in RUN/parts, another evaluation in RUN/evaluate-SPLIT."""
        folder = self.path.parents[1] if self.path.parent.name == "parts" else self.path
        is_inside = not (folder / "config.yaml").is_file() and (folder.parent / "config.yaml").is_file()
        return RunFolder(folder.parent if is_inside else folder)

    @property
    def labels(self) -> int:
        """Labelled training images."""
        return int(self.results["labels"]["training"])

    @property
    def seed(self) -> int:
        return int(self.results["seed"])

    @property
    def train(self) -> dict[str, Any]:
        """What training took: steps, images, tflop, wall_s."""
        return self.results.get("train") or {}

    @property
    def unit(self) -> str:
        """Unit of the original protocol."""
        return str(self.results["protocols"]["original"]["unit"])

    @cached_property
    def predictions(self) -> dict[str, list[dict[str, str]]]:
        """Rows of predictions.csv by image; empty where the file is not there."""
        path = self.path / "predictions.csv"
        rows_of: dict[str, list[dict[str, str]]] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    rows_of.setdefault(row["image_id"], []).append(row)
        return rows_of

    @cached_property
    def errors(self) -> dict[str, np.ndarray]:
        """Radial errors `[N]` of each image, in the unit of the original protocol."""
        column = "error_mm" if self.unit == "mm" else "error_px"
        return {name: np.array([float(row[column]) for row in rows]) for name, rows in self.predictions.items()}

    def image_errors(self) -> dict[str, float]:
        """Mean error of each image."""
        return {name: float(np.mean(errors)) for name, errors in self.errors.items()}

    @cached_property
    def parent(self) -> RunFolder | None:
        """The run that the starting weights came from, where it is still there."""
        weights = self.results["start"]["weights"]
        if weights is None:
            return None
        path = Path(weights)  # a run, RUN/snapshots/STEP, or a file in one
        return next((RunFolder(p) for p in (path, *path.parents[:2]) if (p / METRICS).is_file()), None)


# The shortest pre-training that was measured to lower landmark errors, at the CPU size: those of the demo's phantoms.
# Of cephalograms 24,000 images did, and 6,000 did not (docs/recipe.md).
ENOUGH_IMAGES = 8000


def short_pretraining(results: Mapping[str, Any]) -> str | None:
    """What to say of a pre-training by denoising, from its results, that was too short to count on; None: nothing."""
    images = (results.get("train") or {}).get("images")
    if results.get("kind") != "denoise" or images is None or images >= ENOUGH_IMAGES:
        return None
    return (
        f"pre-trained on {images:,} images, which may be too few to help: where it was measured, 24,000 lowered "
        "landmark errors of cephalograms and 6,000 did not (docs/recipe.md); train.duration makes it longer"
    )


@dataclass(frozen=True)
class Score:
    """One protocol's figures over seeds."""

    unit: str
    mre: Spread
    sdr: dict[str, Spread]


@dataclass(frozen=True)
class Row:
    """A line of the table of scores: a start (`method`), the mean shape, or a method of the paper."""

    kind: Literal["run", "mean shape", "paper"]
    method: str
    training: int
    validation: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Study:
    """All runs on one split of one dataset."""

    dataset: str
    spec: str
    split: str
    num_images: int
    runs: tuple[Run, ...]
    planned: int  # cells of the sweeps, finished or not
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # sweep file's `rows`: title, paper, note

    def title(self, start: str) -> str:
        """The name of a start in tables."""
        return self.texts.get(start, {}).get("title") or start

    @cached_property
    def starts(self) -> list[str]:
        """Labels of starting weights: from scratch first, then in the order of the sweep file's `rows`."""
        # the first row is what all others are held against
        order = list(dict.fromkeys([SCRATCH, *self.texts, *(run.start for run in self.runs)]))
        return sorted({run.start for run in self.runs}, key=order.index)

    @cached_property
    def shots(self) -> list[int]:
        """Numbers of training labels, ascending."""
        return sorted({run.labels for run in self.runs})

    def select(self, start: str, labels: int | None = None) -> list[Run]:
        """Runs of a start by seed, at one number of labels or at all of them."""
        runs = [run for run in self.runs if run.start == start and labels in (None, run.labels)]
        return runs if labels is None else sorted(runs, key=lambda run: run.seed)

    def parents(self, start: str) -> list[RunFolder]:
        """The pre-training runs of a start: several where few and many labels start from different weights."""
        parents = {run.parent.path: run.parent for run in self.select(start) if run.parent is not None}
        return list(parents.values())

    def score(self, start: str, labels: int, protocol: str) -> Score | None:
        """Figures of the runs of a start at one number of labels, or None where there is none."""
        runs = self.select(start, labels)
        return average([run.results["protocols"][protocol] for run in runs]) if runs else None

    def errors(self, labels: int, starts: Sequence[str] | None = None) -> dict[str, float]:
        """MRE (original protocol) of the starts that have runs at this number of labels."""
        scores = {start: self.score(start, labels, "original") for start in starts or self.starts}
        return {start: score.mre[0] for start, score in scores.items() if score is not None}

    def best_start(self, labels: int) -> str:
        """The start with the lowest MRE at this number of labels."""
        # ties, as of two copies of one run, go by name, so that a page is the same every time
        return min((error, start) for start, error in self.errors(labels).items())[1]

    def mean_shape(self, labels: int, protocol: str) -> Score:
        """Figures of the mean shape, over the distinct sets of shots: one for all seeds where `draw` is first."""
        by_draw: dict[int, Run] = {}
        for run in self.runs:
            if run.labels == labels:
                by_draw.setdefault(run.seed if run.results["draw"] == "random" else 0, run)
        return average([run.results["mean_shape"][protocol] for run in by_draw.values()])

    def thresholds(self, protocol: str) -> list[str]:
        """Distances of the success detection rates, in the unit of the protocol."""
        return list(self.runs[0].results["protocols"][protocol]["sdr"])

    def unit(self, protocol: str) -> str:
        return str(self.runs[0].results["protocols"][protocol]["unit"])

    def unit_name(self, protocol: str) -> str:
        """The unit of a protocol in words."""
        grid = self.runs[0].results["protocols"][protocol].get("grid")
        if self.unit(protocol) == "mm":
            return "mm"
        return f"pixels of the {grid} grid" if grid else "original pixels"

    def rows(self, *, with_paper: bool = True) -> list[Row]:
        """The table of scores: per number of labels the mean shape, every start, and the paper's own figures."""
        table = []
        for labels in self.shots:
            shape = {protocol: self.mean_shape(labels, protocol) for protocol in PROTOCOLS}
            table.append(Row("mean shape", MEAN_SHAPE, labels, 0, shape))
            for start in self.starts:
                runs = [run for run in self.runs if (run.start, run.labels) == (start, labels)]
                # validation labels are labels too: runs that used another number of them are another row
                for validation in sorted({run.results["labels"]["validation"] for run in runs}):
                    alike = [run.results for run in runs if run.results["labels"]["validation"] == validation]
                    scores = {name: average([each["protocols"][name] for each in alike]) for name in PROTOCOLS}
                    table.append(Row("run", start, labels, validation, scores))
            if with_paper:
                table += [row for row in paper_rows(self.spec) if row.training == labels]
        return table


def average(scores: Sequence[dict[str, Any]]) -> Score:
    """Mean and standard deviation of the same figures from several runs."""
    return Score(
        unit=scores[0]["unit"],
        mre=mean_and_std([score["mre"] for score in scores]),
        sdr={key: mean_and_std([score["sdr"][key] for score in scores]) for key in scores[0]["sdr"]},
    )


def labels_text(count: int, what: str = "") -> str:
    """`1 label`, `5 labels`, `5 training labels`."""
    return f"{count} {what}{' ' if what else ''}label{'' if count == 1 else 's'}"


def paper_tables() -> dict[str, Any]:
    """The paper's tables, by dataset."""
    return json.loads(resources.files("ddpm_lmk.report").joinpath("paper_tables.json").read_text(encoding="utf-8"))


def paper_rows(spec: str, methods: Iterable[str] = ("Our method", "Our method with [20]")) -> list[Row]:
    """What the paper reports for a dataset, under its own protocol; empty for other datasets."""
    tables = paper_tables()
    table = tables["datasets"].get(spec)
    rows = []
    for method in methods:
        for entry in (entry for entry in (table["rows"] if table else ()) if entry["method"] == method):
            sdr = {f"{key:g}": (mean, std, 3) for key, (mean, std) in zip(table["thresholds"], entry["sdr"])}
            score = Score(table["unit"], (entry["mre"][0], entry["mre"][1], 3), sdr)
            name = tables["methods"][method]
            rows.append(Row("paper", name, entry["labels"], table["validation_labels"], {"paper": score}))
    return rows


def collect(folders: Sequence[Path]) -> list[Study]:
    """Find the finished fine-tuning runs in sweep folders and run directories, one study per dataset and split.

    Raises:
        DataError: a folder is neither, or there is nothing finished in any of them.
    """
    runs: list[Run] = []
    planned = 0
    texts: dict[str, dict[str, str]] = {}
    for folder in folders:
        finished, count = _runs_in(Path(folder))
        runs += finished
        planned += count
        texts |= (read_json(Path(folder) / "sweep.json") or {}).get("rows") or {}
    if not runs:
        raise DataError(
            f"no finished fine-tuning run in {', '.join(map(str, folders))}; let the sweep finish a cell first"
        )
    studies: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        # datasets of one name may have another spec, and older results have none: the name then stands for it
        key = (run.results["dataset"], run.results.get("spec", run.results["dataset"]), run.results["split"])
        studies.setdefault(key, []).append(run)
    if len(studies) > 1:
        planned = 0  # which dataset a cell that has not ended belongs to is not known
    return [Study(*key, group[0].results["num_images"], tuple(group), planned, texts) for key, group in studies.items()]


def _runs_in(folder: Path) -> tuple[list[Run], int]:
    """Finished runs of a sweep folder or run directory, and how many there should be."""
    sweep = read_json(folder / "sweep.json")
    if sweep is not None:
        runs = []
        for cell in sweep["cells"]:
            path = cell_folder(folder, cell["cell"])
            results = read_json(path / "results.json")
            # results.json is written before done.json, which says that nothing is missing
            if results and (path / "done.json").is_file():
                runs += _runs_of(path, cell["start"], results)
        return runs, len(sweep["cells"])
    results = read_json(folder / "results.json")
    if results is None:
        raise DataError(
            f"{folder} is neither a sweep (sweep.json) nor a finished run (results.json); give one of these"
        )
    if results.get("kind") not in ("landmarks", "mixture"):
        raise DataError(
            f"{folder} is a run of kind {results.get('kind')}; a report needs fine-tuning runs or sweeps of them"
        )
    if results["kind"] == "landmarks" and "protocols" not in results:
        raise DataError(
            f"{folder} was scored on nothing (evaluate.split=null), as the teacher of another run is; give a run that "
            "was, or score it with `ddpm-lmk evaluate` and give that folder"
        )
    # a single run has no label of its start, as a cell of a sweep does: the name of its weights will do
    weights = results["start"]["weights"]
    return _runs_of(folder, SCRATCH if weights is None else Path(weights).name, results), 1


def _runs_of(folder: Path, start: str, results: dict[str, Any]) -> list[Run]:
    """One run, or one for each dataset of a mixture."""
    if results["kind"] == "mixture":
        return [Run(folder / part["folder"], start, part) for part in results["parts"]]
    return [Run(folder, start, results)]
