"""Shots that are named in the run file: in their order, and refused where they cannot be shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import config_hash, dump_run, load_run
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.loading.corpus import evaluation_corpora, training_corpora
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.sweep.expand import load_sweep
from tests.data.dot_packs import pack_dots, run_config


@pytest.fixture(scope="module")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training images, of which number 4 has no label."""
    out = tmp_path_factory.mktemp("listed") / "dots"
    return pack_dots(out, {"train": 10, "test": 3}, unlabelled_ids=("train-004",))


def shots(cfg: RunConfig) -> list[str]:
    [corpus] = training_corpora(cfg)
    return [corpus.facts(int(row)).id for row in corpus.rows]


def run_file(folder: Path, dots: Path, **data: Any) -> Path:
    path = folder / "run.yaml"
    content = {"task": {"kind": "landmarks"}, "data": {"path": str(dots), "image_size": 64, **data}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_listed_shots_are_the_first_of_the_list_in_its_order(dots: Path, seed: int) -> None:
    images = ["train-007", "train-001", "train-009", "train-000"]
    cfg = run_config(dots, seed=seed, data={"draw": "listed", "images": images, "shots": 3})
    assert shots(cfg) == ["train-007", "train-001", "train-009"]
    loader = open_loader(cfg, stage="train")
    assert [record.id for record in loader.records] == ["train-007", "train-001", "train-009"]


def test_images_behind_the_shots_need_no_label_yet(dots: Path) -> None:
    cfg = run_config(dots, data={"draw": "listed", "images": ["train-003", "train-004"], "shots": 1})
    assert shots(cfg) == ["train-003"]


def test_a_part_of_listed_shots_is_held_out_in_turn(dots: Path) -> None:
    images = ["train-007", "train-001", "train-009", "train-000"]
    data = {"draw": "listed", "images": images, "shots": 4, "hold_out": {"fold": 1, "of": 2}}
    cfg = run_config(dots, data=data)
    assert shots(cfg) == ["train-007", "train-009"]
    [held_out] = evaluation_corpora(cfg, "held_out")
    assert [held_out.facts(int(row)).id for row in held_out.rows] == ["train-001", "train-000"]


def test_the_run_keeps_the_ids_of_a_csv_file_and_not_its_name(dots: Path, tmp_path: Path) -> None:
    table = tmp_path / "suggestions.csv"
    table.write_text("rank,image_id\n1,train-005\n2,train-002\n3,train-005\n")
    cfg = load_run(run_file(tmp_path, dots), ["data.draw=listed", f"data.images={table}", "data.shots=2"])
    assert cfg.data.images == ("train-005", "train-002")
    table.unlink()
    (tmp_path / "stored.yaml").write_text(dump_run(cfg))
    assert load_run(tmp_path / "stored.yaml") == cfg


def test_run_files_without_a_list_are_what_they_were(dots: Path, tmp_path: Path) -> None:
    cfg = load_run(run_file(tmp_path, dots))
    assert "images" not in cfg.model_dump(mode="json")["data"]
    listed = load_run(run_file(tmp_path, dots), ["data.draw=listed", "data.images=[train-001]", "data.shots=1"])
    other = load_run(run_file(tmp_path, dots), ["data.draw=listed", "data.images=[train-002]", "data.shots=1"])
    assert len({config_hash(each) for each in (cfg, listed, other)}) == 3


def test_a_sweep_takes_more_and_more_of_a_list(dots: Path, tmp_path: Path) -> None:
    table = tmp_path / "suggestions.csv"
    table.write_text("image_id\ntrain-005\ntrain-002\n")
    grid = {"shots": [1, 2], "seeds": [0, 1], "start": {"first": None}, "draw": "listed"}
    sweep = {"name": "s", "run": str(run_file(tmp_path, dots)), "set": {"data.images": str(table)}, "grids": [grid]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    cells = load_sweep(tmp_path / "sweep.yaml").cells
    assert {(cell.shots, cell.seed, *shots(cell.cfg)) for cell in cells} == {
        *((1, seed, "train-005") for seed in (0, 1)),
        *((2, seed, "train-005", "train-002") for seed in (0, 1)),
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"images": ["train-004"]}, r"train-004 has no landmarks in .*dots; label it and pack again"),
        ({"images": ["test-001"]}, r"test-001 is in split test of .*, data\.splits is train; list another image"),
        ({"images": ["film"]}, r"film is not in .*, where ids are like test-000; list ids"),
    ],
    ids=["unlabelled", "other split", "not there"],
)
def test_an_image_that_cannot_be_a_shot_is_named(dots: Path, data: dict[str, Any], said: str) -> None:
    cfg = run_config(dots, data={"draw": "listed", "shots": 1, **data})
    with pytest.raises(ConfigError, match=said):
        training_corpora(cfg)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.draw=listed"], "draw=listed with no images; wanted draw=listed with images"),
        (["data.images=[a]"], "draw=first with images (a, ...); wanted draw=listed"),
        (["data.draw=listed", "data.images=[a, b]"], "images lists 2, shots=null: wanted shots of 1..2"),
        (["data.draw=listed", "data.images=[a, b]", "data.shots=3"], "images lists 2, shots=3: wanted shots of 1..2"),
        (["data.draw=listed", "data.images=[a, b, a]", "data.shots=2"], "images lists a twice"),
        (["data.draw=listed", "data.images=nowhere.csv", "data.shots=1"], "nowhere.csv cannot be read (No such file"),
        (["data.draw=listed", "data.images=run.yaml.csv", "data.shots=1"], "run.yaml.csv lists no image; wanted a CSV"),
        (["data.draw=listed", "data.images=[a]", "data.shots=1", "data.path=[p, q]"], "from one dataset, path has 2"),
    ],
)
def test_a_list_that_cannot_be_honoured_is_refused_at_once(
    dots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml.csv").write_text("name\na\n")
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(tmp_path, dots), words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
