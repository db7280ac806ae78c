"""A run goes on where its data, its starting weights or its own directory lie elsewhere than when it began."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from rich.console import Console

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError, DataError, RunConflictError
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.sweep.run import run_sweep
from tests.sweep.sweeps import write_sweep

Maker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the same shape, of other patients."""
    out = tmp_path_factory.mktemp("others") / "skulls"
    pack(
        "skull",
        out,
        PackSettings(kind="phantom", size=32, counts={"train": 12, "val": 4, "test": 6}, seed=8),
        workers=1,
    )
    return out


def copied(path: Path, folder: Path) -> str:
    return str(shutil.copytree(path, folder / path.name, dirs_exist_ok=True))


def moves(out: Path) -> list[tuple[str, Any, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [(line["key"], line["was"], line["now"]) for line in lines if line["event"] == "run.moved"]


def test_the_same_packs_elsewhere_are_the_same_run_and_others_are_not(
    tmp_path: Path, packed_phantoms: Path, others: Path, pretraining: Maker, parallel: Parallel
) -> None:
    pool = {"path": [str(packed_phantoms), str(others)], "protect": [str(others)]}
    execute(pretraining(data=pool), tmp_path / "run", parallel=parallel)
    moved = {
        key: [copied(Path(path), tmp_path / f"scratch-{Path(path).parent.name}") for path in paths]
        for key, paths in pool.items()
    }
    results = execute(pretraining(data=moved, train={"duration": 5}), tmp_path / "run", parallel=parallel)
    assert results["train"]["steps"] == 5
    assert moves(tmp_path / "run") == [(f"data.{key}", pool[key], moved[key]) for key in ("path", "protect")]
    for wrong in (
        moved | {"path": moved["path"][::-1]},
        moved | {"path": [moved["path"][0], moved["path"][0]]},
        moved | {"protect": []},
        moved | {"protect": [str(packed_phantoms)]},
    ):
        with pytest.raises(RunConflictError, match=r"another run: data\.(path|protect): there \["):
            execute(pretraining(data=wrong, train={"duration": 6}), tmp_path / "run", parallel=parallel)
    gone = moved | {"path": [str(tmp_path / "gone")]}
    with pytest.raises(DataError, match=r"gone is not there \(no manifest\.json\)"):
        execute(pretraining(data=gone, train={"duration": 6}), tmp_path / "run", parallel=parallel)


def test_a_protected_set_that_was_made_anew_in_its_place_is_refused(
    tmp_path: Path, packed_phantoms: Path, others: Path, pretraining: Maker, parallel: Parallel
) -> None:
    data = {"path": str(packed_phantoms), "protect": copied(others, tmp_path)}
    execute(pretraining(data=data), tmp_path / "run", parallel=parallel)
    shutil.rmtree(data["protect"])
    settings = PackSettings(kind="phantom", size=32, counts={"train": 2, "test": 2}, seed=9)
    pack("skull", Path(data["protect"]), settings, workers=1)
    with pytest.raises(DataError, match=r"dataset of data\.protect changed since .*run was started: was \w+, now \w+;"):
        execute(pretraining(data=data, train={"duration": 5}), tmp_path / "run", parallel=parallel)


def test_a_run_begun_before_packs_were_noted_one_by_one_goes_on_too(
    tmp_path: Path, packed_phantoms: Path, pretraining: Maker, parallel: Parallel
) -> None:
    execute(pretraining(), tmp_path / "run", parallel=parallel)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({key: facts[key] for key in facts if key != "packs"}))
    there = copied(packed_phantoms, tmp_path)
    cfg = pretraining(data={"path": there}, train={"duration": 4})
    assert execute(cfg, tmp_path / "run", parallel=parallel)["train"]["steps"] == 4


@pytest.mark.parametrize("kind", ["run", "file"])
def test_starting_weights_are_known_by_what_they_are(
    tmp_path: Path, pretraining: Maker, parallel: Parallel, kind: str
) -> None:
    for seed, name in ((0, "parent"), (1, "other")):
        execute(pretraining(train={"duration": 1}, seed=seed), tmp_path / name, parallel=parallel)
        safetensors.torch.save_file(load_weights(tmp_path / name, "ema")[0], tmp_path / f"{name}.safetensors")
    suffix = "" if kind == "run" else ".safetensors"

    def cfg(weights: str, length: int) -> RunConfig:
        return pretraining(init={"weights": str(tmp_path / f"{weights}{suffix}")}, train={"duration": length})

    execute(cfg("parent", 2), tmp_path / "run", parallel=parallel)
    (tmp_path / f"parent{suffix}").rename(tmp_path / f"renamed{suffix}")
    assert execute(cfg("renamed", 4), tmp_path / "run", parallel=parallel)["train"]["steps"] == 4
    assert [key for key, *_ in moves(tmp_path / "run")] == ["init.weights"]
    with pytest.raises(RunConflictError, match=r"init\.weights: there .*renamed.*, here .*other"):
        execute(cfg("other", 5), tmp_path / "run", parallel=parallel)
    with pytest.raises(CheckpointError, match=r"gone.* does not exist"):
        execute(cfg("gone", 5), tmp_path / "run", parallel=parallel)


def test_a_sweep_whose_packs_and_folder_moved_repeats_no_cell(
    tmp_path: Path, packed_phantoms: Path, pretraining: Maker, parallel: Parallel
) -> None:
    execute(pretraining(train={"duration": 1}), tmp_path / "old" / "parent", parallel=parallel)
    start = {"scratch": None, "ddpm": str(tmp_path / "old" / "parent")}
    file = write_sweep(tmp_path, packed_phantoms, shots=[1], seeds=[0], start=start)
    out = tmp_path / "old" / "sweep"
    assert run_sweep(load_sweep(file, out=out), console=Console(file=io.StringIO())) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    there = copied(packed_phantoms, tmp_path / "scratch")
    words = [f"data.path={there}", f"start.ddpm={tmp_path / 'new' / 'parent'}"]
    sweep = load_sweep(file, words, out=tmp_path / "new" / "sweep")
    assert [cell.state() for cell in sweep.cells] == ["done", "done"]
    other = load_sweep(file, [*words, "optim.lr=0.5"], out=tmp_path / "new" / "sweep")
    assert not any(cell.is_done() for cell in other.cells)
