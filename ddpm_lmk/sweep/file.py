"""A sweep file as it is written: rows of a table, the run files they use, and the pre-training they start from.

    name: ceph
    runs: {ours: ../finetune/ceph.yaml}       # relative to this file; `run: FILE` alone does where all cells share one
    packs: {ceph: shards/ceph, hand: shards/hand}               # datasets, relative to the current folder
    stages:                                   # pre-training runs; those that are missing are run first
      ddpm: {run: ../pretrain/ceph.yaml, packs: [ceph]}
    shots: [1, 5, 10]                         # null: all training images
    seeds: [0, 1, 2]
    grids:                                    # every combination of shots, seeds and start is a cell
      - {run: ours, pack: ceph, start: {scratch: null, ddpm: "stage:ddpm", early: "stage:ddpm@4000"}}
    rows:                                     # what reports call a start, and the row of the paper it stands beside
      ddpm: {title: DDPM pre-training, paper: Our method}
    scales:                                   # `--scale small`: laid over the file, lists replaced
      small: {runs: {ours: ../finetune/ceph_cpu.yaml}}

This module reads the file and the words of the command line; `expand` makes cells of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from ddpm_lmk.config import Section
from ddpm_lmk.config.load import load_yaml, validate
from ddpm_lmk.config.yaml import parse_word
from ddpm_lmk.errors import ConfigError

STAGE = "stage:"
# First parts of the words that change the sweep; any other word is a key of its run files.
OWN_KEYS = ("name", "run", "shots", "seeds", "start", "stage", "stages", "packs", "only", "without")

# Labels are parts of folder names and of `key=value` words.
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=40)]
Shots = tuple[Annotated[int, Field(ge=1)] | None, ...]
Seeds = tuple[Annotated[int, Field(ge=0)], ...]


class Grid(Section):
    """One block of a sweep: every combination of its three lists is a cell."""

    run: str | None = Field(None, description="fine-tuning run file or a name in `runs`; null: the sweep's `run`")
    pack: Label | tuple[Label, ...] = Field(
        (), description="name in `packs` the cells learn from, several for a mixture; empty: as the run file"
    )
    shots: Shots | None = Field(None, min_length=1, description="labelled images (null in it: all); null: the sweep's")
    seeds: Seeds | None = Field(None, min_length=1, description="root of all randomness of a cell; null: the sweep's")
    start: dict[Label, str | None] = Field(
        min_length=1, description="label and starting weights; null: random weights; stage:NAME[@STEP]: from a stage"
    )
    draw: Literal["first", "random", "listed"] | None = Field(
        None, description="how shots are chosen; null: as the run file"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="dotted run keys for this grid")

    @property
    def packs(self) -> tuple[str, ...]:
        """Names of datasets."""
        return (self.pack,) if isinstance(self.pack, str) else self.pack


class Stage(Section):
    """A pre-training run that cells start from; run before them where it is not finished."""

    run: str = Field(description="pre-training run file or a name in `runs`")
    packs: tuple[Label, ...] | None = Field(None, min_length=1, description="names in `packs`; null: as the run file")
    out: str | None = Field(None, description="run directory; null: OUT/stages/NAME")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted run keys for this stage")


class RowText(Section):
    """What a report says about a start."""

    title: str | None = Field(None, max_length=80, description="name of the row; null: the label")
    paper: str | None = Field(None, description="method of the paper's tables it stands beside; null: none")
    note: str | None = Field(None, max_length=400, description="footnote")


class SweepFile(Section):
    """A sweep file as written."""

    name: Label = Field(description="shown in reports")
    run: str | None = Field(None, description="fine-tuning run file, relative to the sweep file")
    runs: dict[Label, str] = Field(default_factory=dict, description="run files by name, relative to the sweep file")
    packs: dict[Label, str] = Field(default_factory=dict, description="folders of shards by name")
    stages: dict[Label, Stage] = Field(default_factory=dict, description="pre-training runs by name")
    shots: Shots | None = Field(None, min_length=1, description="labelled images of grids that give none")
    seeds: Seeds | None = Field(None, min_length=1, description="seeds of grids that give none")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted run keys for all cells")
    grids: tuple[Grid, ...] = Field(min_length=1)
    rows: dict[Label, RowText] = Field(default_factory=dict, description="what reports say about a start, by label")
    scales: dict[Label, dict[str, Any]] = Field(default_factory=dict, description="variants for --scale")

    @model_validator(mode="after")
    def _check_names(self) -> SweepFile:
        packs = [pack for grid in self.grids for pack in grid.packs]
        packs += [pack for stage in self.stages.values() for pack in stage.packs or ()]
        starts = [start for grid in self.grids for start in grid.start.values()]
        stages = [stage_of(start)[0] for start in starts if start is not None and is_stage(start)]
        for what, used, known in (
            ("packs", packs, self.packs),
            ("stages", stages, self.stages),
            ("start (of any grid)", self.rows, self.labels),
        ):
            unknown = [name for name in used if name not in known]
            if unknown:
                raise ValueError(f"{unknown[0]} is used, but {what} has only: {', '.join(sorted(known)) or 'nothing'}")
        return self

    @property
    def labels(self) -> list[str]:
        """Labels of all starts."""
        return list(dict.fromkeys(label for grid in self.grids for label in grid.start))


@dataclass(frozen=True)
class ReadSweep:
    """A sweep file at a scale, with the words of the command line that are for it applied.

    Attributes:
        given_stages: weights in place of stages (`stage.NAME=PATH`), by name.
        run_words: the words that are for run files.
    """

    file: SweepFile
    given_stages: dict[str, str] = field(default_factory=dict)
    run_words: list[str] = field(default_factory=list)


def is_stage(start: str) -> bool:
    """Does a start come from a stage of the sweep?"""
    return start.startswith(STAGE)


def stage_of(start: str) -> tuple[str, int | None]:
    """Stage and step of `stage:NAME[@STEP]`; without a step the stage's final weights are meant."""
    name, at, step = start.removeprefix(STAGE).partition("@")
    if at and not step.isdecimal():
        raise ValueError(f"{start}: wanted {STAGE}NAME or {STAGE}NAME@STEP")
    return name, int(step) if at else None


