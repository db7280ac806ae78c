"""Sweeps of several methods: rows with run files of their own, packs by name, pre-training stages, scales."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddpm_lmk.config.load import load_run
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.launcher import Placement
from ddpm_lmk.sweep import Sweep, load_sweep, plan_table
from ddpm_lmk.sweep.check import check_sweep
from ddpm_lmk.sweep.run import run_sweep
from ddpm_lmk.system.files import read_json
from tests.sweep.test_sweep import torn_weights

NETWORK = "model: {width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}\n"
COMMON = NETWORK + "data: {path: nowhere, image_size: 32}\nruntime: {workers: 0, checkpoint_every: 100 steps}\n"
TUNE = COMMON + "task: {kind: landmarks}\nevaluate: {batch: 4}\n"
LEARN = COMMON + "task: {kind: denoise}\n"
SWEEP: dict[str, Any] = {
    "name": "table",
    "runs": {"ours": "ours.yaml", "other": "other.yaml"},
    "packs": {"ceph": "shards/ceph", "hand": "shards/hand"},
    "stages": {
        "ddpm": {"run": "learn.yaml", "packs": ["hand", "ceph"], "set": {"train.snapshot_every": "2 steps"}},
        "elsewhere": {"run": "learn.yaml", "out": "runs/shared", "set": {"seed": 3}},
    },
    "shots": [1, 2],
    "seeds": [0],
    "grids": [
        {"run": "ours", "pack": "ceph", "start": {"scratch": None, "early": "stage:ddpm@2", "late": "stage:ddpm"}},
        {"run": "other", "pack": "hand", "start": {"disc": "stage:elsewhere"}, "shots": [None], "seeds": [5]},
    ],
    "rows": {"disc": {"title": "Discs", "paper": "Our method"}},
    "scales": {"small": {"runs": {"ours": "other.yaml"}, "seeds": [1], "stages": {"ddpm": {"set": {"seed": 9}}}}},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The sweep above, with its run files beside it."""
    train = "train: {duration: 4 steps, global_batch_size: 2}\n"
    (tmp_path / "ours.yaml").write_text("name: ours\n" + TUNE + train)
    (tmp_path / "other.yaml").write_text("name: other\n" + TUNE + train.replace("4 steps", "3 steps"))
    (tmp_path / "learn.yaml").write_text("name: learn\n" + LEARN + train)
    return write(tmp_path, SWEEP)


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "sweep.yaml").write_text(json.dumps(content))
    return folder / "sweep.yaml"


def cells(sweep: Sweep) -> dict[str, Any]:
    return {cell.name: cell.cfg for cell in sweep.cells}


def test_a_row_has_a_run_file_a_pack_and_weights_of_its_own(file: Path) -> None:
    sweep = load_sweep(file, out=Path("out"))
    found = cells(sweep)
    assert len(found) == 7
    assert found["scratch-k1-s0"].data.path == ("shards/ceph",)
    assert found["scratch-k1-s0"].train.duration.steps(2, 1, 1) == 4
    assert found["disc-kall-s5"].data.path == ("shards/hand",)
    assert found["disc-kall-s5"].train.duration.steps(2, 1, 1) == 3
    assert found["disc-kall-s5"].init.weights == "runs/shared"
    assert found["late-k2-s0"].init.weights == "out/stages/ddpm"
    assert found["early-k2-s0"].init.weights == "out/stages/ddpm/snapshots/step-00000002"
    stages = {stage.name: stage for stage in sweep.stages}
    assert (stages["ddpm"].folder, stages["elsewhere"].folder) == (Path("out/stages/ddpm"), Path("runs/shared"))
    assert (stages["ddpm"].cfg.data.path, stages["elsewhere"].cfg.seed) == (("shards/hand", "shards/ceph"), 3)


def split_by_shots(file: Path, *shots: list[int | None]) -> Path:
    """Grids of one start, each with numbers of labels and a width of the target of its own."""
    own = {"run": "ours", "pack": "ceph", "start": {"late": "stage:ddpm"}}
    codecs = [{"task.codec.kind": "spatial", "task.codec.sigma_px": 4 - i} for i in range(len(shots))]
    grids = [own | {"shots": each, "set": codec} for each, codec in zip(shots, codecs)]
    return write(file.parent, SWEEP | {"grids": grids, "rows": {}, "seeds": [0, 1]})


def test_few_and_many_labels_of_a_row_may_follow_recipes_of_their_own(file: Path) -> None:
    file = split_by_shots(file, [1, 2], [5])
    sigma = {name: cfg.task.codec.sigma_px for name, cfg in cells(load_sweep(file)).items()}
    assert sigma == {f"late-k{k}-s{seed}": 3.0 if k == 5 else 4.0 for k in (1, 2, 5) for seed in (0, 1)}
    console = Console(file=io.StringIO(), width=150)
    console.print(plan_table(load_sweep(file), None))
    assert console.file.getvalue().count("late-k5-s") == 2  # type: ignore[attr-defined]
    assert set(cells(load_sweep(file, ["shots=[5, 1]", "seeds=0"]))) == {"late-k1-s0", "late-k5-s0"}
    assert set(cells(load_sweep(file, ["shots=5"]))) == {"late-k5-s0", "late-k5-s1"}
    with pytest.raises(ConfigError, match="no grid of late has 7; its grids have: 1, 2, 5"):
        load_sweep(file, ["shots=[1, 7]"])


