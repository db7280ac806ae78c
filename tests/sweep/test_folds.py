"""Calibrating finished runs: folds that are trained once, what is learnt from them, and what uses it."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import diff_runs, load_stored
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError, LmkError, RunConflictError
from ddpm_lmk.inference import radius
from ddpm_lmk.launcher import Placement
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.sweep.folds import calibrate, plan_calibration
from ddpm_lmk.system.files import read_json
from tests.cli.commands import run_command
from tests.conftest import NETWORK

HERE = Placement("cpu", 1)


def config(packed: Path, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"path": str(packed), "image_size": 32, "shots": 4, **data},
            "model": NETWORK,
            "task": {"kind": "landmarks"},
            "train": {"duration": "3 steps", "global_batch_size": 4},
            "runtime": {"workers": 0, "log_every": 1},
            "evaluate": {"split": "test", "batch": 8},
        }
    )


@pytest.fixture(scope="module")
def finished(packed_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four labelled images. Do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    execute(config(packed_phantoms), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def calibrated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a radius of 80 %. Do not write into it."""
    run = tmp_path_factory.mktemp("runs") / "calibrated"
    shutil.copytree(finished, run)
    calibrate(plan_calibration(run), HERE, coverage=0.8)
    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_of_few_labelled_images_is_left_out_once_and_its_errors_make_the_factor(
    finished: Path, calibrated: Path
) -> None:
    folds = sorted((calibrated / "folds").iterdir())
    assert [fold.name for fold in folds] == ["0-of-4", "1-of-4", "2-of-4", "3-of-4"]
    results = [read_json(fold / "results.json") or {} for fold in folds]
    assert [each["labels"]["training"] for each in results] == [3] * 4
    assert [each["num_images"] for each in results] == [1] * 4
    rows = [row for fold in folds for row in rows_of(fold / "predictions.csv")]
    assert len({row["image_id"] for row in rows}) == 4
    facts = read_json(calibrated / "radius.json")
    assert facts is not None
    assert (facts["coverage"], facts["folds"], facts["images"], facts["points"]) == (0.8, 4, 4, 76)
    ratios = np.array([float(row["error_px"]) / float(row["spread_px"]) for row in rows]).reshape(4, 19)
    factor, count = radius.conformal_quantile(ratios, 0.8)
    assert (facts["factor"], facts["independent_points"]) == (pytest.approx(factor, abs=1e-6), round(count, 1))
    millimetres = np.array([float(row["error_mm"]) for row in rows]).reshape(4, 19)
    constant, _ = radius.conformal_quantile(millimetres, 0.8)
    assert facts["constant"] == {"radius": pytest.approx(constant, abs=1e-6), "unit": "mm"}


def test_the_run_file_of_a_fold_differs_in_what_is_held_out_alone(calibrated: Path) -> None:
    rows = diff_runs(load_stored(calibrated), load_stored(calibrated / "folds" / "1-of-4"))
    assert {key: now for key, _, now in rows} == {
        "name": "tiny-fold-1-of-4",
        "data.hold_out": "(absent)",
        "data.hold_out.fold": 1,
        "data.hold_out.of": 4,
        "evaluate.split": "held_out",
    }


def test_coverage_is_measured_on_the_split_that_was_scored_and_nothing_else_changes(
    finished: Path, calibrated: Path
) -> None:
    before, after = (json.loads((run / "results.json").read_text()) for run in (finished, calibrated))
    measured = after.pop("radius")
    assert after == before
    factor = json.loads((calibrated / "radius.json").read_text())["factor"]
    rows = rows_of(calibrated / "predictions.csv")
    within = [float(row["error_px"]) <= factor * float(row["spread_px"]) for row in rows]
    assert measured["within_pct"] == pytest.approx(100 * np.mean(within), abs=1e-4)
    sella = [hit for hit, row in zip(within, rows) if row["landmark_index"] == "0"]
    assert measured["per_landmark"][0] == {
        "name": "sella",
        "within_pct": pytest.approx(100 * np.mean(sella), abs=1e-4),
        "mean": measured["per_landmark"][0]["mean"],
    }
    spacing = [float(row["error_mm"]) / float(row["error_px"]) for row in rows]
    radii = [factor * float(row["spread_px"]) * mm for row, mm in zip(rows, spacing)]
    assert measured["mean"] == pytest.approx(np.mean(radii), rel=1e-4)
    assert plan_calibration(calibrated).cfg.name == "tiny"  # the run is still a finished one


