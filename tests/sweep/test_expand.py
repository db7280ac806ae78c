"""What a sweep file and the words of the command line expand to, and how it is shown before it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError
from ddpm_lmk.launcher import Placement
from ddpm_lmk.sweep import Sweep, load_sweep, plan_table
from ddpm_lmk.sweep.check import check_sweep
from tests.sweep.sweeps import text_of, write_content, write_run, write_sweep

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The sweep of several methods above, with its run files beside it."""
    write_run(tmp_path / "ours.yaml", duration="4 steps")
    write_run(tmp_path / "other.yaml")
    write_run(tmp_path / "learn.yaml", kind="denoise", duration="4 steps")
    return write_content(tmp_path, SWEEP)


def cells(sweep: Sweep) -> dict[str, RunConfig]:
    return {cell.name: cell.cfg for cell in sweep.cells}


def steps(cfg: RunConfig) -> int:
    return cfg.train.duration.steps(2, 1, 1)


def test_a_sweep_is_every_combination_of_its_grids_longest_first(tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path, duration="30 epochs", shots=[1, 10, 100], seeds=[0, 7], start={"a": None, "b": "runs/p"}
    )
    sweep = load_sweep(file)
    assert len(sweep.cells) == 12
    assert {cell.name for cell in sweep.cells[:4]} == {"a-k100-s0", "a-k100-s7", "b-k100-s0", "b-k100-s7"}
    cell = next(cell for cell in sweep.cells if cell.name == "b-k10-s7")
    assert (cell.cfg.data.shots, cell.cfg.seed, cell.cfg.init.weights, cell.cfg.name) == (10, 7, "runs/p", "b-k10-s7")
    assert (cell.steps, cell.images) == (150, 300)  # 30 epochs of 10 images in batches of 2


def test_what_is_set_grows_more_specific_towards_the_command_line(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, set={"optim.lr": 0.01, "train.precision": "fp32"}, draw="random")
    write_content(tmp_path, json.loads(file.read_text()) | {"set": {"optim.lr": 0.1, "optim.weight_decay": 0.5}})
    cfg = load_sweep(file).cells[0].cfg
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.train.precision, cfg.data.draw) == (0.01, 0.5, "fp32", "random")
    assert load_sweep(file, ["optim.lr=1e-5"]).cells[0].cfg.optim.lr == 1e-5


