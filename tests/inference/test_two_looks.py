"""Runs with a second look, from training to export: resumed, in a sweep's worker, scored, predicted, reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.forecast import random_batch
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.session import Session
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.inference.evaluate import evaluate_run
from ddpm_lmk.inference.export import export_run
from ddpm_lmk.inference.load import open_run
from ddpm_lmk.inference.predict import predict_images
from ddpm_lmk.launcher.preflight import remarks
from ddpm_lmk.report.page import write_report
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from ddpm_lmk.tasks import build_task
from ddpm_lmk.tasks.second_look import LEAST_SPREAD, REACH

SIZE, FINE = 32, 64
UNET = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skulls of 64 pixels."""
    out = tmp_path_factory.mktemp("packs") / "skulls"
    counts = {"train": 6, "val": 3, "test": 4}
    pack("skull", out, PackSettings(kind="phantom", size=FINE, counts=counts, seed=7), workers=1)
    return out


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def fields(packed: Path | list[str], task: dict[str, Any], **sections: Any) -> dict[str, Any]:
    augment = {"probability": 1, "rotate_deg": 8, "scale": 0.1, "gamma": 0.2, "noise": 0.05}
    path = packed if isinstance(packed, list) else str(packed)
    values: dict[str, Any] = {
        "name": "twice",
        "data": {"path": path, "image_size": SIZE, "fine_size": FINE, "augment": augment},
        "model": UNET,
        "task": task,
        "optim": {"lr": 1e-3},
        "train": {"duration": "4 steps", "global_batch_size": 4, "precision": "fp32"},
        "runtime": {"workers": 0, "log_every": 1, "checkpoint_every": 2},
        "evaluate": {"split": "test" if task["kind"] == "landmarks" else None, "batch": 3},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) and name != "model" else section
    return values


def twice(packed: Path | list[str], **sections: Any) -> RunConfig:
    task = {"kind": "landmarks", "views": 2, "refine": {"crop": 0.5}} | sections.pop("task", {})
    return RunConfig.model_validate(fields(packed, task, **sections))


