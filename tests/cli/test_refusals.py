"""Mistakes on the command line: one line, the promised exit code, nothing written (docs/faults.md A, B, D7, E7, E8)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddpm_lmk.cli.bench import ALL
from ddpm_lmk.data.phantom import render
from tests.cli.commands import CONFIGS, SMOKE, Lmk, Result, rows_of

ROOT = CONFIGS.parent
PRETRAIN = SMOKE / "pretrain.yaml"
FINETUNE = SMOKE / "finetune.yaml"


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One line that starts with the error's name and holds all `words`, and no traceback."""
    assert result.code == code, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error[")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    assert [word for word in words if word not in lines[0]] == []


def test_unknown_key_names_the_nearest_and_writes_nothing(lmk: Lmk, tmp_path: Path) -> None:
    result = lmk("pretrain", PRETRAIN, "data.path=x", "optim.lrate=1", "--cpu", 1, "--out", tmp_path / "run")
    assert_refused(result, 2, "error[ConfigError]", "optim.lrate", "did you mean optim.lr?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("seed: 1\nseed: 2\n", 2, "line 2: duplicate key 'seed'"),
        ("train: {compile: no}\n", 2, "line 1: train.compile: no is ambiguous"),
        ("optim:\n  lr: -1\n", 2, "line 2: optim.lr=-1"),
        ("optim: {lr: .nan}\n", 2, "optim.lr=nan"),
        ("name: !!python/name:os.system\n", 4, "refused for safety"),
        ("a: &a [1]\nb: *a\n", 4, "refused for safety"),
        ("# " + "x" * 2**20, 4, "1 MiB"),
    ],
    ids=["duplicate", "no", "negative", "nan", "tag", "alias", "large"],
)
def test_broken_run_file_is_refused(lmk: Lmk, tmp_path: Path, text: str, code: int, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert_refused(lmk("pretrain", path, "--cpu", 1), code, str(path), word)


def test_world_size_that_does_not_divide_the_group_lists_those_that_do(lmk: Lmk, tmp_path: Path) -> None:
    result = lmk("pretrain", PRETRAIN, "data.path=x", "--cpu", 3, "--out", tmp_path / "run")
    assert_refused(result, 2, "train.global_batch_size=4", "use 1, 2, 4 processes")


def test_output_that_is_a_file_is_refused(lmk: Lmk, packed_phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    result = lmk("pretrain", PRETRAIN, f"data.path={packed_phantoms}", "--cpu", 1, "--out", out)
    assert_refused(result, 6, str(out), "is a file")
    assert out.read_text() == "mine"


def test_output_that_holds_something_else_is_left_alone(lmk: Lmk, packed_phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = lmk("pretrain", PRETRAIN, f"data.path={packed_phantoms}", "--cpu", 1, "--out", tmp_path)
    assert_refused(result, 7, "is not a run", "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_empty_output_is_fine_and_the_same_command_continues_while_another_is_refused(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path
) -> None:
    words = ("pretrain", PRETRAIN, f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", 1, "--out", tmp_path)
    assert lmk(*words, "train.duration=2 steps").code == 0
    longer = lmk(*words, "train.duration=3 steps")
    assert longer.code == 0, longer.err
    assert json.loads((tmp_path / "results.json").read_text())["train"]["steps"] == 3
    steps = [json.loads(line).get("step") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted({step for step in steps if step}) == [1, 2, 3]
    other = lmk(*words, "train.duration=3 steps", "optim.lr=0.5", "seed=9")
    assert_refused(other, 7, "optim.lr: there 0.0001, here 0.5", "seed: there 0, here 9")


def test_wrong_command_for_a_run_file_names_the_right_one(lmk: Lmk) -> None:
    assert_refused(lmk("pretrain", FINETUNE, "data.path=x", "--cpu", 1), 2, "use `ddpm-lmk finetune")
    assert_refused(lmk("finetune", PRETRAIN, "data.path=x", "--cpu", 1), 2, "use `ddpm-lmk pretrain")


def test_more_gpus_than_there_are_is_refused_with_the_counts(lmk: Lmk) -> None:
    result = lmk("pretrain", PRETRAIN, "data.path=x", "--gpus", 64)
    assert_refused(result, 5, "error[LaunchError]", "asked for 64 GPUs, visible ")


def test_folder_that_is_not_packed_is_told_the_command_that_packs_it(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path
) -> None:
    def refused(folder: Path, *words: str) -> None:
        assert_refused(lmk("pretrain", PRETRAIN, f"data.path={folder}", "--cpu", 1, "--dry-run"), 3, *words)

    films = tmp_path / "my films"
    films.mkdir()
    (films / "1.JPG").write_bytes(b"x")
    refused(films, f"not packed yet; `ddpm-lmk shards pack '{films}' --kind folder --out shards/'my films'`")
    (films / "images.csv").write_text("image_id,file,split\n")
    refused(films, "--kind table")
    refused(tmp_path / "nowhere", "is not there")
    refused(packed_phantoms.parent, "holds 1 packed sets; name one", str(packed_phantoms))


def test_damaged_weights_are_refused(lmk: Lmk, packed_phantoms: Path, pretrained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    for path in copy.glob("**/ema.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    words = (f"data.path={packed_phantoms}", f"init.weights={copy}", "--cpu", 1, "--out", tmp_path / "run")
    assert_refused(lmk("finetune", FINETUNE, *words), 4, "error[CheckpointError]")


def test_one_bad_picture_does_not_stop_the_others(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    image = (render("skull", 3, 0, 64).image >> 8).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "good.png"), image)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    words = ("predict", finetuned, tmp_path / "good.png", tmp_path / "bad.png", "--out", tmp_path / "out")
    result = lmk(*words)
    assert result.code == 0
    assert "1 predicted, 1 failed" in result.out
    assert "bad.png" in result.err
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [bool(row["error"]) for row in rows].count(True) == 1
    assert len(rows) == 19 + 1
    assert_refused(lmk(*words, "--strict"), 3, "1 of 2", "bad.png")


def test_prediction_of_which_every_file_failed_is_no_success(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    result = lmk("predict", finetuned, tmp_path / "bad.png", tmp_path / "gone.png", "--out", tmp_path / "out")
    assert_refused(result, 3, "2 of 2 images could not be read", "bad.png")
    assert "0 predicted, 2 failed" in result.out
    assert [row["error"] != "" for row in rows_of(tmp_path / "out" / "predictions.csv")] == [True, True]


def test_folder_of_images_is_predicted_whole_and_what_is_no_image_is_named(
    lmk: Lmk, finetuned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "films of 2024"
    image = (render("skull", 3, 0, 64).image >> 8).astype(np.uint8)
    for name in ("b.png", "a.PNG", "deep/c.tif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), image)
    (folder / "notes.txt").write_text("of Jane Doe")
    result = lmk("predict", finetuned, folder, folder / "b.png", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "3 predicted, 0 failed" in result.out
    assert "1 files that are no images were skipped (.txt 1)" in result.err
    found = list(dict.fromkeys(row["file"] for row in rows_of(tmp_path / "out" / "predictions.csv")))
    assert found == [str(folder / name) for name in ("a.PNG", "b.png", "deep/c.tif")]
    (tmp_path / "empty").mkdir()
    assert_refused(lmk("predict", finetuned, tmp_path / "empty", "--out", tmp_path / "none"), 3, "no image below")


def test_folder_of_runs_in_place_of_a_run_names_them(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    for name in ("scratch-k1-s0", "pretrained-k1-s0"):
        (tmp_path / "sweep" / "cells").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / "cells" / name).symlink_to(finetuned)
    result = lmk("predict", tmp_path / "sweep", "x.png", "--out", tmp_path / "out")
    cells = (str(tmp_path / "sweep" / "cells" / name) for name in ("pretrained-k1-s0", "scratch-k1-s0"))
    assert_refused(result, 4, "is not a run but holds 2", "name one of them", *cells)


def test_evaluation_on_a_set_with_other_landmarks_is_refused(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    words = ("--kind", "phantom", "--size", 32, "--count", "test=2", "--workers", 1, "--out", tmp_path / "chests")
    assert lmk("shards", "pack", "chest", *words).code == 0
    result = lmk("evaluate", finetuned, "--data", tmp_path / "chests", "--out", tmp_path / "out")
    assert_refused(result, 3, "6 landmarks of phantom-chest", "19 of phantom-skull")


def test_evaluation_of_a_split_that_is_not_there_is_refused(lmk: Lmk, finetuned: Path, packed_phantoms: Path) -> None:
    result = lmk("evaluate", finetuned, "--data", packed_phantoms, "--split", "holdout")
    assert_refused(result, 3, "holdout", "train, val, test")


def test_landmark_commands_refuse_a_pretraining_run(lmk: Lmk, pretrained: Path, packed_phantoms: Path) -> None:
    assert_refused(lmk("evaluate", pretrained, "--data", packed_phantoms), 2, "denoise")
    assert_refused(lmk("bench", "nothing"), 2, "there is no benchmark 'nothing'")
    assert_refused(lmk("bench", "collect"), 2, "there is no benchmark 'collect'")
    scripts = {path.stem for path in (CONFIGS.parent / "benchmarks").glob("[!_]*.py")}
    assert set(ALL) < scripts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "phantom", "--count", "train"), "wanted SPLIT=N"),
        (("--kind", "hand", "--spacing-pair", "1"), "wanted two landmark numbers"),
        (("--kind", "shoe"), "kind"),
    ],
)
def test_wrong_packing_options_are_refused(lmk: Lmk, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = lmk("shards", "pack", "chest", *words, "--out", tmp_path / "out")
    assert_refused(result, 2, message)
    assert list(tmp_path.iterdir()) == []


def test_usage_mistakes_exit_with_two(lmk: Lmk) -> None:
    for words in (("frobnicate",), ("pretrain", "--frobnicate"), ("shards", "pack", "x"), ("pretrain",)):
        assert lmk(*words).code == 2


def test_debug_shows_the_traceback_of_an_expected_error(lmk: Lmk) -> None:
    result = lmk("--debug", "pretrain", PRETRAIN, "data.path=x", "lr=1")
    assert result.code == 2
    assert "Traceback" in result.err


def test_ctrl_c_outside_of_training_exits_with_130_without_a_traceback(
    lmk: Lmk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, *, cfg: None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_lmk.cli.doctor.examine", interrupted)
    result = lmk("doctor")
    assert result.code == 130
    assert "Traceback" not in result.err


def test_ctrl_c_saves_and_exits_with_130_and_the_same_command_continues(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["pretrain", str(PRETRAIN), f"data.path={packed_phantoms}", "evaluate.samples=0", "--cpu", "1"]
    words += ["--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_lmk.cli", *words, "train.duration=1_000_000 steps"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command continues" in err
    steps = json.loads(metrics.read_text().splitlines()[-1])["step"]
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved[-1] >= f"step-{steps:08d}"