def scales_of(path: Path) -> list[str]:
    """The variants a sweep file has."""
    return list(load_yaml(path).get("scales") or {})


def read_sweep(path: str | Path, words: list[str], scale: str | None) -> ReadSweep:
    """Read a sweep file and apply a scale and the words of the command line to it; raises `ConfigError`."""
    data = load_yaml(path)
    if scale is not None:
        _apply_scale(data, path, scale)
    given_stages: dict[str, str] = {}
    chosen: dict[str, list[str]] = {}
    run_words = [word for word in words if not _apply_word(data, word, given_stages, chosen)]
    sweep = validate(SweepFile, data, source=str(path))
    for name in given_stages:
        if name not in sweep.stages:
            raise ConfigError(f"command line: stage.{name}: there is no such stage; known: {', '.join(sweep.stages)}")
    return ReadSweep(_choose_starts(sweep, chosen), given_stages, run_words)


def _apply_scale(data: dict[str, Any], path: str | Path, scale: str) -> None:
    scales = data.get("scales") or {}
    if scale not in scales:
        raise ConfigError(f"{path} has no scale {scale!r}; it has: {', '.join(scales) or 'none'}")
    _merge(data, scales[scale])
    # A scale may replace the grids; texts about starts that are gone would then be refused as unknown labels.
    labels = {label for grid in _grids(data) for label in grid.get("start") or {}}
    data["rows"] = {label: text for label, text in (data.get("rows") or {}).items() if label in labels}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    """Merge mappings key by key, in place; lists and values are replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _apply_word(data: dict[str, Any], word: str, given_stages: dict[str, str], chosen: dict[str, list[str]]) -> bool:
    """Apply a word that is the sweep's own; False leaves it to the run files."""
    key, equals, text = word.partition("=")
    section, _, label = key.partition(".")
    if not equals or section not in OWN_KEYS:
        return False
    value = parse_word(text, f"command line: {key}")
    match section:
        case "only" | "without":
            chosen[section] = [str(each) for each in (value if isinstance(value, list) else [value])]
        case "stage":
            given_stages[label] = str(value)
        case "stages":
            _override_stage(data, key, label, value)
        case "packs":
            data.setdefault("packs", {})[label] = value
        case "start":
            _override_start(data, key, label, value)
        case "shots" | "seeds":
            _override_list(data, key, value if isinstance(value, list) else [value])
        case _:
            data[key] = value
    return True


