"""What a report is made of: finished runs found in folders, and their scores put together over seeds.

Reads results.json, predictions.csv and metrics.jsonl; computes means and standard deviations and nothing else.
No number is typed by hand: the paper's own come from `paper_tables.json`.

The pre-training runs that starting weights came from, where they are still there.
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

from ddpm_lmk.errors import DataError
from ddpm_lmk.inference.scoring import mean_and_std
from ddpm_lmk.rundir.log import METRICS, read_lines
from ddpm_lmk.sweep import cell_folder
from ddpm_lmk.system.files import read_json

PROTOCOLS = ("original", "paper")
MEAN_SHAPE = "mean shape"
SCRATCH = "scratch"

Spread = tuple[float, float | None, int]  # mean, sample standard deviation, number of runs


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run: where it lies, the label of its starting weights, and its results.json."""

    folder: Path
    start: str
    results: dict[str, Any]

    @property
    def home(self) -> Path:
        """The run directory; a dataset of a mixture lies in RUN/parts, another evaluation in RUN/evaluate-SPLIT."""
        folder = self.folder.parents[1] if self.folder.parent.name == "parts" else self.folder
        is_inside = not (folder / "config.yaml").is_file() and (folder.parent / "config.yaml").is_file()
        return folder.parent if is_inside else folder

    @property
    def labels(self) -> int:
        """Labelled training images."""
        return int(self.results["labels"]["training"])

    @property
    def unit(self) -> str:
        """Unit of the original protocol."""
        return str(self.results["protocols"]["original"]["unit"])

    @cached_property
    def predictions(self) -> dict[str, list[dict[str, str]]]:
        """Rows of predictions.csv by image; empty where the file is not there."""
        path = self.folder / "predictions.csv"
        found: dict[str, list[dict[str, str]]] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    found.setdefault(row["image_id"], []).append(row)
        return found

    @property
    def error_column(self) -> str:
        """The column of predictions.csv in the unit of the original protocol."""
        return "error_mm" if self.unit == "mm" else "error_px"

    def errors(self) -> np.ndarray:
        """All radial errors, flat, in the unit of the original protocol."""
        return np.array([float(row[self.error_column]) for rows in self.predictions.values() for row in rows])

    def image_errors(self) -> dict[str, float]:
        """Mean error of each image."""
        return {
            name: float(np.mean([float(row[self.error_column]) for row in rows]))
            for name, rows in self.predictions.items()
        }

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return read_lines(self.folder / METRICS)


@dataclass(frozen=True)
class Score:
    """One protocol's figures over seeds."""

    unit: str
    mre: Spread
    median: Spread | None
    sdr: dict[str, Spread]


@dataclass(frozen=True)
class Row:
    """A line of the headline table."""

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
    texts: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # what sweeps say of a start: title, paper, note

    def title(self, start: str) -> str:
        """The name of a start in tables."""
        return self.texts.get(start, {}).get("title") or start

    @property
    def starts(self) -> list[str]:
        """Labels of starting weights: from scratch first, then in the order of the sweep file's `rows`."""
        order = list(dict.fromkeys([SCRATCH, *self.texts, *(run.start for run in self.runs)]))
        return sorted({run.start for run in self.runs}, key=order.index)

    @property
    def shots(self) -> list[int]:
        """Numbers of training labels, ascending."""
        return sorted({run.labels for run in self.runs})

    def select(self, start: str, labels: int) -> list[Run]:
        """Runs of one cell group, by seed."""
        found = [run for run in self.runs if (run.start, run.labels) == (start, labels)]
        return sorted(found, key=lambda run: run.results["seed"])

    def score(self, start: str, labels: int, protocol: str) -> Score | None:
        """Figures of one cell group, or None where it has no run."""
        runs = self.select(start, labels)
        return gather([run.results["protocols"][protocol] for run in runs]) if runs else None

    def mean_shape(self, labels: int, protocol: str) -> Score:
        """The predictor that sees no picture, over the distinct sets of shots."""
        found: dict[int, Run] = {}
        for run in self.runs:
            if run.labels == labels:
                found.setdefault(run.results["seed"] if run.results["draw"] == "random" else 0, run)
        return gather([run.results["mean_shape"][protocol] for run in found.values()])

    def best_start(self, labels: int) -> str:
        """The start with the lowest MRE (original protocol) at this number of labels."""
        scored = [(score.mre[0], start) for start in self.starts if (score := self.score(start, labels, "original"))]
        return min(scored)[1]

    def rows(self, *, with_paper: bool = True) -> list[Row]:
        """The headline table: per number of labels the mean shape, every start, and the paper's own figures."""
        table = []
        for labels in self.shots:
            here = [run for run in self.runs if run.labels == labels]
            shape = {protocol: self.mean_shape(labels, protocol) for protocol in PROTOCOLS}
            table.append(Row("mean shape", MEAN_SHAPE, labels, 0, shape))
            for start in self.starts:
                runs = [run for run in here if run.start == start]
                for validation in sorted({run.results["labels"]["validation"] for run in runs}):
                    some = [run for run in runs if run.results["labels"]["validation"] == validation]
                    scores = {name: gather([run.results["protocols"][name] for run in some]) for name in PROTOCOLS}
                    table.append(Row("run", start, labels, validation, scores))
            if with_paper:
                table += [row for row in paper_rows(self.spec) if row.training == labels]
        return table


