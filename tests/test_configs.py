"""Every YAML file that ships validates, says what it is for, and says how to use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import dump_run, load_run, load_yaml, validate
from ddpm_lmk.demo import DemoShards
from ddpm_lmk.launcher import LaunchFile
from ddpm_lmk.sweep import load_sweep

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("launch/*.yaml")])
MACHINES = {"precision", "compile", "threads", "workers", "cuda_graphs"}
FRAGMENT_BASE = "data: {path: shards}\ntask: {kind: landmarks}\n"


def load(path: Path, tmp_path: Path) -> None:
    """Check a file as what it is: launch file, sweep, demo shards, run, or fragment to be named by `extends`."""
    data = load_yaml(path)
    if path.parent.name == "launch":
        validate(LaunchFile, data, source=str(path))
    elif path.name == "shards.yaml":
        validate(DemoShards, data, source=str(path))
    elif "grids" in data:
        has_path = "packs" in data or _has_path(path.parent / data["run"])
        for scale in (None, *data.get("scales", {})):
            assert load_sweep(path, [] if has_path else ["data.path=shards"], scale=scale).cells
    elif "task" in data:
        run = load_run(path, [] if _has_path(path) else ["data.path=shards"])
        (tmp_path / "written.yaml").write_text(dump_run(run))
        assert load_run(tmp_path / "written.yaml") == run
    else:
        (tmp_path / "run.yaml").write_text(f"extends: {path}\n{FRAGMENT_BASE}")
        assert isinstance(load_run(tmp_path / "run.yaml"), RunConfig)


def _has_path(run_file: Path) -> bool:
    return "path" in load_yaml(run_file).get("data", {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_file_is_valid(path: Path, tmp_path: Path) -> None:
    load(path, tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_file_opens_with_what_it_is_for(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_files_were_found() -> None:
    assert {"smoke", "demo"} <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_file_leaves_to_the_machine_what_is_the_machines(path: Path) -> None:
    """A processor without bf16 emulates it, 14 times slower; what the paper did is no such choice."""
    if path.parent.name != "paper":
        assert [(key, value) for key, value in _settings(load_yaml(path)) if key in MACHINES and value != "auto"] == []


def _settings(section: object) -> Iterator[tuple[str, object]]:
    """Every setting at any depth with the last word of its key, which `set` of a sweep writes with dots."""
    if isinstance(section, dict):
        for key, value in section.items():
            yield str(key).rpartition(".")[2], value
            yield from _settings(value)
    elif isinstance(section, list):
        for value in section:
            yield from _settings(value)


def test_cpu_recipes_of_ones_own_films_are_those_of_isbi() -> None:
    for stage in ("pretrain", "finetune"):
        own = load_run(ROOT / f"configs/{stage}/cpu.yaml", ["data.path=shards"])
        isbi = load_run(ROOT / f"configs/{stage}/isbi_cpu.yaml", ["data.path=shards", f"name={own.name}"])
        assert isbi.model_copy(update={"evaluate": own.evaluate}) == own
        assert own.data.splits == ("train",)
    assert own.evaluate.split == "test"
