"""A real run on phantoms in class exact: the command line starts it with two processes, and with one to compare."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading.corpus import unlabelled_corpora
from ddpm_lmk.data.shards.manifest import Manifest
from tests.cli.commands import run_command
from tests.data.dot_packs import corrupt
from tests.engine import processes

pytestmark = pytest.mark.distributed

RUN: dict[str, Any] = {
    "data": {"image_size": 32, "shots": 7, "augment": {"probability": 1.0}},
    "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
    "task": {"kind": "landmarks"},
    "train": {"duration": 4, "global_batch_size": 4, "micro_batch": 1, "epoch_boundary": "epoch", "exactness": "exact"},
    "runtime": {"cache_pixels": "stream", "log_every": 1},
    "optim": {"lr": 1e-3},
    "evaluate": {"split": "test", "batch": 2},
}


@pytest.fixture(scope="module")
def folder(packed_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few-shot training with warps, bad samples, a short last group and a part of the network without a gradient."""
    folder = tmp_path_factory.mktemp("launched")
    shutil.copytree(packed_phantoms, folder / "skulls")
    corrupt(folder / "skulls", Manifest.open(folder / "skulls").rows(["train"])[[2, 5, 8]].tolist())
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    for number, name in ((1, "one"), (2, "two")):
        words = ("--cpu", number, "--out", folder / name, f"data.path={folder / 'skulls'}")
        result = run_command("finetune", folder / "run.yaml", *words)
        assert result.code == 0, result.err
    return folder


@pytest.mark.parametrize(
    ("data", "files"),
    [({}, []), ({"propagate": {"rounds": 1, "agree": 0.2}}, ["pseudo_labels.csv", "quarantine.jsonl"])],
    ids=["alone", "and teach"],
)
def test_two_processes_look_twice_with_the_bits_of_one(
    packed_phantoms: Path, tmp_path: Path, data: dict[str, Any], files: list[str]
) -> None:
    """Crops of both parts, drawn by position, in micro-batches that other ranks compute; one image cannot be read."""
    skulls = tmp_path / "skulls"
    shutil.copytree(packed_phantoms, skulls)
    if files:
        labelled = {"path": str(skulls), **RUN["data"], "fine_size": 64} | data
        cfg = RunConfig.model_validate(RUN | {"data": labelled, "task": RUN["task"] | {"refine": {"crop": 0.5}}})
        corrupt(skulls, unlabelled_corpora(cfg)[0].rows[1:2].tolist())
    refine = {"refine": {"crop": 0.5}}
    run = RUN | {"data": RUN["data"] | {"fine_size": 64} | data, "task": RUN["task"] | refine}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    for number, name in ((1, "one"), (2, "two")):
        words = ("--cpu", number, "--out", tmp_path / name, f"data.path={skulls}")
        result = run_command("finetune", tmp_path / "run.yaml", *words)
        assert result.code == 0, result.err
    names = [*(f"snapshots/step-00000004/{use}.safetensors" for use in ("model", "ema")), "predictions.csv"]
    for name in [*names, *files]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_launched_processes_have_the_bits_of_one(folder: Path) -> None:
    files = sorted(path.relative_to(folder / "one") for path in (folder / "one").glob("snapshots/*/*.safetensors"))
    assert [path.name for path in files] == ["ema.safetensors", "model.safetensors"]
    for file in files:
        assert (folder / "two" / file).read_bytes() == (folder / "one" / file).read_bytes(), file
    assert processes.losses(folder / "two") == processes.losses(folder / "one")
    assert read(folder / "two" / "run.json")["hardware"]["processes"] == 2


def test_two_processes_score_every_image_once_and_find_the_same(folder: Path) -> None:
    """Three images for each of two ranks, in batches of two: both shares are padded."""
    rows = list(csv.DictReader((folder / "two" / "predictions.csv").read_text().splitlines()))
    images = [row["image_id"] for row in rows]
    assert [images.count(image) for image in dict.fromkeys(images)] == [19] * 6
    assert (folder / "two" / "predictions.csv").read_bytes() == (folder / "one" / "predictions.csv").read_bytes()
    one, two = (read(folder / name / "results.json") for name in ("one", "two"))
    assert one["protocols"] == two["protocols"]
    assert one["num_images"] == two["num_images"] == 6


def test_two_ranks_list_the_bad_samples_that_either_met_once(folder: Path) -> None:
    one, two = ((folder / name / "quarantine.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert len(one) in (1, 2, 3)
    assert sorted(two) == sorted(one)
