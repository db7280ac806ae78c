"""A run as a hub folder: the same points and scores, a card that the hub's library reads, and nobody's folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard

import ddpm_lmk
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import CheckpointError, ConfigError, RunConflictError
from ddpm_lmk.inference.evaluate import evaluate_run
from ddpm_lmk.report.hub import CARD, PICTURE, export_hub
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from tests.cli.commands import run_command


def config(path: list[str], task: dict[str, Any], **sections: Any) -> RunConfig:
    data = {"path": path, "image_size": 32, **sections.pop("data", {})}
    is_scored = task["kind"] == "landmarks"
    return RunConfig.model_validate(
        {
            "name": f"tiny-{task['kind']}",
            "data": data,
            "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
            "task": task,
            "train": {"duration": "2 steps", "global_batch_size": 4, "precision": "fp32"},
            "runtime": {"workers": 0},
            "evaluate": {"split": "test" if is_scored else None, "batch": 4},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("patients-of-dr-who")
    for kind in ("chest", "skull"):
        settings = PackSettings(kind="phantom", size=32, counts={"train": 5, "test": 3}, seed=7)
        pack(kind, folder / kind, settings, workers=1)
    return [str(folder / "chest"), str(folder / "skull")]


@pytest.fixture(scope="module")
def parent(packs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    execute(config(packs[:1], {"kind": "denoise", "num_timesteps": 20}), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def run(packs: list[str], parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chests by name, from pre-trained weights."""
    out = tmp_path_factory.mktemp("runs") / "chests"
    manifest = Manifest.open(packs[0])
    names = [manifest.read_record(int(row)).id for row in manifest.rows(["train"])[:3]]
    sections = {
        "data": {"draw": "listed", "images": names, "shots": 3},
        "init": {"weights": str(parent)},
        "runtime": {"workers": 0, "cache_dir": str(out.parent / "cache")},
        "train": {"duration": "2 steps", "global_batch_size": 4, "precision": "fp32", "snapshot_every": "1 steps"},
    }
    execute(config(packs[:1], {"kind": "landmarks"}, **sections), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def hub(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hub(run, out=tmp_path_factory.mktemp("hub") / "chests", license="CC-BY-NC-4.0")


def points(folder: Path, film: np.ndarray) -> np.ndarray:
    return ddpm_lmk.load(folder, device="cpu").predict(film).points


def test_the_folder_finds_the_points_of_its_run_and_gets_its_scores(
    run: Path, hub: Path, packs: list[str], tmp_path: Path
) -> None:
    film = render("chest", 3, 0).image
    np.testing.assert_array_equal(points(hub, film), points(run, film))
    cv2.imwrite(str(tmp_path / "film.png"), film)
    done = run_command("predict", hub, tmp_path / "film.png", "--out", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [[each["x"], each["y"]] for each in found["points"]] == points(run, film).round(3).tolist()
    results = json.loads((run / "results.json").read_text())
    again = evaluate_run(hub, data=packs[0], split="test", out=tmp_path / "scored", device="cpu")
    for key in ("protocols", "mean_shape", "labels", "pixels", "num_images"):
        if key == "mean_shape":  # from points that the results keep with six digits
            assert again[key]["original"]["mre"] == pytest.approx(results[key]["original"]["mre"], rel=1e-4)
        else:
            assert again[key] == results[key]
    # The folder does not say where the pre-training was, and so it cannot be asked.
    assert again["leakage"]["pretraining"]["status"] == "unknown"


def test_the_cache_of_the_hub_which_holds_links_is_read_too(run: Path, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "0123").mkdir(parents=True)
    for number, path in enumerate(sorted(hub.iterdir())):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / "0123" / path.name).symlink_to(Path("../../blobs") / str(number))
    film = render("chest", 3, 0).image
    np.testing.assert_array_equal(points(tmp_path / "snapshots" / "0123", film), points(run, film))


def test_damage_is_noticed(hub: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(hub, copy)
    (copy / CARD).write_text("a card of our own")  # which anybody may write
    load_weights(copy, "auto")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        ddpm_lmk.load(copy, device="cpu")
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="its manifest says"):
        ddpm_lmk.load(copy, device="cpu")
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace('"image_size": 32', '"image_size": 64')
    )
    with pytest.raises(CheckpointError, match="does not match its own digest"):
        ddpm_lmk.load(copy, device="cpu")


def test_the_library_of_the_hub_reads_the_card(run: Path, hub: Path) -> None:
    card = ModelCard.load(hub / CARD)
    results = json.loads((run / "results.json").read_text())["protocols"]["original"]
    assert (card.data.license, card.data.library_name) == ("cc-by-nc-4.0", "ddpm-lmk")
    assert card.data.pipeline_tag == "keypoint-detection"
    found = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert found["MRE (px)"] == pytest.approx(results["mre"], abs=1e-4)
    assert found["SDR 3 px (%)"] == pytest.approx(results["sdr"]["3"], abs=0.01)
    assert {(each.dataset_name, each.dataset_split) for each in card.data.eval_results} == {("phantom-chest", "test")}


def test_the_card_says_what_the_files_of_the_run_say(run: Path, hub: Path) -> None:
    text = (hub / CARD).read_text()
    results = json.loads((run / "results.json").read_text())
    errors = np.array(
        [float(line.split(",")[7]) for line in (run / "predictions.csv").read_text().splitlines()[1:]]
    ).reshape(3, 6)
    over_images, over_points = errors.mean(1).std(ddof=1), errors.std(ddof=1)
    mre = results["protocols"]["original"]["mre"]
    for words in (
        "Finds the 6 landmarks of phantom-chest",
        "phantom-chest: 3 training labels (chosen by hand), packed at 32 pixels, seen at 32",
        "| starting weights | tiny-denoise |",
        "3 images with 6 landmarks each; 3 training labels, 0 validation labels",
        f"| original | {mre:.2f} px |",
        f"| {results['mean_shape']['original']['mre']:.2f} px |",
        f"{mre:.2f} ± {over_images:.2f} px over the mean errors of 3 images, {mre:.2f} ± {over_points:.2f} px over 18",
        "pre-training: none found; labelled training images: none found",
        "It is no medical device",
        "Of these weights: CC-BY-NC-4.0.",
        f"]({PICTURE})",
    ):
        assert words in text
    # Its pre-training may have seen anything.
    assert "phantoms only" not in text
    assert (hub / PICTURE).is_file()


def test_a_snapshot_that_was_not_selected_has_no_scores(run: Path, tmp_path: Path) -> None:
    folder = export_hub(run / "snapshots" / "step-00000001", out=tmp_path / "first")
    text, kept = (folder / CARD).read_text(), json.loads((folder / "config.json").read_text())
    assert "| weights | step 1, their moving average |" in text
    assert "Nothing was scored" in text
    assert "MRE" not in text
    assert kept["step"] == 1
    assert "mean_shape_points" in kept["results"]
    assert not kept["results"].keys() & {"protocols", "validation", "radius"}
    film = render("chest", 3, 0).image
    np.testing.assert_array_equal(points(folder, film), points(run / "snapshots" / "step-00000001", film))


def test_a_run_is_found_from_where_it_lies(
    run: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    export_hub(run.name, out=tmp_path / "run")
    monkeypatch.chdir(run / "snapshots")
    export_hub("step-00000002", out=tmp_path / "snapshot")
    for name in ("run", "snapshot"):
        assert (tmp_path / name / CARD).read_text() == (hub / CARD).read_text().replace(
            "CC-BY-NC-4.0", "unspecified"
        ).replace("license: cc-by-nc-4.0\n", "")


def test_a_cell_has_the_seeds_of_its_own_row(run: Path, tmp_path: Path) -> None:
    cells = {"a": (0, 0, 1.0), "b": (1, 0, 3.0), "c": (2, 1, 50.0)}  # seed, labels of validation, MRE
    for name, (seed, validation, mre) in cells.items():
        cell = tmp_path / "cells" / name
        shutil.copytree(run, cell)
        results = json.loads((cell / "results.json").read_text())
        results |= {"seed": seed, "draw": "random"}
        results["labels"]["validation"] = validation
        results["protocols"]["original"]["mre"] = mre
        (cell / "results.json").write_text(json.dumps(results))
    other = tmp_path / "cells" / "a" / "evaluate-train"  # another evaluation, which is a study of its own
    other.mkdir()
    results = json.loads((tmp_path / "cells" / "a" / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(results | {"split": "train"}))
    sweep = {"cells": [{"cell": name, "start": "ours"} for name in cells]}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    text = (export_hub(tmp_path / "cells" / "b", out=tmp_path / "hub") / CARD).read_text()
    assert "Over the 2 seeds of its sweep (shots and order): 2.00 ± 1.41 px. This is one of them." in text
    text = (export_hub(tmp_path / "cells" / "c", out=tmp_path / "alone") / CARD).read_text()
    assert "of its sweep" not in text


def test_no_folder_and_no_id_of_an_image_leaves(run: Path, hub: Path, packs: list[str]) -> None:
    manifest = Manifest.open(packs[0])
    ids = [manifest.read_record(row).id for row in range(len(manifest))]
    for path in hub.iterdir():
        content = path.read_bytes()
        for secret in (*ids, "patients-of-dr-who", str(run.parent), "/tmp", "pytest"):
            assert secret.encode() not in content, (path, secret)
    assert {path.name for path in hub.iterdir()} == {"README.md", "config.json", "model.safetensors", PICTURE}
    assert all(path.stat().st_mode & 0o077 == 0 for path in hub.iterdir())


def test_without_the_data_there_is_no_picture_and_a_licence_is_never_invented(
    run: Path, packs: list[str], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").rglob("meta.json"):
        meta = json.loads(path.read_text())
        assert packs[0] in meta["config"]["data"]["path"]
    Path(packs[0]).rename(tmp_path / "away")
    try:
        folder = export_hub(tmp_path / "run")
    finally:
        (tmp_path / "away").rename(packs[0])
    assert folder == tmp_path / "run" / "export" / "tiny-landmarks-hub"
    text = (folder / CARD).read_text()
    assert not (folder / PICTURE).exists()
    assert "Weights trained on images of patients can give some of them away" in text
    assert "Of these weights: unspecified." in text
    assert "license" not in yaml.safe_load(text.split("---")[1])
    with pytest.raises(RunConflictError, match="exists and is kept"):
        export_hub(tmp_path / "run")
    own = export_hub(tmp_path / "run", out=tmp_path / "own", license="Our clinic only")
    front = yaml.safe_load((own / CARD).read_text().split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "Our clinic only")


def test_a_pre_training_travels_as_starting_weights_with_its_record(
    parent: Path, packs: list[str], tmp_path: Path
) -> None:
    folder = export_hub(parent, out=tmp_path / "start")
    text = (folder / CARD).read_text()
    assert "Weights pre-trained by denoising (DDPM) on 5 x-rays without labels" in text
    assert "They find no landmarks by themselves" in text
    assert "phantoms only" in text
    record = json.loads((folder / "leakage.json").read_text())
    assert [set(each) for each in record["trained_on"]] == [{"dataset", "fingerprint", "splits", "images"}]
    assert "listed" not in record
    with pytest.raises(ConfigError, match="is a run of task denoise, wanted landmarks"):
        ddpm_lmk.load(folder, device="cpu")
    cfg = config(packs[:1], {"kind": "landmarks"}, init={"weights": str(folder)})
    results = execute(cfg, tmp_path / "run", device="cpu")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parent"]["loaded"] == "trunk"
    assert results["leakage"]["pretraining"]["status"] == "clean"  # by the record that came with it


def test_a_mixture_has_scores_and_a_radius_of_each_dataset(packs: list[str], tmp_path: Path) -> None:
    execute(config(packs, {"kind": "landmarks"}), tmp_path / "both", device="cpu")
    radius = {"spec": "phantom-skull", "step": 2, "coverage": 0.9, "factor": 1.5}
    radius["landmarks"] = list(Manifest.open(packs[1]).spec.landmark_names)
    (tmp_path / "both" / "parts" / "phantom-skull" / "radius.json").write_text(json.dumps(radius))
    folder = export_hub(tmp_path / "both", out=tmp_path / "hub")
    text = (folder / CARD).read_text()
    assert "Finds the 6 landmarks of phantom-chest and the 19 landmarks of phantom-skull in x-rays" in text
    assert "Scores on phantom-chest" in text
    assert "Scores on phantom-skull" in text
    assert 'load("FOLDER", dataset="phantom-chest")' in text
    film = render("skull", 3, 0).image
    found = {
        name: ddpm_lmk.load(folder, dataset=name, device="cpu").predict(film)
        for name in ("phantom-chest", "phantom-skull")
    }
    assert found["phantom-chest"].radius_px is None
    skull = found["phantom-skull"]
    assert skull.radius_px is not None
    np.testing.assert_allclose(skull.radius_px[~skull.failed], 1.5 * skull.spread_px[~skull.failed])
    with pytest.raises(CheckpointError, match="is no run"):
        export_hub(folder, out=tmp_path / "again")


def test_a_hub_folder_of_another_tool_is_a_plain_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    weights, meta = load_weights(tmp_path, "ema")
    assert list(weights) == ["a"]
    assert "config" not in meta
    with pytest.raises(CheckpointError, match="holds weights only"):
        ddpm_lmk.load(tmp_path, device="cpu")


def test_a_licence_is_for_the_card(run: Path, tmp_path: Path) -> None:
    done = run_command("export", run, "--license", "mit", "--out", tmp_path / "weights.safetensors")
    assert done.code == 2
    assert "--license=mit is written into the card of --format hub" in done.err
    done = run_command("export", run, "--format", "hub", "--license", "mit", "--out", tmp_path / "hub")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "hub"))