def test_shots_seeds_and_starts_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path), ["shots=[null, 3]", "seeds=5", "start.scratch=runs/other", "name=mine"])
    assert (sweep.name, sweep.out) == ("mine", Path("runs/mine"))
    assert {name: cfg.init.weights for name, cfg in cells(sweep).items()} == {
        "scratch-k3-s5": "runs/other",
        "scratch-kall-s5": "runs/other",
    }


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"shots": [0]}, [], "grids.0.shots.0=0"),
        ({"seeds": None}, [], "grids.0 has no seeds, and the sweep has none"),
        ({"start": {"a": "stage:ddpm"}}, [], "ddpm is used, but stages has only: nothing"),
        ({"pack": "ceph"}, [], "ceph is used, but packs has only: nothing"),
        ({"run": "gone.yaml"}, [], "run=gone.yaml: there is no file"),
        ({}, ["only=[other]"], "only: other is no start; known: scratch"),
        ({}, ["without=scratch"], "leave no cell"),
        ({}, ["stage.ddpm=runs/x"], "there is no such stage"),
        ({"shot": [1]}, [], "unknown key grids.0.shot; did you mean"),
        ({"start": {"a b": None}}, [], "start"),
        ({"seeds": [1, 1]}, [], "two grids make the cell scratch-k1-s1; give them other shots, or their starts"),
        ({"set": {"optim.learning_rate": 1}}, [], "unknown key optim.learning_rate"),
        ({}, ["start.isbi=runs/x"], "no grid has a start of that label; known: scratch"),
        ({}, ["run=elsewhere.yaml"], "there is no file"),
        ({}, ["data.shots=3"], "override shots="),
        ({}, ["task.kind=denoise", "data.shots=null"], "a sweep needs a fine-tuning run"),
    ],
)
def test_mistakes_in_a_sweep_are_one_line(
    tmp_path: Path, change: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(write_sweep(tmp_path, **change), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "scale", "message"),
    [
        (["stages.isbi.train.duration=9 steps"], None, "NAME of ddpm, elsewhere"),
        (["stages.ddpm.task.kind=landmarks"], None, "stage ddpm needs a pre-training run"),
        ([], "tiny", "no scale 'tiny'; it has: small"),
    ],
)
def test_mistakes_about_stages_and_scales_are_refused(
    file: Path, overrides: list[str], scale: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(file, overrides, scale=scale)


def test_a_row_has_a_run_file_a_dataset_and_weights_of_its_own(file: Path) -> None:
    sweep = load_sweep(file, out=Path("out"))
    found = cells(sweep)
    assert len(found) == 7
    assert (found["scratch-k1-s0"].data.path, steps(found["scratch-k1-s0"])) == (("shards/ceph",), 4)
    assert (found["disc-kall-s5"].data.path, steps(found["disc-kall-s5"])) == (("shards/hand",), 3)
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
    return write_content(file.parent, SWEEP | {"grids": grids, "rows": {}, "seeds": [0, 1]})


def test_few_and_many_labels_of_a_row_may_follow_recipes_of_their_own(file: Path) -> None:
    split_by_shots(file, [1, 2], [5])
    sigma = {name: cfg.task.codec.sigma_px for name, cfg in cells(load_sweep(file)).items()}  # type: ignore[union-attr]
    assert sigma == {f"late-k{k}-s{seed}": 3.0 if k == 5 else 4.0 for k in (1, 2, 5) for seed in (0, 1)}
    assert set(cells(load_sweep(file, ["shots=[5, 1]", "seeds=0"]))) == {"late-k1-s0", "late-k5-s0"}
    assert set(cells(load_sweep(file, ["shots=5"]))) == {"late-k5-s0", "late-k5-s1"}
    with pytest.raises(ConfigError, match="no grid of late has 7; its grids have: 1, 2, 5"):
        load_sweep(file, ["shots=[1, 7]"])
    with pytest.raises(ConfigError, match="two grids make the cell late-k2-s0; give them other shots, or their starts"):
        load_sweep(split_by_shots(file, [1, 2], [2, 5]))


def test_a_scale_is_laid_over_the_file(file: Path) -> None:
    sweep = load_sweep(file, scale="small")
    assert steps(cells(sweep)["scratch-k2-s1"]) == 3
    assert sweep.stages[0].cfg.seed == 9
    assert sweep.stages[0].cfg.train.snapshot_every is not None


def test_stages_nobody_starts_from_are_not_run(file: Path) -> None:
    assert [stage.name for stage in load_sweep(file, ["only=[disc]"]).stages] == ["elsewhere"]
    assert load_sweep(file, ["without=[early,late,disc]"]).stages == ()
    given = load_sweep(file, ["stage.ddpm=runs/mine", "packs.ceph=shards/other"])
    assert [stage.name for stage in given.stages] == ["elsewhere"]
    assert cells(given)["early-k1-s0"].init.weights == "runs/mine/snapshots/step-00000002"
    assert cells(given)["early-k1-s0"].data.path == ("shards/other",)
    assert steps(load_sweep(file, ["stages.ddpm.train.duration=9 steps", "only=[late]"]).stages[0].cfg) == 9


def test_a_dry_run_says_what_is_to_do_without_torch(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    code = (
        "import sys; from pathlib import Path; from ddpm_lmk.sweep import load_sweep, plan_table\n"
        "from rich.console import Console\n"
        "Console(width=160).print(plan_table(load_sweep(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    for words in ("4 cells, 0 done", "scratch-k2-s1", "12 steps", "24 images", "pending"):
        assert words in done.stdout, done.stdout


def test_a_long_plan_has_a_row_per_recipe_and_says_what_is_missing(file: Path) -> None:
    assert text_of(plan_table(load_sweep(split_by_shots(file, [1, 2], [5])))).count("late-k5-s") == 2
    sweep = load_sweep(file, [f"seeds={list(range(9))}", "stage.ddpm=weights/none"], out=Path("out"))
    table = plan_table(sweep)
    lines = [line for line in text_of(table).splitlines() if "late" in line]
    assert table.row_count == 2
    for line, words in zip(lines, (("1, 2", "18", "144", "missing: weights/none"), ("│ 5 ", "9", "72", "pending"))):
        assert all(word in line for word in words), line
    message = r"shards/ceph is not there \(no manifest\.json\); .* \(late-k1-s0 and 26 more\); packs\.NAME="
    with pytest.raises(DataError, match=message):
        check_sweep(sweep, Placement("cpu", 1))


def test_missing_starting_weights_are_found_before_anything_runs(tmp_path: Path, packed_phantoms: Path) -> None:
    file = write_sweep(tmp_path, packed_phantoms, start={"isbi": str(tmp_path / "gone")})
    message = r"gone does not exist; .* \(isbi-k1-s0 and 3 more\); start\.LABEL=PATH names other weights"
    with pytest.raises(CheckpointError, match=message):
        check_sweep(load_sweep(file, out=tmp_path / "out"), Placement("cpu", 1))
    assert not (tmp_path / "out").exists()
