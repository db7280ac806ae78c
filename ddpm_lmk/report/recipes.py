"""How the runs of every row were trained, by number of labels, and where that differs within a row.

Read from the config.yaml each run has written: a row may follow one recipe with few labels and another with many, and
a reader has to see which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_lmk.config import LandmarksConfig, RunConfig
from ddpm_lmk.config.load import diff_runs, load_stored
from ddpm_lmk.report.collect import Run, Study
from ddpm_lmk.rundir.lock import MAY_CHANGE
from ddpm_lmk.sweep.expand import recipe_key
from ddpm_lmk.system.files import read_json

HEADINGS = (
    "method",
    "labels",
    "network",
    "steps × images",
    "learning rate",
    "target",
    "views",
    "averaged weights",
    "validation",
)
# What a cell is, rather than how it was trained.
OWN_KEYS = ("name", "seed", "data.shots", "data.path", "init.weights")


@dataclass(frozen=True)
class Recipe:
    """A run file that some numbers of labels of a row share."""

    labels: tuple[int, ...]
    cfg: RunConfig


def recipes(study: Study, start: str) -> list[Recipe]:
    """The different run files of a row, by number of labels; empty where they are no longer there."""
    found: dict[str, Recipe] = {}
    for labels in study.shots:
        for run in study.select(start, labels):
            if not (run.home / "config.yaml").is_file():
                continue
            cfg = load_stored(run.home)
            key = recipe_key(cfg)
            before = found[key].labels if key in found else ()
            if labels not in before:
                found[key] = Recipe((*before, labels), found[key].cfg if key in found else cfg)
    return list(found.values())


def rows(study: Study) -> list[list[str]]:
    """One line per row of the study and recipe."""
    return [
        [study.title(start), ", ".join(map(str, recipe.labels)), *_facts(recipe.cfg)]
        for start in study.starts
        for recipe in recipes(study, start)
    ]


def _facts(cfg: RunConfig) -> list[str]:
    """The settings that a reader looks for first."""
    assert isinstance(cfg.task, LandmarksConfig)
    train, optim = cfg.train, cfg.optim
    rate = f"{optim.lr:g}, {optim.schedule}" + (f"; {optim.freeze} frozen" if optim.freeze else "")
    codec = cfg.task.codec.model_dump()
    sigma = "" if codec.get("sigma_px") is None else f", σ {codec['sigma_px']:g} px of {cfg.data.image_size}"
    average = "none" if train.ema is None else f"decay {train.ema.decay:g}"
    network = cfg.model.describe(cfg.data.image_size)
    length = f"{train.duration} × {train.global_batch_size}"
    validation = "none" if cfg.data.validation_split is None else cfg.data.validation_split
    return [network, length, rate, f"{codec['kind']}{sigma}", str(cfg.task.views), average, validation]


def differing(study: Study) -> list[str]:
    """A sentence per row whose recipe depends on the number of labels: every setting that does."""
    lines = []
    for start in study.starts:
        found = recipes(study, start)
        changes: dict[str, Any] = {}
        for other in found[1:]:
            changes |= {key: None for key, *_ in diff_runs(found[0].cfg, other.cfg) if key not in OWN_KEYS}
        if changes:
            settings = "; ".join(f"{key}: {_values(key, found)}" for key in changes)
            lines.append(f"{study.title(start)}: {settings}.")
    return lines


def mixed(study: Study) -> list[str]:
    """A sentence per cell of the table whose runs were not trained alike: its mean is over different settings."""
    lines = []
    for start in study.starts:
        for labels in study.shots:
            runs = study.select(start, labels)
            found = [(run, *_settings(run)) for run in runs if (run.home / "config.yaml").is_file()]
            first = next(iter(found), None)
            changes: dict[str, list[str]] = {}
            for run, cfg, data in found[1:]:
                assert first is not None
                rows = [row for row in diff_runs(first[1], cfg) if row[0] not in (*MAY_CHANGE, *OWN_KEYS)]
                rows += [("packed data", first[2], data)] if None not in (data, first[2]) and data != first[2] else []
                for key, there, here in rows:
                    told = f"{key} {_shown(there)} and {_shown(here)}"
                    changes.setdefault(told, []).append(str(run.results["seed"]))
            if changes:
                told = "; ".join(f"{text} (seed {', '.join(seeds)})" for text, seeds in changes.items())
                lines.append(
                    f"Not one recipe: the {len(runs)} runs of “{study.title(start)}” with {_or([labels])} differ in "
                    f"{told}; their mean and spread are of different things."
                )
    return lines


def _settings(run: Run) -> tuple[RunConfig, str | None]:
    """The run file of a run, and what it learnt from."""
    return load_stored(run.home), (read_json(run.home / "run.json") or {}).get("fingerprint")


def _values(key: str, found: list[Recipe]) -> str:
    """`3 with 1, 5 labels, 1.5 with 10`: the values of a setting and the numbers of labels that had them."""
    values: dict[str, tuple[int, ...]] = {}
    for recipe in found:
        text = _shown(_at(recipe.cfg.model_dump(mode="json"), key))
        values[text] = (*values.get(text, ()), *recipe.labels)
    return ", ".join(f"{text} with {_or(sorted(set(labels)))}" for text, labels in values.items())


def _at(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where a section of it is not there."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def _or(labels: Sequence[int]) -> str:
    """`1, 5 or 10 labels`."""
    most = str(labels[-1])
    words = f"{', '.join(map(str, labels[:-1]))} or {most}" if len(labels) > 1 else most
    return f"{words} label{'' if words == '1' else 's'}"