def test_finished_folds_are_not_trained_again_and_give_the_same_bytes(calibrated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(calibrated, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    planned = plan_calibration(run)
    assert str(planned) == f"{run}: 4 folds, 0 to train"
    calibrate(planned, HERE, coverage=0.8)
    assert {path: path.read_bytes() for path in before} == before
    calibrate(plan_calibration(run), HERE, coverage=0.5)
    narrower, wider = (read_json(path / "radius.json") or {} for path in (run, calibrated))
    assert narrower["factor"] < wider["factor"]


def test_too_few_points_give_no_radius_and_an_earlier_one_goes(calibrated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(calibrated, run)
    result = run_command("calibrate", run, "--cpu", 1, "--coverage", 0.99)
    assert result.code == 0, result.err
    assert f"{run}: no radius. 76 points of 4 left-out images tell as much as" in result.out
    assert "too few for 99 %, or too many could not be read; label more" in result.out
    assert (read_json(run / "radius.json") or {})["factor"] is None
    assert "radius" not in (read_json(run / "results.json") or {})


def test_a_run_that_scores_itself_again_measures_its_coverage_too(calibrated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(calibrated, run)
    (run / "done.json").unlink()
    (run / "results.json").unlink()
    with pytest.raises(CheckpointError, match=rf"has not finished; `ddpm-lmk finetune {run}/config.yaml --out {run}`"):
        plan_calibration(run)
    again = run_command("finetune", run / "config.yaml", "--out", run, "--cpu", 1)
    assert again.code == 0, again.err
    one, other = (json.loads((path / "results.json").read_text()) for path in (run, calibrated))
    assert {key: value for key, value in one.items() if key != "train"} == {
        key: value for key, value in other.items() if key != "train"
    }


def test_predictions_have_radii_and_overlays_show_them(finished: Path, calibrated: Path, tmp_path: Path) -> None:
    picture = tmp_path / "skull.png"
    cv2.imwrite(str(picture), np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    words = (picture, "--device", "cpu", "--out")
    done = run_command("predict", calibrated, "--mm-per-px", 0.5, *words, tmp_path / "with")
    assert done.code == 0, done.err
    without = run_command("predict", finished, *words, tmp_path / "without")
    assert f"no radius_px: `ddpm-lmk calibrate {finished}` learns which" in without.err
    factor = json.loads((calibrated / "radius.json").read_text())["factor"]
    rows = rows_of(tmp_path / "with" / "predictions.csv")
    for row in rows:
        assert float(row["radius_px"]) == pytest.approx(factor * float(row["spread_px"]), abs=2e-3)
        assert float(row["radius_mm"]) == pytest.approx(0.5 * float(row["radius_px"]), abs=1e-4)
    told = json.loads((tmp_path / "with" / "predictions.json").read_text())
    assert told["radius_coverage"] == 0.8
    assert told["images"][0]["points"][0]["radius_px"] == float(rows[0]["radius_px"])
    assert all(row["radius_px"] == row["radius_mm"] == "" for row in rows_of(tmp_path / "without" / "predictions.csv"))
    empty = json.loads((tmp_path / "without" / "predictions.json").read_text())
    assert empty["radius_coverage"] is empty["images"][0]["points"][0]["radius_px"] is None
    drawn = [cv2.imread(str(tmp_path / name / "overlays" / "skull.png")) for name in ("with", "without")]
    assert (drawn[0] != drawn[1]).any()


def test_evaluating_another_split_measures_coverage_there(
    finished: Path, calibrated: Path, packed_phantoms: Path, tmp_path: Path
) -> None:
    words = ("--data", packed_phantoms, "--split", "val", "--device", "cpu")
    done = run_command("evaluate", calibrated, *words, "--out", tmp_path / "val")
    assert done.code == 0, done.err
    measured = (read_json(tmp_path / "val" / "results.json") or {})["radius"]
    assert f"radius: {measured['within_pct']:.1f} % of the true points are within theirs, wanted 80 %" in done.out
    plain = run_command("evaluate", finished, *words, "--out", tmp_path / "plain")
    assert plain.code == 0
    assert "radius" not in plain.out


def test_a_report_has_a_table_of_the_runs_that_have_a_radius(finished: Path, calibrated: Path, tmp_path: Path) -> None:
    for run, times in ((finished, 0), (calibrated, 1)):
        done = run_command("report", run, "--out", tmp_path / f"{times}.html")
        assert done.code == 0, done.err
        page = (tmp_path / f"{times}.html").read_text()
        assert page.count("<h2>Radius</h2>") == times
    measured = (read_json(calibrated / "results.json") or {})["radius"]
    worst = min((row["within_pct"], row["name"]) for row in measured["per_landmark"])
    for cell in (f"{measured['within_pct']:.2f} %", f"{measured['mean']:.2f} mm", "80 %", f", {worst[0]:.0f} %"):
        assert cell in page


def test_one_that_is_stopped_in_a_fold_is_resumed_to_the_same_bytes(packed_phantoms: Path, tmp_path: Path) -> None:
    cfg = config(packed_phantoms, shots=2)
    cfg = RunConfig.model_validate(cfg.model_dump() | {"train": {"duration": "20 steps", "global_batch_size": 4}})
    execute(cfg, tmp_path / "run", device="cpu")
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    calibrate(plan_calibration(tmp_path / "straight"), HERE, coverage=0.7)

    words = ["calibrate", str(tmp_path / "run"), "--cpu", "1", "--coverage", "0.7"]
    child = subprocess.Popen([sys.executable, "-m", "ddpm_lmk.cli", *words], stderr=subprocess.PIPE, text=True)
    second = tmp_path / "run" / "folds" / "1-of-2"
    while not (second / "metrics.jsonl").exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "the same command continues" in said
    assert (tmp_path / "run" / "folds" / "0-of-2" / "done.json").exists()
    assert not (second / "done.json").exists()
    assert not (tmp_path / "run" / "radius.json").exists()
    resumed = run_command(*words)
    assert resumed.code == 0, resumed.err
    assert "2 folds, 1 to train" in resumed.err
    one, other = ((tmp_path / name / "radius.json").read_bytes() for name in ("run", "straight"))
    assert one == other


def test_runs_that_cannot_be_calibrated_say_why(packed_phantoms: Path, finished: Path, tmp_path: Path) -> None:
    def run_of(name: str, **data: Any) -> Path:
        execute(config(packed_phantoms, **data), tmp_path / name, device="cpu")
        return tmp_path / name

    with pytest.raises(ConfigError, match=r"from 1 labelled image, so none can be left out .*; label another"):
        plan_calibration(run_of("one", shots=1))
    with pytest.raises(ConfigError, match=r"holds out a part of its images itself \(data\.hold_out\)"):
        plan_calibration(run_of("held", hold_out={"fold": 0, "of": 2}))
    with pytest.raises(ConfigError, match=r"--folds 5, but .* has learnt from 4 labelled images; use 2\.\.4"):
        plan_calibration(finished, 5)
    with pytest.raises(CheckpointError, match="is no run directory; wanted a finished fine-tuning run, of a sweep its"):
        plan_calibration(tmp_path)
    other = config(packed_phantoms).model_dump() | {"task": {"kind": "denoise", "num_timesteps": 20}}
    other["data"]["shots"], other["evaluate"]["split"] = None, None
    execute(RunConfig.model_validate(other), tmp_path / "denoise", device="cpu")
    with pytest.raises(ConfigError, match="is a run of task denoise, wanted landmarks"):
        plan_calibration(tmp_path / "denoise")


def test_images_that_are_gone_are_said_before_a_fold_begins(tmp_path: Path) -> None:
    settings = PackSettings(kind="phantom", size=32, counts={"train": 3, "test": 1}, seed=7)
    pack("skull", tmp_path / "shards", settings, workers=1)
    execute(config(tmp_path / "shards", shots=None), tmp_path / "run", device="cpu")
    planned = plan_calibration(tmp_path / "run")  # all images that there are: three
    assert len(planned.folds) == 3
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="shards"):
        plan_calibration(tmp_path / "run")
    assert not (tmp_path / "run" / "folds").exists()


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("labelled", DataError, "dataset changed since .* was started"),
        ("pool", DataError, r"dataset of data\.propagate\.path changed since .* was started"),
        ("weights", RunConflictError, r"began with other weights than .*start\.safetensors holds now"),
    ],
)
def test_a_run_whose_data_or_starting_weights_were_replaced_is_refused(
    finished: Path, tmp_path: Path, what: str, error: type[LmkError], said: str
) -> None:
    def packed(name: str, seed: int) -> None:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        settings = PackSettings(kind="phantom", size=64, counts={"train": 4, "test": 2}, seed=seed)
        pack("skull", tmp_path / name, settings, workers=1)

    def weights(scale: float) -> None:
        tensors = {key: scale * value for key, value in load_weights(finished, "auto")[0].items()}
        safetensors.torch.save_file(tensors, tmp_path / "start.safetensors")

    packed("labelled", 1)
    packed("pool", 2)
    weights(1)
    values = config(tmp_path / "labelled", shots=2).model_dump(mode="json")
    values["init"]["weights"] = str(tmp_path / "start.safetensors")
    if what == "pool":
        values["data"] |= {"fine_size": 64, "propagate": {"path": [str(tmp_path / "pool")], "agree": 0.2}}
        values["task"]["refine"] = {"crop": 0.5}
        values["init"]["weights"] = None
    run = tmp_path / "run"
    execute(RunConfig.model_validate(values), run, device="cpu")
    assert len(plan_calibration(run).left) == 2

    weights(2) if what == "weights" else packed(what, 3)
    with pytest.raises(error, match=said):
        plan_calibration(run)
    refused = run_command("calibrate", run, "--cpu", 1)
    assert refused.code == error.exit_code
    assert not (run / "folds").exists()
    assert not (run / "radius.json").exists()


def test_one_run_that_has_no_radius_does_not_stop_the_others(
    packed_phantoms: Path, finished: Path, tmp_path: Path
) -> None:
    execute(config(packed_phantoms, shots=1), tmp_path / "one", device="cpu")
    shutil.copytree(finished, tmp_path / "four")
    dry = run_command("calibrate", tmp_path / "four", "--folds", 2, "--dry-run")
    assert dry.code == 0, dry.err
    assert dry.out.startswith(f"{tmp_path / 'four'}: 2 folds, 2 to train, ")
    assert not (tmp_path / "four" / "folds").exists()
    both = run_command("calibrate", tmp_path / "one", tmp_path / "four", "--folds", 2, "--coverage", 0.6, "--cpu", 1)
    assert both.code == 2
    assert both.err.splitlines()[-1].startswith(f"error[ConfigError]: {tmp_path / 'one'} has learnt from 1 labelled")
    assert (read_json(tmp_path / "four" / "radius.json") or {})["folds"] == 2


def test_each_dataset_of_a_mixture_has_its_own_radius(tmp_path: Path) -> None:
    for kind, seed in (("chest", 1), ("hand", 2)):
        settings = PackSettings(kind="phantom", size=32, counts={"train": 4, "test": 2}, seed=seed)
        pack(kind, tmp_path / kind, settings, workers=1)
    cfg = config(tmp_path / "chest", path=[str(tmp_path / "chest"), str(tmp_path / "hand")], shots=3)
    execute(cfg, tmp_path / "run", device="cpu")
    found = calibrate(plan_calibration(tmp_path / "run"), HERE, coverage=0.7)
    assert [(each["spec"], each["points"], each["constant"]["unit"]) for each in found] == [
        ("phantom-chest", 3 * 6, "px"),
        ("phantom-hand", 3 * 37, "mm"),
    ]
    results = read_json(tmp_path / "run" / "results.json") or {}
    for part in results["parts"]:
        inner = read_json(tmp_path / "run" / part["folder"] / "results.json") or {}
        assert inner["radius"] == part["radius"]
        assert {"per_landmark", "within_pct"} <= part["radius"].keys()
    picture = tmp_path / "hand.png"
    cv2.imwrite(str(picture), np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    words = ("--dataset", "phantom-hand", "--out", tmp_path / "found", "--device", "cpu")
    done = run_command("predict", tmp_path / "run", picture, *words)
    assert done.code == 0, done.err
    factor = (read_json(tmp_path / "run" / "parts" / "phantom-hand" / "radius.json") or {})["factor"]
    for row in rows_of(tmp_path / "found" / "predictions.csv"):
        assert float(row["radius_px"]) == pytest.approx(factor * float(row["spread_px"]), abs=2e-3)
