"""Run files that come with the package: found by their names from any folder, suggested, listed, copied out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.config.load import load_run
from ddpm_lmk.errors import ConfigError, RunConflictError
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.system import shipped
from tests.cli.commands import CONFIGS, Lmk, run_command

BASE = "configs/pretrain/base.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in a folder without a checkout, and with a space in its name."""
    folder = tmp_path / "my films"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture
def lmk() -> Lmk:
    return run_command


def test_shipped_run_file_is_found_from_any_folder_and_one_line_says_so(lmk: Lmk) -> None:
    result = lmk("pretrain", BASE, "--diff", CONFIGS / "pretrain" / "base.yaml")
    assert (result.code, result.out) == (0, "no difference\n")
    assert result.err.splitlines() == [
        f"{BASE} is the one shipped with ddpm-lmk, {CONFIGS / 'pretrain' / 'base.yaml'}; "
        "`ddpm-lmk init DIR` copies it out to be edited"
    ]


def test_file_of_the_current_folder_wins_over_the_shipped_one(lmk: Lmk) -> None:
    own = Path(BASE)
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\ntask: {kind: denoise}\n")
    result = lmk("pretrain", BASE, "--diff", CONFIGS / "pretrain" / "base.yaml")
    assert "mine" in result.out
    assert "shipped" not in result.err


def test_own_file_may_extend_a_shipped_one_and_a_sweep_may_run_one() -> None:
    own = Path("own")
    own.mkdir()
    (own / "run.yaml").write_text(f"extends: {BASE}\nname: mine\ndata: {{path: x}}\n")
    run = load_run(own / "run.yaml")
    assert (run.name, run.train.length) == ("mine", load_run(CONFIGS.parent / BASE, ["data.path=x"]).train.length)
    sweep = "name: s\nrun: configs/smoke/finetune.yaml\ngrids: [{shots: [1], seeds: [0], start: {scratch: null}}]\n"
    (own / "sweep.yaml").write_text(sweep)
    assert [cell.cfg.data.image_size for cell in load_sweep(own / "sweep.yaml", ["data.path=x"]).cells] == [32]


def test_launch_files_are_found_too(lmk: Lmk) -> None:
    words = ("--launch", "launch/cpu.yaml", "train.group_size=3", "data.path=x")
    result = lmk("pretrain", "configs/smoke/pretrain.yaml", *words)
    assert result.code == 2
    assert "launch/cpu.yaml is the one shipped" in result.err
    assert "train.group_size=3" in result.err  # two processes, as that file says


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("configs/pretrain/bse.yaml", BASE),
        ("configs/base.yaml", "configs/sweep/base.yaml"),
        ("base.yaml", BASE),
        ("configs/pretrain/base", BASE),
        ("config/sweep/base.yaml", "configs/sweep/base.yaml"),
        ("gpu8.yaml", "launch/gpu8.yaml"),
    ],
)
def test_missing_run_file_lists_shipped_ones_of_near_names(lmk: Lmk, typed: str, meant: str) -> None:
    result = lmk("pretrain", typed, "data.path=x")
    assert result.code == 2
    assert f"{typed}: cannot be read: there is no such file; did you mean the shipped " in result.err
    assert meant in result.err
    assert "`ddpm-lmk init DIR`" in result.err


def test_name_that_is_like_none_is_told_where_they_are() -> None:
    with pytest.raises(ConfigError, match=r"zebra\.yml: cannot be read.*check the path; `ddpm-lmk init` lists"):
        load_run("zebra.yml")


def test_names_that_leave_their_folder_are_not_looked_up() -> None:
    outside = Path("configs") / ".." / "pyproject.toml"
    assert shipped.find(outside) == outside


def test_init_copies_run_and_launch_files_that_work_where_they_are(lmk: Lmk) -> None:
    result = lmk("init", "copy")
    assert result.code == 0, result.err
    copied = {str(path.relative_to("copy")) for path in Path("copy").rglob("*.yaml")}
    assert copied == set(shipped.names())
    assert Path("copy", "launch", "slurm", "gpu8.sbatch").is_file()
    for name in copied:
        assert Path("copy", name).read_bytes() == (CONFIGS.parent / name).read_bytes()
    assert load_run(Path("copy", BASE), ["data.path=x"]) == load_run(CONFIGS.parent / BASE, ["data.path=x"])
    assert "`pretrain/`" in Path("copy", shipped.GUIDE).read_text()


@pytest.mark.parametrize("there", ["configs", "launch"])
def test_init_overwrites_nothing(there: str) -> None:
    place = Path("mine", there)
    place.parent.mkdir()
    place.write_text("mine")
    with pytest.raises(RunConflictError, match="exists and is kept"):
        shipped.copy_out(Path("mine"))
    assert [path.name for path in Path("mine").rglob("*")] == [there]
    assert place.read_text() == "mine"


def test_init_without_a_folder_lists_what_each_file_is_for(lmk: Lmk) -> None:
    result = lmk("init")
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if line.startswith(f"{BASE} ")]
    assert len(lines) == 1
    assert "Pre-training on your own unlabelled x-rays" in lines[0]
    assert list(Path().iterdir()) == []


def test_benchmarks_are_named_by_word_or_file_and_missing_words_are_listed(lmk: Lmk) -> None:
    result = lmk("bench")
    assert result.code == 2
    assert "None" not in result.err
    assert "`ddpm-lmk bench all` measures this machine in about 15 minutes" in result.err
    results = "benchmarks/results/step-tiny_fp32-cpu-20261125-040148.json"
    assert lmk("bench", "--compare", results, results).code == 0
