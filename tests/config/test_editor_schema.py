"""Schemas for editors: every shipped file passes, and mistakes that loading refuses are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ddpm_lmk.config import RunConfig, yaml
from ddpm_lmk.config.editor_schema import editor_schema
from ddpm_lmk.config.load import load_yaml
from ddpm_lmk.launcher import LaunchFile
from ddpm_lmk.sweep import SweepFile

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("launch/*.yaml")])
MODELS = {"run": RunConfig, "sweep": SweepFile, "launch": LaunchFile}


@pytest.fixture(scope="module")
def checkers() -> dict[str, jsonschema.Draft202012Validator]:
    checkers = {}
    for name, model in MODELS.items():
        schema = editor_schema(model)
        jsonschema.Draft202012Validator.check_schema(schema)
        checkers[name] = jsonschema.Draft202012Validator(schema)
    return checkers


def as_editors_read(value: Any) -> Any:
    """YAML 1.2 of editors has `1e-4` for a number; this package's loader leaves it to the schema."""
    if isinstance(value, dict):
        return {key: as_editors_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_editors_read(item) for item in value]
    try:
        return float(value) if isinstance(value, str) and "e-" in value else value
    except ValueError:
        return value


def kind_of(path: Path) -> str:
    return "launch" if path.parent.name == "launch" else "sweep" if "grids" in load_yaml(path) else "run"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_files_pass(path: Path, checkers: dict[str, jsonschema.Draft202012Validator]) -> None:
    if path.name == "shards.yaml":
        pytest.skip("of the demo alone")
    content = as_editors_read(yaml.parse_mapping(path.read_text(), str(path))[0])
    checkers[kind_of(path)].validate(content)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("run", "train: {durration: 4}"),  # unknown
        ("run", "optim: {lr: fast}"),  # another type
        ("run", "optim: {lr: 0}"),  # out of bounds
        ("run", "train: {duration: 4 weeks}"),
        ("run", "train: {duration: -4}"),
        ("run", "model: {kind: resnet}"),
        ("run", "task: {kind: denoise, codec: {kind: disc}}"),  # of another kind
        ("run", "task: {codec: {kind: disc, decode_radius_px: 3}}"),
        ("run", "data: {shots: true}"),
        ("run", "data: [shards]"),
        ("run", "grids: []"),  # a sweep file
        ("run", "extends: {file: base.yaml}"),
        ("sweep", "grids: []"),
        ("sweep", "grids: [{shots: [0], start: {scratch: null}}]"),
        ("sweep", "grids: [{shots: [1], start: {}}]"),
        ("sweep", "set: {optim.rate: 1}"),
        ("sweep", "stages: {ddpm: {pack: [a]}}"),
        ("sweep", "scales: {small: {shot: [1]}}"),
        ("launch", "device: tpu"),
        ("launch", "processes: 0"),
    ],
)
def test_mistakes_are_refused(kind: str, text: str, checkers: dict[str, jsonschema.Draft202012Validator]) -> None:
    content = yaml.parse_mapping(text, "text")[0]
    assert not checkers[kind].is_valid(content)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("run", "extends: [base.yaml, configs/pretrain/base.yaml]\ntrain: {duration: 2 epochs}"),  # a part
        ("run", "data: {path: shards, splits: 2024}"),  # one for a list, a number for text
        ("run", "data: {path: [a, b], validation_split: null}"),
        ("run", "task: {codec: {sigma_px: 3}}"),  # whose kind is in what is extended
        ("run", "runtime: {log_every: 100, trackers: [tensorboard]}"),
        ("run", "train: {ema: null, micro_batch: auto, compile: auto}"),
        ("sweep", "shots: [1, null]\nset: {train.ema: null, model.width: 8}\nscales: {small: {shots: [1]}}"),
        ("launch", "device: cuda\nprocesses: 8"),
    ],
)
def test_what_loading_takes_passes(kind: str, text: str, checkers: dict[str, jsonschema.Draft202012Validator]) -> None:
    checkers[kind].validate(yaml.parse_mapping(text, "text")[0])


def test_keys_say_what_they_are() -> None:
    schema = editor_schema(RunConfig)
    lr = schema["$defs"]["OptimConfig"]["properties"]["lr"]
    assert lr["exclusiveMinimum"] == 0
    assert "learning rate" in lr["description"]
    assert lr["default"] == 1e-4
