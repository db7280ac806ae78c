"""Every command, run for real on a few phantoms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from ddpm_lmk.config.load import load_run
from ddpm_lmk.data.phantom import render
from ddpm_lmk.engine import device_fit
from ddpm_lmk.errors import RunConflictError
from ddpm_lmk.system.machine import release
from tests.cli.commands import CONFIGS, SMOKE, Lmk, rows_of

ROOT = CONFIGS.parent


def test_help_names_every_command(lmk: Lmk) -> None:
    result = lmk("--help")
    assert result.code == 0
    commands = "doctor demo shards pretrain finetune sweep evaluate predict sample report export bench"
    assert [name for name in commands.split() if f" {name} " not in result.out] == []


def test_version_is_the_package_version(lmk: Lmk) -> None:
    assert lmk("--version").out.strip() == __import__("ddpm_lmk").__version__


def test_doctor_looks_at_everything_and_says_what_would_be_used(lmk: Lmk, tmp_path: Path) -> None:
    result = lmk("doctor", "--out", tmp_path / "runs")
    assert result.code in (0, 5)
    assert (result.code == 5) == ("problem" in result.out)
    for topic in ("python", "torch", "cpu", "gpu", "group norm", "disk", "/dev/shm", "open files", "extra dali"):
        assert topic in result.out
    assert "would use 1 " in result.out
    assert list(tmp_path.iterdir()) == []


def test_versions_compare_by_their_numbers() -> None:
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("2.9.1") < (2, 10) < (*release("2.10.0rc1.dev0"), 0)


def test_shards_are_packed_verified_and_shown(lmk: Lmk, tmp_path: Path) -> None:
    shards = tmp_path / "chests"
    words = ("--kind", "phantom", "--size", 32, "--count", "train=3", "--count", "test=2", "--workers", 1)
    packed = lmk("shards", "pack", "chest", *words, "--out", shards)
    assert packed.code == 0, packed.err
    assert "5 images (train 3, test 2), 0 refused" in packed.out
    assert "packing chest: 5 of 5" in packed.err
    verified = lmk("shards", "verify", shards)
    assert verified.code == 0
    assert "5 samples (train 3, test 2)" in verified.out
    shown = lmk("shards", "show", shards, "--out", tmp_path / "look", "--count", 5)
    assert shown.code == 0
    assert cv2.imread(str(tmp_path / "look" / "contact_sheet.png")) is not None


def test_pretraining_writes_a_run_that_runs_again_as_it_is(lmk: Lmk, pretrained: Path, packed_phantoms: Path) -> None:
    assert {"config.yaml", "run.json", "metrics.jsonl", "results.json", "done.json", "samples.png"} <= {
        path.name for path in pretrained.iterdir()
    }
    written = load_run(pretrained / "config.yaml")
    assert written.data.path == (str(packed_phantoms),)
    again = lmk("pretrain", pretrained / "config.yaml", "--cpu", 1, "--out", pretrained)
    assert again.code == 0, again.err


def test_finetuning_scores_every_test_image(finetuned: Path) -> None:
    results = json.loads((finetuned / "results.json").read_text())
    assert (results["num_images"], results["labels"]) == (6, {"training": 4, "validation": 0})
    assert json.loads((finetuned / "run.json").read_text())["parent"]["loaded"] == "trunk"
    rows = rows_of(finetuned / "predictions.csv")
    assert len(rows) == 6 * 19


def test_end_of_a_command_names_the_next_one(lmk: Lmk, pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    packed = lmk(
        "shards", "pack", "chest", "--kind", "phantom", "--size", 32, "--count", "train=2", "--out", tmp_path / "a b"
    )
    assert f"next: `ddpm-lmk shards show '{tmp_path / 'a b'}'`" in packed.err
    again = {
        run: lmk(command, run / "config.yaml", "--cpu", 1, "--out", run).err
        for command, run in (("pretrain", pretrained), ("finetune", finetuned))
    }
    assert f"start.pretrained={pretrained}" in again[pretrained]
    assert f"next: `ddpm-lmk predict {finetuned} IMAGES" in again[finetuned]


def test_explain_lists_settings_without_a_run_file(lmk: Lmk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = lmk("pretrain", "--explain")
    assert result.code == 0
    assert "task.codec.sigma_px" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert lmk("sweep", "--explain").code == 0


def test_explain_takes_the_width_of_the_reader_and_beginnings_of_keys(
    lmk: Lmk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = lmk("pretrain", SMOKE / "pretrain.yaml", "--explain", "train.ema", "optim.clip")
    keys = [line.split(" ")[0] for line in result.out.splitlines() if line[:1].isalpha()]
    assert keys == ["optim.clip", "optim.clip.kind", "optim.clip.limit", "train.ema.decay", "train.ema.warmup"]
    assert max(map(len, result.out.splitlines())) <= 60
    assert result.out.startswith("## optim: ")
    refused = lmk("pretrain", "--explain", "trian")
    assert refused.code == 2
    assert "no setting begins with 'trian'; there are name, seed, data, model" in refused.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_character_is_spelt_where_the_output_cannot_show_it(encoding: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    for words, shown in (("sweep --help", "shots x seeds"), ("pretrain data×é.yaml", "data")):
        command = [sys.executable, "-m", "ddpm_lmk.cli", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        text = (done.stdout + done.stderr).decode(encoding, "replace")
        assert "Traceback" not in text
        assert shown in text.replace("×", "x")


def test_dry_run_says_what_would_run_and_writes_nothing(lmk: Lmk, packed_phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--cpu", 2, "--dry-run", "--out", out, f"data.path={packed_phantoms}")
    result = lmk("pretrain", SMOKE / "pretrain.yaml", *words)
    assert result.code == 0, result.err
    for said in (
        "parameters",
        "GFLOP",
        "GiB per process",
        "2 CPU processes",
        "12 images of train",
        "4 steps, 16 images",
    ):
        assert said in result.out
    assert not out.exists()


def test_dry_runs_say_that_a_precision_is_emulated(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_fit, "times_fp32", lambda name: 9.1)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    words = ("--cpu", 1, "--dry-run", "--out", tmp_path / "out", f"data.path={packed_phantoms}")
    for asked, is_said in (("bf16", True), ("auto", False)):
        run = lmk("pretrain", SMOKE / "pretrain.yaml", *words, f"train.precision={asked}")
        assert ("train.precision=bf16 is emulated here" in run.out) == is_said
        sweep = lmk("sweep", SMOKE / "sweep.yaml", *words, f"train.precision={asked}")
        assert ("train.precision=bf16 is emulated here" in sweep.err) == is_said


def test_diff_lists_what_two_run_files_do_differently(lmk: Lmk, pretrained: Path) -> None:
    result = lmk("pretrain", pretrained / "config.yaml", "optim.lr=0.5", "--diff", pretrained / "config.yaml")
    assert result.code == 0
    assert "optim.lr" in result.out
    assert "0.5" in result.out
    assert "seed" not in result.out


def test_sweep_runs_its_cells_once_and_report_collects_them(lmk: Lmk, packed_phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ("--out", out, f"data.path={packed_phantoms}", "shots=[2]", "seeds=[0, 1]")
    plan = lmk("sweep", SMOKE / "sweep.yaml", *words, "--dry-run")
    assert plan.code == 0
    assert "scratch-k2-s0" in plan.out
    assert not out.exists()
    first = lmk("sweep", SMOKE / "sweep.yaml", *words, "--cpu", 1)
    assert first.code == 0, first.err
    results = out / "cells" / "scratch-k2-s0" / "results.json"
    stamp = results.stat().st_mtime_ns
    assert lmk("sweep", SMOKE / "sweep.yaml", *words, "--cpu", 1).code == 0
    assert results.stat().st_mtime_ns == stamp
    report = lmk("report", out, "--out", tmp_path / "report.html")
    assert report.code == 0, report.err
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "mean shape" in (tmp_path / "report.md").read_text()
    assert len(rows_of(tmp_path / "report.csv")) > 0


def test_evaluate_scores_another_split(lmk: Lmk, finetuned: Path, packed_phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "val"
    result = lmk("evaluate", finetuned, "--data", packed_phantoms, "--split", "val", "--out", out)
    assert result.code == 0, result.err
    assert "4 images" in result.out
    assert "original: MRE" in result.out
    assert json.loads((out / "results.json").read_text())["split"] == "val"


def test_predict_finds_points_in_files(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    image = (render("skull", 3, 0, 96).image >> 8).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    result = lmk("predict", finetuned, tmp_path / "a.png", "--out", tmp_path / "out", "--mm-per-px", 0.5)
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 19
    assert float(rows[0]["x_mm"]) == pytest.approx(float(rows[0]["x"]) * 0.5, abs=1e-3)
    assert list((tmp_path / "out" / "overlays").iterdir())


def test_sample_draws_a_sheet(lmk: Lmk, pretrained: Path, tmp_path: Path) -> None:
    result = lmk("sample", pretrained, "--count", 4, "--steps", 3, "--out", tmp_path / "sheet.png")
    assert result.code == 0, result.err
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None
    assert sheet.shape[0] > 64


def test_export_writes_safetensors(lmk: Lmk, finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    result = lmk("export", finetuned, "--out", out)
    assert result.code == 0, result.err
    assert out.stat().st_size > 1000


def test_demo_goes_the_whole_road_and_takes_it_up_again(tmp_path: Path) -> None:
    from ddpm_lmk.demo import run_demo
    from ddpm_lmk.launcher import Placement

    configs = tmp_path / "configs"
    configs.mkdir()
    packs = {"pool": {"source": "skull", "counts": {"train": 8}}}
    packs["labelled"] = {"source": "skull", "seed": 1, "counts": {"train": 3, "test": 3}}
    (configs / "shards.yaml").write_text(yaml.safe_dump({"size": 32, "packs": packs}))
    (configs / "pretrain.yaml").write_text(f"extends: {SMOKE / 'pretrain.yaml'}\nevaluate: {{samples: 0}}\n")
    (configs / "finetune.yaml").write_text(f"extends: {SMOKE / 'finetune.yaml'}\n")
    grid = {"shots": [2], "seeds": [0], "start": {"scratch": None, "pretrained": "set by the demo"}}
    (configs / "sweep.yaml").write_text(yaml.safe_dump({"name": "tiny", "run": "finetune.yaml", "grids": [grid]}))
    report = run_demo(tmp_path / "demo", Placement("cpu", 1), configs=configs)
    assert "pretrained" in report.read_text()
    weights = tmp_path / "demo" / "pretrain" / "done.json"
    stamp = weights.stat().st_mtime_ns
    run_demo(tmp_path / "demo", Placement("cpu", 1), configs=configs)
    assert weights.stat().st_mtime_ns == stamp
    for name, old, new, told in (
        (
            "finetune",
            "name: x",
            "optim: {lr: 0.5}",
            r"optim\.lr: there 0\.001, here 0\.5 \(pretrained-k2-s0 and 1 more\)",
        ),
        ("pretrain", "name: x", "seed: 5", r"seed: there 0, here 5 \(stage pre-training\)"),
        ("shards", "seed: 1", "seed: 2", r"labelled holds phantoms of another demo: seed: there 1, here 2"),
    ):
        before = (configs / f"{name}.yaml").read_text()
        (configs / f"{name}.yaml").write_text(before.replace(old, new) if old in before else f"{before}{new}\n")
        with pytest.raises(RunConflictError, match=told):
            run_demo(tmp_path / "demo", Placement("cpu", 1), configs=configs)
        (configs / f"{name}.yaml").write_text(before)