def zooming(packed: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(fields(packed, {"kind": "denoise", "num_timesteps": 20, "zoom": {}}, **sections))


@pytest.fixture(scope="module")
def parent(packed: Path, parallel: Parallel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "zoomed"
    execute(zooming(packed), out, parallel=parallel)
    return out


@pytest.fixture(scope="module")
def finished(packed: Path, parent: Path, parallel: Parallel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "twice"
    cfg = twice(packed, data={"validation_split": "val"}, init={"weights": str(parent)}, train={"select": "best"})
    execute(cfg, out, parallel=parallel)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def same_weights(one: Path, other: Path) -> bool:
    for use in ("model", "ema"):
        found, wanted = load_weights(one, use)[0], load_weights(other, use)[0]
        assert found.keys() == wanted.keys()
        if any(not torch.equal(found[name], wanted[name]) for name in wanted):
            return False
    return True


def test_a_run_begins_with_its_parent_in_both_parts_and_leaves_both_scores(finished: Path) -> None:
    assert read(finished / "run.json")["parent"]["loaded"] == "trunk"
    results = read(finished / "results.json")
    assert results["coarse"]["original"]["mre"] != results["protocols"]["original"]["mre"]
    assert set(results["coarse"]) == {"original", "paper"}
    errors = np.array([float(row["error_mm"]) for row in read_csv(finished / "predictions.csv")])
    assert errors.mean() == pytest.approx(results["protocols"]["original"]["mre"], rel=1e-4)
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("validation" in line for line in metrics)
    state = load_weights(finished, "model")[0]
    parts = {name.partition(".")[0] for name in state}
    assert parts == {"coarse", "fine"}
    assert not torch.equal(state["coarse.final_conv.weight"], state["fine.final_conv.weight"])


def test_a_later_evaluation_and_the_files_themselves_give_the_same_points(
    finished: Path, packed: Path, tmp_path: Path
) -> None:
    again = evaluate_run(finished, data=packed, split="test", out=tmp_path / "again", device="cpu")
    results = read(finished / "results.json")
    assert (again["protocols"], again["coarse"]) == (results["protocols"], results["coarse"])
    manifest = Manifest.open(packed)
    row = int(manifest.rows(["test"])[0])
    size = manifest.read_record(row).native_size
    picture = cv2.resize(manifest.decode(row), size, interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(str(tmp_path / "film.png"), picture)
    (tmp_path / "table").mkdir()
    cv2.imwrite(str(tmp_path / "table" / "film.png"), picture)
    (tmp_path / "table" / "images.csv").write_text("image_id,file,split\nfilm,film.png,test\n")
    names = manifest.spec.landmark_names
    lines = [f"film,{index},{name},9,9" for index, name in enumerate(names)]
    header = "image_id,landmark_index,landmark_name,x,y"
    (tmp_path / "table" / "landmarks.csv").write_text("\n".join([header, *lines]) + "\n")
    pack(tmp_path / "table", tmp_path / "packed", PackSettings(kind="table", size=FINE), workers=1)
    evaluate_run(finished, data=tmp_path / "packed", split="test", out=tmp_path / "scored", device="cpu")
    assert predict_images(finished, [tmp_path / "film.png"], tmp_path / "found", device="cpu").predicted == 1
    scored, found = (
        list(csv.DictReader((tmp_path / name / "predictions.csv").read_text().splitlines()))
        for name in ("scored", "found")
    )
    for one, other in zip(scored, found, strict=True):
        for key in ("x", "y", "spread_px"):
            assert float(one[key]) == pytest.approx(float(other[key]), abs=0.01)


@pytest.mark.parametrize("make", [twice, zooming])
def test_a_run_that_is_continued_ends_with_the_same_bits(
    make: Any, packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    execute(make(packed), tmp_path / "whole", parallel=parallel)
    execute(make(packed, train={"duration": "2 steps"}), tmp_path / "killed", parallel=parallel)
    execute(make(packed), tmp_path / "killed", parallel=parallel)
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    if make is twice:
        assert (tmp_path / "killed" / "predictions.csv").read_bytes() == (
            tmp_path / "whole" / "predictions.csv"
        ).read_bytes()


def test_cells_of_one_worker_have_the_bits_of_runs_alone(packed: Path, parallel: Parallel, tmp_path: Path) -> None:
    session = Session()
    plain = RunConfig.model_validate(fields(packed, {"kind": "landmarks"}, data={"fine_size": None}))
    cells = {"other": twice(packed, seed=3, data={"shots": 2}), "plain": plain, "warm": twice(packed)}
    for name, cfg in cells.items():
        execute(cfg, tmp_path / name, parallel=parallel, session=session)
    execute(twice(packed), tmp_path / "cold", parallel=parallel)
    assert same_weights(tmp_path / "warm", tmp_path / "cold")
    assert not same_weights(tmp_path / "other", tmp_path / "cold")
    execute(plain, tmp_path / "plain-alone", parallel=parallel)
    assert same_weights(tmp_path / "plain", tmp_path / "plain-alone")


@pytest.mark.parametrize("residency", ["stream", "ram", "device"])
def test_finer_pixels_are_those_of_the_pack_wherever_they_are_kept(packed: Path, residency: str) -> None:
    cfg = twice(packed, runtime={"cache_pixels": residency})
    batch = next(open_loader(cfg, stage="train").global_batches()).micro_batches[0]
    plain = cfg.model_copy(update={"data": cfg.data.model_copy(update={"fine_size": None})})
    usual = next(open_loader(plain, stage="train").global_batches()).micro_batches[0]
    assert torch.equal(batch.images, usual.images)
    assert usual.fine is None
    assert batch.fine is not None
    assert batch.to_fine is not None
    assert batch.points is not None
    manifest = Manifest.open(packed)
    row_of = {manifest.read_record(int(row)).id: int(row) for row in manifest.rows(["train"])}
    for name, fine, points, to_fine in zip(batch.ids, batch.fine, batch.points, batch.to_fine, strict=True):
        record = manifest.read_record(row_of[name])
        np.testing.assert_array_equal(fine[0].numpy(), manifest.decode(row_of[name]))
        stored = record.points @ record.to_stored[:, :2].T + record.to_stored[:, 2]
        np.testing.assert_allclose(points @ to_fine[:, :2].T + to_fine[:, 2], stored, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "codec"),
    [
        ({"kind": "encoder_unet", "scale": 0.1, "blocks": [1, 1, 1, 1]}, {"kind": "disc"}),
        ({"kind": "gu2net", "width": 4}, {"kind": "gaussian"}),
        (UNET, {"kind": "contour"}),
    ],
)
def test_every_network_learns_a_mixture_of_datasets_with_two_looks(
    model: dict[str, Any], codec: dict[str, Any], packed: Path, parallel: Parallel, tmp_path: Path
) -> None:
    counts = {"train": 4, "test": 2}
    pack("chest", tmp_path / "chests", PackSettings(kind="phantom", size=FINE, counts=counts), workers=1)
    cfg = twice([str(packed), str(tmp_path / "chests")], model=model, task={"codec": codec, "views": 1})
    results = execute(cfg, tmp_path / "run", parallel=parallel)
    assert [part["spec"] for part in results["parts"]] == ["phantom-skull", "phantom-chest"]
    for part in results["parts"]:
        assert part["coarse"]["original"]["mre"] > 0
    again = evaluate_run(tmp_path / "run", data=tmp_path / "chests", split="test", out=tmp_path / "out", device="cpu")
    assert again["protocols"] == results["parts"][1]["protocols"]


def test_one_safetensors_file_holds_both_networks_and_how_to_cut_crops(finished: Path, tmp_path: Path) -> None:
    (path,) = export_run(finished, out=tmp_path / "weights.safetensors")
    state = open_run(finished, device="cpu").model.state_dict()
    with safetensors.safe_open(str(path), "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    assert {name.partition(".")[0] for name in state} == {"coarse", "fine"}
    assert facts["fine_size"] == FINE
    assert facts["task"]["landmarks"]["refine"]["crop"] == 0.5
    assert facts["task"]["second_look"] == {"size": SIZE, "reach": REACH, "least_spread": LEAST_SPREAD}


@pytest.mark.extra("onnx")
def test_onnx_has_a_file_for_each_look_with_the_maps_of_torch(finished: Path, tmp_path: Path) -> None:
    import onnxruntime as runtime

    whole, crop = export_run(finished, format="onnx", out=tmp_path / "net.onnx")
    assert (whole.name, crop.name) == ("net.onnx", "net-fine.onnx")
    model = open_run(finished, device="cpu").model
    images = torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for path, part in ((whole, "coarse"), (crop, "fine")):
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (maps,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            wanted = getattr(model, part)(images, None)
        np.testing.assert_allclose(maps, wanted.numpy(), atol=1e-4)
        facts = session.get_modelmeta().custom_metadata_map
        assert json.loads(facts["part"]) == part
        assert json.loads(facts["task"])["landmarks"]["refine"]["jitter"] == 0.06


def test_a_report_describes_both_looks_and_shows_them_side_by_side(
    finished: Path, parent: Path, tmp_path: Path
) -> None:
    page = write_report([finished], tmp_path / "report.html")[0].read_text()
    results = read(finished / "results.json")
    assert "and a second one for crops of 0.5 of the side at 32²" in page
    assert "50 % of images zoomed in, to 0.125 of the side" in page
    assert "Second look" in page
    for look in ("coarse", "protocols"):
        assert f"{results[look]['original']['mre']:.2f}" in page


def test_training_costs_an_image_and_its_crops(finished: Path, packed: Path) -> None:
    results = read(finished / "results.json")
    cfg = twice(packed)
    once = RunConfig.model_validate(fields(packed, {"kind": "landmarks"}, data={"fine_size": None}))
    spec = Manifest.open(packed).spec
    one, both = (build_task(each, spec).cost(each.model, SIZE) for each in (once, cfg))
    assert (both.params, both.flops_train) == (2 * one.params, 3 * one.flops_train)
    assert results["train"]["tflop"] == pytest.approx(both.flops_train * results["train"]["images"] / 1e12, abs=1e-6)
    assert results["train"]["tflop_crops"] == pytest.approx(results["train"]["tflop"] * 2 / 3, abs=2e-6)
    batch = random_batch(cfg, build_task(cfg, spec), 2)
    assert batch.fine is not None
    assert batch.fine.shape == (2, 1, FINE, FINE)


def test_what_cannot_be_is_refused_in_words(packed: Path) -> None:
    for sections, words in (
        ({"data": {"fine_size": None}}, "task.refine cuts crops from finer pixels.* data.fine_size, e.g. 128"),
        ({"task": {"refine": None}}, "fine_size=64 would load pixels that nothing uses; set task.refine"),
        ({"data": {"fine_size": SIZE}}, "fine_size=32 is no finer than image_size=32"),
        ({"task": {"refine": {"jitter": 0.2}}}, "jitter=0.2 moves landmarks out of crops of side 0.25"),
        ({"task": {"refine": {"size": 33}}}, "task.refine.size=33 must be a multiple of 2"),
        ({"task": {"codec": {"kind": "disc", "masks": "warped"}}}, "masks=warped draws discs on the whole picture"),
        ({"task": {"codec": {"kind": "contour", "temperatures": "fitted"}}}, "with task.refine use none"),
    ):
        with pytest.raises(ValueError, match=words):
            twice(packed, **sections)
    with pytest.raises(ValueError, match=r"task\.zoom cuts crops from finer pixels"):
        zooming(packed, data={"fine_size": None})
    dali = twice(packed, runtime={"loader": "dali"})
    with pytest.raises(ConfigError, match=r"data\.fine_size=64 wants finer ones beside them"):
        open_loader(dali, stage="train")
    (line,) = remarks(twice(packed, data={"fine_size": 128}), open_loader(dali, stage="train", backend="torch").corpora)
    assert "enlarged to data.fine_size=128 and gain no detail; pack them with --size 128" in line
