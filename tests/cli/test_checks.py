"""What cannot be trained is refused before the first step, by a run, a sweep and their dry runs.

All four say it in the same words and with the same exit code, and nothing is written.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.launcher import Placement
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.sweep.check import check_sweep
from tests.cli.commands import SMOKE, Lmk, Result, run_command

SIZE = 32


@dataclass(frozen=True)
class Fault:
    """Words that ask for what cannot be, the exit code, and the sentence."""

    words: tuple[str, ...]
    code: int
    said: str


@dataclass(frozen=True)
class Places:
    """Packs and runs that faults are made of."""

    good: Path  # skulls with train, val, test
    untested: Path  # without a test split
    single: Path  # one landmark
    pinched: Path  # hands, in one of which the pair that gives the paper its millimetres has no length
    unlabelled: Path
    parent: Path  # a pre-training run
    wide: Path  # one of a wider network
    gone: Path
    torn: Path  # weights cut off


FAULTS = {
    "no test split": Fault(("data.path={untested}",), 3, "there is no split 'test'"),
    "no validation split": Fault(("data.validation_split=wal",), 3, "there is no split 'wal'"),
    "no training split": Fault(("data.splits=[learn]",), 3, "there is no split 'learn'"),
    "trained on and scored": Fault(("evaluate.split=train",), 2, "evaluate.split=train is also in data.splits"),
    "no pack": Fault(("data.path={gone}",), 3, "gone is not there (no manifest.json)"),
    "no labels": Fault(("data.path={unlabelled}",), 3, "is packed without landmarks"),
    "no score": Fault(("data.path={pinched}",), 3, "landmarks 0 and 4 of hand fall on one grid pixel in some image"),
    "one landmark on discs": Fault(
        ("data.path={single}", "task.codec.kind=disc"), 2, "has only one, so nothing would be"
    ),
    "parts of too few shots": Fault(("data.hold_out={{of: 9}}",), 2, "data.hold_out.of=9, but there are 2 shots"),
    "packed otherwise": Fault(("data.require_dataset={{filter: gaussian}}",), 2, "was packed with filter=area"),
    "no weights": Fault(("init.weights={gone}",), 4, "gone does not exist; wanted a run directory"),
    "weights of another network": Fault(("init.weights={wide}",), 4, "does not fit model"),
    "weights cut off": Fault(("init.weights={torn}",), 4, "ema.safetensors has 100 bytes, its manifest says"),
    "no average to start from": Fault(("init.weights={parent}", "init.use=ema"), 4, "and no ema.safetensors; choose"),
    "a pickle": Fault(("init.weights={parent}/model.pth",), 4, "may hold code and is not opened"),
    "a group not shared out": Fault(("train.micro_batch=3",), 2, "train.global_batch_size=4 is not a multiple of"),
    "graphs on a CPU": Fault(("train.cuda_graphs=true", "train.compile=true"), 5, "but this run is on cpu"),
    "an interval of no steps": Fault(("runtime.log_every=0",), 2, "runtime.log_every=0 steps is no interval"),
    "a width that has no groups": Fault(("model.width=10",), 2, "model.width=10 must be even and divisible by"),
    "DALI beside resident pixels": Fault(
        ("runtime.loader=dali", "runtime.cache_pixels=ram"), 2, "runtime.cache_pixels=ram decodes"
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, packed_phantoms: Path) -> Places:
    root = tmp_path_factory.mktemp("places")
    pack("skull", root / "untested", PackSettings(kind="phantom", size=SIZE, counts={"train": 4}), workers=1)
    _table(root / "single", "sella")
    _table(root / "pinched", *SPECS["hand"].landmark_names, spec="hand")
    _films(root / "films", 3)
    pack(root / "films", root / "unlabelled", PackSettings(kind="folder", size=SIZE), workers=1)
    words = (f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", 1)
    pretrain = ("pretrain", SMOKE / "pretrain.yaml", *words)
    for name, more in (("parent", "train.ema=null"), ("wide", "model.width=16"), ("torn", "seed=1")):
        result = run_command(*pretrain, more, "--out", root / name)
        assert result.code == 0, result.err
    with next((root / "torn").glob("snapshots/*/ema.safetensors")).open("rb+") as file:
        file.truncate(100)
    names = ("untested", "single", "pinched", "unlabelled", "parent", "wide", "gone", "torn")
    return Places(packed_phantoms, **{name: root / name for name in names})


def _films(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        image = (render("skull", number, 0, 64).image >> 8).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)


def _table(out: Path, *landmarks: str, **settings: Any) -> None:
    """Six labelled films, two of them for testing; in the last, landmarks 0 and 4 all but fall on one point."""
    source = out.with_name(f"{out.name}-source")
    _films(source, 6)
    images = ["image_id,file,split", *(f"{i},{i}.png,{'test' if i > 3 else 'train'}" for i in range(6))]
    (source / "images.csv").write_text("\n".join(images) + "\n")
    labels = ["image_id,landmark_index,landmark_name,x,y"]
    for i in range(6):
        points = [(20 + n % 7 * 3, 20 + n // 7 * 3) for n in range(len(landmarks))]
        points[4:5] = [(20.01, 20)] if i == 5 else points[4:5]
        labels += [f"{i},{n},{name},{x},{y}" for n, (name, (x, y)) in enumerate(zip(landmarks, points))]
    (source / "landmarks.csv").write_text("\n".join(labels) + "\n")
    pack(source, out, PackSettings(kind="table", size=SIZE, **settings), workers=1)


def _sweep(folder: Path, words: list[str]) -> Path:
    """A sweep file whose cells are the smoke fine-tuning with these words."""
    settings: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        settings[key] = yaml.safe_load(text)
    start = settings.pop("init.weights", None)
    grid = {"shots": [2], "seeds": [0, 1], "start": {"first": start}, "set": settings}
    content = {"name": "checked", "run": str(SMOKE / "finetune.yaml"), "grids": [grid]}
    (folder / "sweep.yaml").write_text(json.dumps(content))
    return folder / "sweep.yaml"


def refusal(result: Result) -> str:
    [line] = [line for line in result.err.splitlines() if line.startswith("error[")]
    return line


def refused_alike(lmk: Lmk, code: int, run: tuple[object, ...], sweep: tuple[object, ...]) -> tuple[str, str]:
    """What a run and a sweep refuse in the same words as their dry runs, each with this exit code."""
    results = [lmk(*words, *more) for words in (run, sweep) for more in ((), ("--dry-run",))]
    assert [result.code for result in results] == [code] * 4, [result.err for result in results]
    told = [refusal(result) for result in results]
    assert (told[0], told[2]) == (told[1], told[3])
    return told[0], told[2]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_run_a_sweep_and_their_dry_runs_refuse_alike_before_anything_is_written(
    lmk: Lmk, places: Places, tmp_path: Path, fault: Fault
) -> None:
    given = [word.format(**vars(places)) for word in fault.words]
    words = [*([] if any(word.startswith("data.path=") for word in given) else [f"data.path={places.good}"]), *given]
    out = tmp_path / "out"
    run = ("finetune", SMOKE / "finetune.yaml", *words, "data.shots=2", "--cpu", 1, "--out", out)
    sweep = ("sweep", _sweep(tmp_path, words), "--cpu", 1, "--out", out)
    told = refused_alike(lmk, fault.code, run, sweep)
    assert [line for line in told if fault.said not in line] == []
    assert not out.exists()


@pytest.mark.parametrize("words", [("data.shots=13",), ("data.shots=13", "data.draw=random")])
def test_more_shots_than_labels_are_refused_alike(lmk: Lmk, places: Places, tmp_path: Path, words: tuple[str]) -> None:
    run = ("finetune", SMOKE / "finetune.yaml", *words, f"data.path={places.good}", "--cpu", 1, "--out", tmp_path / "o")
    file = tmp_path / "sweep.yaml"
    grid = {"shots": [1, 13, 14], "seeds": [0, 1], "start": {"first": None}, "set": {"data.path": str(places.good)}}
    file.write_text(json.dumps({"name": "s", "run": str(SMOKE / "finetune.yaml"), "grids": [grid]}))
    sweep = ("sweep", file, *words[1:], "--cpu", 1, "--out", tmp_path / "o")
    told = refused_alike(lmk, 2, run, sweep)
    sentence = "data.shots=13, but phantom-skull has 12 labelled training images; use 1..12 or null for all"
    assert all(sentence in line for line in told)
    assert "(first-k13-s0 and 1 more); data.shots=14" in told[1]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cpu", 0), "at least 1 process"),
        (("--gpus", 0), "at least 1 process"),
        (("--gpus", 1, "--cpu", 1), "contradict one another"),
        (("--cpu", 1, "--per-device", 0), "wanted a number of workers"),
    ],
)
def test_a_sweep_and_its_dry_run_refuse_the_same_places(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path, words: tuple[str | int, ...], said: str
) -> None:
    sweep = ("sweep", _sweep(tmp_path, [f"data.path={packed_phantoms}"]), *words, "--out", tmp_path / "out")
    results = [lmk(*sweep), lmk(*sweep, "--dry-run")]
    assert [result.code for result in results] == [2, 2]
    assert all(said in refusal(result) for result in results)


def test_a_folder_that_cannot_be_written_is_refused_alike(lmk: Lmk, places: Places, tmp_path: Path) -> None:
    data = f"data.path={places.good}"
    for out, said in ((Path("/proc/nowhere/out"), "cannot write to"), (tmp_path / "sweep.yaml", "is a file")):
        run = ("finetune", SMOKE / "finetune.yaml", data, "--cpu", 1, "--out", out)
        sweep = ("sweep", _sweep(tmp_path, [data]), "--cpu", 1, "--out", out)
        told = refused_alike(lmk, 6, run, sweep)
        assert told[0] == told[1]
        assert said in told[0]


def test_other_settings_than_the_folder_holds_are_refused_key_by_key_before_the_first_cell(
    lmk: Lmk, places: Places, tmp_path: Path
) -> None:
    data, out = f"data.path={places.good}", tmp_path / "out"
    assert lmk("sweep", _sweep(tmp_path, [data]), "--cpu", 1, "--out", out).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changed = ("sweep", _sweep(tmp_path, [data, "optim.lr=0.01"]), "seeds=[0,1,2,3]", "--cpu", 1, "--out", out)
    for result in (lmk(*changed), lmk(*changed, "--dry-run")):
        assert result.code == 7
        assert "optim.lr: there 0.001, here 0.01 (first-k2-s0 and 1 more)" in refusal(result)
        assert "--fork" not in refusal(result)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    place = ("--cpu", 1, "--out", out / "cells" / "first-k2-s0")
    cell = ("finetune", SMOKE / "finetune.yaml", data, "data.shots=2", *place)
    for result in (lmk(*cell, "optim.lr=0.01"), lmk(*cell, "optim.lr=0.01", "--dry-run")):
        assert result.code == 7
        assert "optim.lr: there 0.001, here 0.01" in refusal(result)
    more = lmk("sweep", _sweep(tmp_path, [data]), "seeds=[0,1,2]", "runtime.workers=1", "--cpu", 1, "--out", out)
    assert more.code == 0, more.err
    assert "3 of 3 cells done" in more.err


def test_a_pack_that_was_made_anew_is_refused_alike(lmk: Lmk, places: Places, tmp_path: Path) -> None:
    data = shutil.copytree(places.untested, tmp_path / "data")
    words = (f"data.path={data}", "evaluate.split=null")
    run = ("finetune", SMOKE / "finetune.yaml", *words, "data.shots=2", "--cpu", 1, "--out", tmp_path / "run")
    assert lmk(*run, "train.duration=2 steps").code == 0
    shutil.rmtree(data)
    pack("skull", data, PackSettings(kind="phantom", size=SIZE, counts={"train": 4}, seed=5), workers=1)
    for more in ((), ("--dry-run",)):
        result = lmk(*run, *more)
        assert result.code == 3
        assert "dataset changed since" in refusal(result)


def test_a_run_that_has_begun_needs_its_starting_weights_no_more_and_a_finished_one_nothing(
    lmk: Lmk, places: Places, tmp_path: Path
) -> None:
    parent = shutil.copytree(places.parent, tmp_path / "parent")
    data = shutil.copytree(places.good, tmp_path / "data")
    words = (f"data.path={data}", f"init.weights={parent}", "init.use=model", "--cpu", 1, "--out", tmp_path / "run")
    run = ("finetune", SMOKE / "finetune.yaml", *words)
    assert lmk(*run, "train.duration=2 steps").code == 0
    shutil.rmtree(parent)
    assert lmk(*run, "train.duration=4 steps").code == 0
    shutil.rmtree(data)
    assert lmk(*run, "train.duration=4 steps").code == 0


def stages(folder: Path, start: str, **stage: Any) -> Path:
    """A sweep with a pre-training stage."""
    grid = {"shots": [2], "seeds": [0], "start": {"ddpm": start}}
    content = {"name": "staged", "run": str(SMOKE / "finetune.yaml"), "packs": {"all": "set below"}, "grids": [grid]}
    settings = {"evaluate.samples": 0} | stage
    content["stages"] = {"ddpm": {"run": str(SMOKE / "pretrain.yaml"), "packs": ["all"], "set": settings}}
    (folder / "sweep.yaml").write_text(json.dumps(content))
    return folder / "sweep.yaml"


@pytest.mark.parametrize(
    ("start", "stage", "code", "said"),
    [
        (
            "stage:ddpm@3",
            {"train.snapshot_every": "2 steps"},
            2,
            "stage:ddpm@3: the stage keeps snapshots at steps 2, 4",
        ),
        ("stage:ddpm@2", {}, 2, "stage:ddpm@2: the stage keeps snapshots at steps 4"),
        ("stage:ddpm", {"model.width": 16}, 4, "does not fit model"),
        ("stage:ddpm", {"train.ema": None}, 4, "will hold no ema.safetensors"),
        ("stage:ddpm", {"data.splits": ["learn"]}, 3, "there is no split 'learn'"),
        ("stage:ddpm", {"data.protect": ["gone"]}, 3, "gone is not there (no manifest.json)"),
    ],
)
def test_weights_that_a_stage_would_not_give_are_refused_before_it_is_trained(
    lmk: Lmk, places: Places, tmp_path: Path, start: str, stage: dict[str, Any], code: int, said: str
) -> None:
    file = stages(tmp_path, start, **stage)
    words = ("sweep", file, f"packs.all={places.good}", f"data.path={places.good}", "--cpu", 1, "--out", tmp_path / "o")
    for result in (lmk(*words), lmk(*words, "--dry-run")):
        assert result.code == code, result.err
        assert said in refusal(result)
    assert not (tmp_path / "o").exists()


def test_snapshots_that_a_stage_will_keep_are_let_through(places: Places, tmp_path: Path) -> None:
    words = [f"packs.all={places.good}", f"data.path={places.good}"]
    for start in ("stage:ddpm@2", "stage:ddpm@4", "stage:ddpm"):
        file = stages(tmp_path, start, **{"train.snapshot_every": "2 steps"})
        check_sweep(load_sweep(file, words, out=tmp_path / "o"), Placement("cpu", 1))


def test_images_that_are_enlarged_are_remarked(lmk: Lmk, places: Places, tmp_path: Path) -> None:
    words = ("--cpu", 1, "--dry-run", "--out", tmp_path / "o", f"data.path={places.good}", "data.image_size=64")
    result = lmk("pretrain", SMOKE / "pretrain.yaml", *words)
    assert result.code == 0, result.err
    assert "holds images of 32 pixels, which are enlarged to data.image_size=64" in result.err
    assert "enlarged" not in lmk("pretrain", SMOKE / "pretrain.yaml", *words[:-1]).err


def test_packs_of_the_same_landmarks_are_learnt_together_and_scored_each_by_itself(
    lmk: Lmk, places: Places, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pack("skull", other, PackSettings(kind="phantom", size=SIZE, counts={"train": 4, "test": 3}, seed=9), workers=1)
    words = (f"data.path=[{places.good},{other}]", "data.shots=2", "train.duration=2 steps", "--cpu", 1)
    result = lmk("finetune", SMOKE / "finetune.yaml", *words, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = [(part["dataset"], part["num_images"], part["labels"]["training"]) for part in results["parts"]]
    assert found == [("phantom-skull", 6, 2), ("phantom-skull-1", 3, 2)]


def test_a_place_that_takes_no_results_is_refused_before_they_are_made(lmk: Lmk, places: Places) -> None:
    nowhere = Path("/proc/nowhere")
    for words in (
        ("sample", places.parent, "--out", nowhere / "samples.png"),
        ("export", places.parent, "--out", nowhere / "weights.safetensors"),
        ("evaluate", places.parent, "--data", places.good, "--out", nowhere),
        ("predict", places.parent, "no.png", "--out", nowhere),
        ("report", places.parent, "--out", nowhere / "report.html"),
    ):
        result = lmk(*words)
        assert result.code == 6, result.err
        assert "cannot write to /proc/nowhere" in refusal(result)


def test_a_job_for_a_cluster_is_checked_before_it_is_queued_where_its_packs_are_seen(
    lmk: Lmk, places: Places, tmp_path: Path
) -> None:
    place = ("--cpu", 1, "--out", tmp_path / "run", "--script", tmp_path / "j")
    words = ("launch", "slurm", SMOKE / "finetune.yaml", *place)
    refused = lmk(*words, f"data.path={places.untested}")
    assert refused.code == 3
    assert "there is no split 'test'" in refusal(refused)
    assert not (tmp_path / "j").exists()
    assert lmk(*words, f"data.path={places.gone}").code == 0