def _grids(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Grids of a file that has not been validated yet; what is no mapping is refused later, with its line."""
    return [grid for grid in data.get("grids") or [] if isinstance(grid, dict)]


def _override_list(data: dict[str, Any], key: str, values: list[Any]) -> None:
    """`shots=[...]` or `seeds=[...]`, for all grids.

    Grids may share a start and split the numbers of labels among them, each with a recipe of its own (few labels, many
    labels). Giving both all of `shots` would make every cell twice, so each keeps those of its numbers that are asked.
    """
    data[key] = values
    grids = _grids(data)
    names = [label for grid in grids for label in grid.get("start") or {}]
    for grid in grids:
        shared = [label for label in grid.get("start") or {} if names.count(label) > 1]
        if key != "shots" or not shared or not isinstance(grid.get(key), list):
            grid.pop(key, None)  # so that the sweep's own list holds for it
            continue
        known = [k for other in grids if shared[0] in (other.get("start") or {}) for k in other.get(key) or values]
        unknown = [k for k in values if k not in known]
        if unknown:
            listed = ", ".join(map(str, known))
            raise ConfigError(f"command line: shots: no grid of {shared[0]} has {unknown[0]}; its grids have: {listed}")
        grid[key] = [k for k in grid[key] if k in values]
    data["grids"] = [grid for grid in data.get("grids") or [] if grid not in grids or grid.get(key) != []]


def _override_stage(data: dict[str, Any], key: str, label: str, value: Any) -> None:
    """`stages.NAME.RUN.KEY=value`: a setting of one pre-training run."""
    name, _, setting = label.partition(".")
    stages = data.get("stages") or {}
    if name not in stages or not setting:
        raise ConfigError(f"command line: {key}: wanted stages.NAME.KEY=VALUE, NAME of {', '.join(stages) or 'none'}")
    stages[name].setdefault("set", {})[setting] = value


def _override_start(data: dict[str, Any], key: str, label: str, value: Any) -> None:
    changed = [grid for grid in _grids(data) if label in (grid.get("start") or {})]
    if not changed:
        known = ", ".join(dict.fromkeys(name for grid in _grids(data) for name in grid.get("start") or {}))
        raise ConfigError(f"command line: {key}: no grid has a start of that label; known: {known}")
    for grid in changed:
        grid["start"][label] = value


def _choose_starts(sweep: SweepFile, chosen: dict[str, list[str]]) -> SweepFile:
    """The sweep with the starts of `only=[...]`, less those of `without=[...]`."""
    for key, labels in chosen.items():
        for label in labels:
            if label not in sweep.labels:
                known = ", ".join(sorted(sweep.labels))
                raise ConfigError(f"command line: {key}: {label} is no start; known: {known}")
    left = set(chosen.get("only", sweep.labels)) - set(chosen.get("without", []))
    starts = [{label: weights for label, weights in grid.start.items() if label in left} for grid in sweep.grids]
    grids = tuple(grid.model_copy(update={"start": start}) for grid, start in zip(sweep.grids, starts) if start)
    if not grids:
        raise ConfigError("command line: only= and without= leave no cell; name at least one start")
    # Texts about starts that were left out are no mistake.
    rows = {label: text for label, text in sweep.rows.items() if label in left}
    return sweep.model_copy(update={"grids": grids, "rows": rows})