def test_a_long_plan_has_a_row_per_recipe_and_says_what_is_missing(file: Path) -> None:
    seeds = f"seeds={list(range(9))}"
    sweep = load_sweep(split_by_shots(file, [1, 2], [5]), [seeds, "stage.ddpm=weights/none"], out=Path("out"))
    console = Console(file=io.StringIO(), width=200)
    table = plan_table(sweep, None)
    console.print(table)
    lines = [line for line in console.file.getvalue().splitlines() if "late" in line]  # type: ignore[attr-defined]
    assert table.row_count == 2
    for line, words in zip(lines, (("1, 2", "18", "144", "missing: weights/none"), ("│ 5 ", "9", "72", "pending"))):
        assert all(word in line for word in words), line
    with pytest.raises(
        DataError, match=r"shards/ceph is not there \(no manifest\.json\); .* \(late-k1-s0 and 26 more\); packs\.NAME="
    ):
        check_sweep(sweep, Path("out"), Placement("cpu", 1))


def test_recipes_of_a_row_that_claim_the_same_labels_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="two grids make the cell late-k2-s0; give them other shots, or their starts"):
        load_sweep(split_by_shots(file, [1, 2], [2, 5]))


def test_a_scale_is_laid_over_the_file(file: Path) -> None:
    sweep = load_sweep(file, scale="small")
    assert cells(sweep)["scratch-k2-s1"].train.duration.steps(2, 1, 1) == 3
    assert sweep.stages[0].cfg.seed == 9
    assert sweep.stages[0].cfg.train.snapshot_every is not None
    with pytest.raises(ConfigError, match=r"no scale 'tiny'; it has: small"):
        load_sweep(file, scale="tiny")


def test_stages_nobody_starts_from_are_not_run(file: Path) -> None:
    assert [stage.name for stage in load_sweep(file, ["only=[disc]"]).stages] == ["elsewhere"]
    assert [stage.name for stage in load_sweep(file, ["without=[early,late,disc]"]).stages] == []
    given = load_sweep(file, ["stage.ddpm=runs/mine", "packs.ceph=shards/other"])
    assert [stage.name for stage in given.stages] == ["elsewhere"]
    assert cells(given)["early-k1-s0"].init.weights == "runs/mine/snapshots/step-00000002"
    assert cells(given)["early-k1-s0"].data.path == ("shards/other",)


def test_the_command_line_reaches_into_a_stage(file: Path) -> None:
    sweep = load_sweep(file, ["stages.ddpm.train.duration=9 steps", "only=[late]"])
    assert sweep.stages[0].cfg.train.duration.steps(2, 1, 1) == 9
    with pytest.raises(ConfigError, match="NAME of ddpm, elsewhere"):
        load_sweep(file, ["stages.isbi.train.duration=9 steps"])


def test_a_stage_is_no_fine_tuning(file: Path) -> None:
    content = json.loads(file.read_text())
    content["stages"]["ddpm"] = {"run": "ours"}
    with pytest.raises(ConfigError, match="stage ddpm needs a pre-training run"):
        load_sweep(write(file.parent, content))


def test_one_command_pre_trains_what_is_missing_and_a_failed_stage_fails_its_own_cells_only(
    file: Path, tmp_path: Path, packed_phantoms: Path
) -> None:
    words = [f"packs.ceph={packed_phantoms}", f"packs.hand={packed_phantoms}", "shots=[2]", "without=[scratch,late]"]
    content = json.loads(file.read_text())
    content["stages"]["ddpm"]["packs"] = ["ceph"]
    torn = torn_weights(tmp_path / "torn", load_run(file.parent / "learn.yaml"))
    content["stages"]["elsewhere"] |= {"out": None, "packs": ["ceph"], "set": {"init.weights": str(torn)}}
    out = tmp_path / "out"
    sweep = load_sweep(write(tmp_path, content), words, out=out)
    console = Console(file=io.StringIO(), width=200)
    assert run_sweep(sweep, out, processes=1, console=console) == 1
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stage ddpm done" in said, said
    assert "disc-k2-s5: stage elsewhere ended with exit code 4" in said, said
    results = read_json(out / "cells" / "early-k2-s0" / "results.json")
    assert results is not None
    assert results["start"]["weights"] == str(out / "stages" / "ddpm" / "snapshots" / "step-00000002")
    summary = read_json(out / "sweep.json")
    assert summary is not None
    assert summary["rows"] == {"disc": {"title": "Discs", "paper": "Our method"}}
    assert {cell["cell"]: cell["status"] for cell in summary["cells"]} == {
        "early-k2-s0": "done",
        "disc-k2-s5": "failed",
    }
    again = Console(file=io.StringIO(), width=200)
    assert run_sweep(load_sweep(file, [*words, "only=[early]"], out=out), out, console=again) == 0
    assert "stage" not in again.file.getvalue()  # type: ignore[attr-defined]
    assert plan_table(sweep, out).row_count == 4