def gather(scores: Sequence[dict[str, Any]]) -> Score:
    """Mean and standard deviation of the same figures from several runs."""
    return Score(
        unit=scores[0]["unit"],
        mre=mean_and_std([score["mre"] for score in scores]),
        median=mean_and_std([score["median"] for score in scores]),
        sdr={key: mean_and_std([score["sdr"][key] for score in scores]) for key in scores[0]["sdr"]},
    )


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
            score = Score(table["unit"], (entry["mre"][0], entry["mre"][1], 3), None, sdr)
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
        found, count = _runs_in(Path(folder))
        runs += found
        planned += count
        texts |= (read_json(Path(folder) / "sweep.json") or {}).get("rows") or {}
    if not runs:
        raise DataError(
            f"no finished fine-tuning run in {', '.join(map(str, folders))}; let the sweep finish a cell first"
        )
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        key = (run.results["dataset"], run.results.get("spec", run.results["dataset"]), run.results["split"])
        groups.setdefault(key, []).append(run)
    return [
        Study(
            *key,
            num_images=group[0].results["num_images"],
            runs=tuple(group),
            planned=planned if len(groups) == 1 else 0,
            texts=texts,
        )
        for key, group in groups.items()
    ]


def _runs_in(folder: Path) -> tuple[list[Run], int]:
    """Finished runs of a sweep folder or run directory, and how many there should be."""
    sweep = read_json(folder / "sweep.json")
    if sweep is not None:
        cells = [(cell_folder(folder, cell["cell"]), cell["start"]) for cell in sweep["cells"]]
        found = [(path, start, read_json(path / "results.json")) for path, start in cells]
        done = [path for path, _, results in found if results and (path / "done.json").is_file()]
        runs = [_runs_of(path, start, results) for path, start, results in found if results and path in done]
        return [run for each in runs for run in each], len(cells)
    results = read_json(folder / "results.json")
    if results is None:
        raise DataError(
            f"{folder} is neither a sweep (sweep.json) nor a finished run (results.json); give one of these"
        )
    if results.get("kind") not in ("landmarks", "mixture"):
        raise DataError(
            f"{folder} is a run of kind {results.get('kind')}; a report needs fine-tuning runs or sweeps of them"
        )
    weights = results["start"]["weights"]
    return _runs_of(folder, SCRATCH if weights is None else Path(weights).name, results), 1


def _runs_of(folder: Path, start: str, results: dict[str, Any]) -> list[Run]:
    """One run, or one for each dataset of a mixture."""
    if results["kind"] == "mixture":
        return [Run(folder / part["folder"], start, part) for part in results["parts"]]
    return [Run(folder, start, results)]


def parent_of(run: Run) -> Path | None:
    """The run directory a run's starting weights came from, where it is still there."""
    weights = run.results["start"]["weights"]
    if weights is None:
        return None
    path = Path(weights)
    for candidate in (path, *path.parents[:2]):
        if (candidate / "metrics.jsonl").is_file():
            return candidate
    return None


def parents_of(study: Study, start: str) -> list[Path]:
    """Those of a row: one, or several where few and many labels start from different weights."""
    found = (parent_of(run) for run in study.runs if run.start == start)
    return list(dict.fromkeys(parent for parent in found if parent is not None))
