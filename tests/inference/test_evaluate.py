"""Scoring, predicting, sampling and exporting with real runs, and with a model that knows the answer."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import safetensors
import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.batch import Batch
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError, ConfigError, DataError, LaunchError
from ddpm_lmk.inference import scoring
from ddpm_lmk.inference.evaluate import evaluate_run, evaluate_split
from ddpm_lmk.inference.export import export_run, sample_run
from ddpm_lmk.inference.load import open_run
from ddpm_lmk.inference.predict import list_images, predict_images
from ddpm_lmk.run import execute
from ddpm_lmk.tasks import LandmarkTask
from ddpm_lmk.tasks.codecs import Decoded
from tests.data.dicoms import dataset, to_bytes

SEED = 7  # of the packed phantoms


def config(packed: Path, **sections: object) -> RunConfig:
    """A network too small to learn anything, on phantoms."""
    values = {
        "name": "tiny",
        "data": {"path": str(packed), "image_size": 32, "shots": 4, "validation_split": "val"},
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "task": {"kind": "landmarks"},
        "train": {"duration": "3 steps", "global_batch_size": 4},
        "runtime": {"workers": 0, "log_every": "1 steps"},
        "evaluate": {"split": "test", "batch": 4},
    }
    return RunConfig.model_validate(values | sections)


@pytest.fixture(scope="module")
def landmark_run(packed_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning run."""
    out = tmp_path_factory.mktemp("runs") / "landmarks"
    execute(config(packed_phantoms), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def denoise_run(packed_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training run."""
    out = tmp_path_factory.mktemp("runs") / "denoise"
    data = {"path": str(packed_phantoms), "image_size": 32}
    task = {"kind": "denoise", "num_timesteps": 20}
    execute(config(packed_phantoms, data=data, task=task), out, device="cpu")
    return out


class Oracle(LandmarkTask):
    """Finds every landmark `offset` network px from where it is; `broken` images get NaN."""

    def __init__(self, cfg: RunConfig, data: Path, offset: tuple[float, float], broken: str = "") -> None:
        assert cfg.task.kind == "landmarks"
        super().__init__(cfg.task, Manifest.open(data).spec)
        self.offset, self.broken = torch.tensor(offset), broken

    def predict(self, model: nn.Module, batch: Batch) -> Decoded:
        assert batch.points is not None
        points = batch.points + self.offset
        points[[name == self.broken for name in batch.ids]] = float("nan")
        shape = points.shape[:2]
        return Decoded(points, torch.full(shape, 2.0), torch.zeros(shape, dtype=torch.bool))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_known_offsets_come_out_in_native_pixels_and_millimetres(packed_phantoms: Path, tmp_path: Path) -> None:
    cfg = config(packed_phantoms)
    task = Oracle(cfg, packed_phantoms, (3.0, -4.0))
    results = evaluate_split(cfg, task, nn.Identity(), Parallel("cpu"), split="test", out=tmp_path)
    manifest = Manifest.open(packed_phantoms)
    records = [manifest.read_record(int(row)) for row in manifest.rows(["test"])]
    step = np.array([np.hypot(3 * record.native_size[0] / 32, 4 * record.native_size[1] / 32) for record in records])
    assert results["num_images"] == len(records)
    original = results["protocols"]["original"]
    assert original["mre_px"] == pytest.approx(step.mean(), rel=1e-4)
    assert original["mre"] == pytest.approx((step * [record.mm_per_px for record in records]).mean(), rel=1e-4)
    rows = read_csv(tmp_path / "predictions.csv")
    assert [row["image_id"] for row in rows[:: task.spec.num_landmarks]] == [record.id for record in records]
    width, height = records[0].native_size
    assert float(rows[0]["x"]) - float(rows[0]["true_x"]) == pytest.approx(3 * width / 32, abs=1e-3)
    assert float(rows[0]["y"]) - float(rows[0]["true_y"]) == pytest.approx(-4 * height / 32, abs=1e-3)
    assert float(rows[0]["spread_px"]) == pytest.approx(2 * np.sqrt(width * height) / 32, rel=1e-3)
    assert np.mean([float(row["error_mm"]) for row in rows]) == pytest.approx(original["mre"], rel=1e-4)


def test_the_mean_shape_is_that_of_the_runs_own_shots(packed_phantoms: Path, tmp_path: Path) -> None:
    cfg = config(packed_phantoms)
    task = Oracle(cfg, packed_phantoms, (0.0, 0.0))
    results = evaluate_split(cfg, task, nn.Identity(), Parallel("cpu"), split="test", out=tmp_path)
    manifest = Manifest.open(packed_phantoms)
    train = [manifest.read_record(int(row)) for row in manifest.rows(["train"])[:4]]
    test = [manifest.read_record(int(row)) for row in manifest.rows(["test"])]
    shape = np.mean([(record.points + 0.5) / record.native_size for record in train], axis=0)
    errors = [
        np.linalg.norm(shape * record.native_size - 0.5 - record.points, axis=-1) * record.mm_per_px for record in test
    ]
    assert results["mean_shape"]["original"]["mre"] == pytest.approx(np.mean(errors))
    assert results["protocols"]["original"]["mre"] == pytest.approx(0, abs=1e-3)
    assert results["labels"] == {"training": 4, "validation": 4}
    assert results["spec"] == "phantom-skull"


def test_a_prediction_that_is_not_finite_stops_the_scoring(packed_phantoms: Path, tmp_path: Path) -> None:
    cfg = config(packed_phantoms)
    manifest = Manifest.open(packed_phantoms)
    broken = manifest.read_record(int(manifest.rows(["test"])[2])).id
    task = Oracle(cfg, packed_phantoms, (0.0, 0.0), broken)
    with pytest.raises(DataError, match=f"prediction that is not finite .first: {broken}"):
        evaluate_split(cfg, task, nn.Identity(), Parallel("cpu"), split="test", out=tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_run_leaves_scores_that_its_predictions_and_a_later_evaluation_give_again(
    landmark_run: Path, packed_phantoms: Path, tmp_path: Path
) -> None:
    results = json.loads((landmark_run / "results.json").read_text())
    rows = read_csv(landmark_run / "predictions.csv")
    errors = np.array([float(row["error_mm"]) for row in rows])
    assert errors.shape == (6 * 19,)
    original = results["protocols"]["original"]
    assert original["mre"] == pytest.approx(errors.mean(), rel=1e-4)
    assert original["sdr"]["4"] == pytest.approx(100 * (errors <= 4).mean())
    assert original["per_landmark"][3]["mre"] == pytest.approx(errors[3::19].mean(), rel=1e-4)
    assert results["protocols"]["paper"]["grid"] == scoring.PAPER_GRID
    assert results["train"]["steps"] == 3
    again = evaluate_run(landmark_run, data=packed_phantoms, split="test", out=tmp_path, device="cpu")
    assert {key: again[key] for key in ("labels", "seed", "dataset", "start", "num_images", "protocols")} == {
        key: results[key] for key in ("labels", "seed", "dataset", "start", "num_images", "protocols")
    }
    for protocol, scores in again["mean_shape"].items():  # from points that the results keep with six digits
        assert scores["mre"] == pytest.approx(results["mean_shape"][protocol]["mre"], rel=1e-4)
    assert (tmp_path / "predictions.csv").read_text() == (landmark_run / "predictions.csv").read_text()


def test_a_set_with_other_landmarks_is_refused(landmark_run: Path, tmp_path: Path) -> None:
    pack("chest", tmp_path / "chests", PackSettings(kind="phantom", counts={"test": 2}, size=32), workers=1)
    with pytest.raises(
        DataError, match="the 6 landmarks of phantom-chest, but what was learnt is the 19 of phantom-skull"
    ):
        evaluate_run(landmark_run, data=tmp_path / "chests", split="test", out=tmp_path / "out", device="cpu")


def write_pictures(folder: Path, count: int) -> list[Path]:
    """The first test phantoms as 16-bit PNG files."""
    folder.mkdir()
    files = [folder / f"film-{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        cv2.imwrite(str(file), render("skull", SEED, index).image)
    return files


def test_predicted_files_have_points_in_their_own_pixels_and_an_overlay(landmark_run: Path, tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "films", 3)
    film = cv2.imread(str(files[0]), cv2.IMREAD_UNCHANGED)
    wide = cv2.resize(
        film, None, fx=2, fy=1, interpolation=cv2.INTER_NEAREST
    )  # every column twice: averages to the same
    cv2.imwrite(str(files[2]), wide)
    summary = predict_images(landmark_run, files, tmp_path / "out", mm_per_px=0.5, device="cpu")
    assert (summary.predicted, summary.errors) == (3, {})
    facts = json.loads((tmp_path / "out" / "predictions.json").read_text())
    first, _, stretched = facts["images"]
    assert stretched["width"] == 2 * first["width"]
    for narrow_point, wide_point in zip(first["points"], stretched["points"], strict=True):
        assert wide_point["x"] == pytest.approx(2 * narrow_point["x"] + 0.5, abs=0.1)
        assert wide_point["y"] == pytest.approx(narrow_point["y"], abs=0.1)
        assert narrow_point["x_mm"] == pytest.approx(0.5 * narrow_point["x"], abs=1e-3)
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 3 * 19
    assert rows[0]["landmark_name"] == "sella"
    overlay = cv2.imread(str(tmp_path / "out" / first["overlay"]))
    assert overlay.shape[1] / overlay.shape[0] == pytest.approx(first["width"] / first["height"], rel=0.01)
    assert (overlay.max(-1).astype(int) - overlay.min(-1)).max() > 100  # something coloured was drawn


def test_predicting_a_file_equals_scoring_it_from_shards(
    landmark_run: Path, packed_phantoms: Path, tmp_path: Path
) -> None:
    """The same picture through packing and loading, and straight from its file."""
    files = write_pictures(tmp_path / "table", 2)
    lines = [f"{file.stem},{file.name},test" for file in files]
    (tmp_path / "table" / "images.csv").write_text("\n".join(["image_id,file,split", *lines]) + "\n")
    names = Manifest.open(packed_phantoms).spec.landmark_names
    points = [f"{file.stem},{index},{name},9,9" for file in files for index, name in enumerate(names)]
    header = "image_id,landmark_index,landmark_name,x,y"
    (tmp_path / "table" / "landmarks.csv").write_text("\n".join([header, *points]) + "\n")
    pack(tmp_path / "table", tmp_path / "packed", PackSettings(kind="table", size=32), workers=1)
    evaluate_run(landmark_run, data=tmp_path / "packed", split="test", out=tmp_path / "scored", device="cpu")
    predict_images(landmark_run, files, tmp_path / "out", device="cpu")
    packed = read_csv(tmp_path / "scored" / "predictions.csv")
    direct = read_csv(tmp_path / "out" / "predictions.csv")
    for one, other in zip(packed, direct, strict=True):
        assert float(one["x"]) == pytest.approx(float(other["x"]), abs=0.01)
        assert float(one["y"]) == pytest.approx(float(other["y"]), abs=0.01)
        assert other["x_mm"] == ""


def test_a_bad_file_is_a_row_with_its_error_and_the_others_are_predicted(landmark_run: Path, tmp_path: Path) -> None:
    good, bad, empty = write_pictures(tmp_path / "films", 3)
    bad.write_bytes(bad.read_bytes()[:200])
    empty.write_bytes(b"")
    files = [bad, good, empty, tmp_path / "films" / "missing.png"]
    summary = predict_images(landmark_run, files, tmp_path / "out", device="cpu")
    assert summary.predicted == 1
    assert set(summary.errors) == {str(bad), str(empty), str(tmp_path / "films" / "missing.png")}
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [row["file"] for row in rows if row["error"]] == [str(bad), str(empty), str(files[3])]
    assert len(rows) == 19 + 3
    with pytest.raises(DataError, match="3 of 4 images could not be read"):
        summary.check(strict=True)


def test_a_dicom_film_is_answered_in_its_own_millimetres(landmark_run: Path, tmp_path: Path) -> None:
    """The same picture as PNG and as DICOM, black and white exchanged in the file."""
    (picture,) = write_pictures(tmp_path / "films", 1)
    pixels = cv2.imread(str(picture), cv2.IMREAD_UNCHANGED)
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "BurnedInAnnotation": "YES"}
    film = tmp_path / "films" / "IM0001"
    film.write_bytes(to_bytes(dataset(65535 - pixels, bits=16, PixelSpacing=[0.25, 0.25], **inverted)))
    summary = predict_images(landmark_run, [picture, film], tmp_path / "out", device="cpu")
    assert (summary.predicted, summary.errors) == (2, {})
    plain, dicom = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert (plain["mm_per_px"], dicom["mm_per_px"]) == (None, 0.25)
    assert (plain["spacing"], dicom["spacing"]) == (None, "PixelSpacing")
    for point, measured in zip(plain["points"], dicom["points"], strict=True):
        assert (measured["x"], measured["y"]) == (point["x"], point["y"])
        assert measured["x_mm"] == pytest.approx(0.25 * point["x"], abs=1e-3)
        assert "x_mm" not in point
    predict_images(landmark_run, [film], tmp_path / "known", mm_per_px=0.5, device="cpu")
    known = json.loads((tmp_path / "known" / "predictions.json").read_text())["images"][0]
    assert (known["mm_per_px"], known["spacing"]) == (0.5, "--mm-per-px")
    assert not any(b"MRN-4711" in path.read_bytes() for path in tmp_path.glob("out/**/*") if path.is_file())


def test_a_document_names_its_film_and_a_picture_that_has_none_costs_the_others_nothing(
    landmark_run: Path, tmp_path: Path
) -> None:
    (picture,) = write_pictures(tmp_path / "films", 1)
    pixels = cv2.imread(str(picture), cv2.IMREAD_UNCHANGED)
    uids = {"StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": "1.2.3.2"}
    film = tmp_path / "films" / "IM0001"
    film.write_bytes(to_bytes(dataset(pixels, bits=16, **uids)))
    formats = ("dicom-sr", "dicom-gsps")
    summary = predict_images(landmark_run, [picture, film], tmp_path / "out", formats=formats, device="cpu")
    assert summary.predicted == 1
    assert "no DICOM file" in summary.errors[str(picture)]
    refused, found = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert "no DICOM file" in refused["error"]
    report = pydicom.dcmread(tmp_path / "out" / "dicom-sr" / "IM0001.dcm")
    [measurements] = [item for item in report.ContentSequence if "Imaging Measurements" in str(item)]
    places = [item for group in measurements.ContentSequence for item in group.ContentSequence if "GraphicData" in item]
    state = pydicom.dcmread(tmp_path / "out" / "dicom-gsps" / "IM0001.dcm")
    graphics = state.GraphicAnnotationSequence[0].GraphicObjectSequence
    for point, place, graphic in zip(found["points"], places, graphics, strict=True):
        assert np.allclose(
            [place.GraphicData, graphic.GraphicData], np.array([point["x"], point["y"]]) + 0.5, atol=1e-3
        )
    weights = open_run(landmark_run, device="cpu").weights_sha256
    assert report.DeviceSerialNumber == state.DeviceSerialNumber == weights
    assert weights in (landmark_run / "snapshots" / "step-00000003" / "meta.json").read_text()


def test_a_snapshot_uses_what_lies_in_its_run_however_it_is_named_and_nothing_of_other_folders(
    landmark_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(landmark_run, run)
    spec = open_run(run, device="cpu").spec
    facts = {"factor": 1.5, "spec": spec.name, "landmarks": list(spec.landmark_names), "step": 3}
    (run / "radius.json").write_text(json.dumps(facts))
    step = "step-00000003"
    for inside, name in ((".", f"snapshots/{step}"), ("snapshots", step), (f"snapshots/{step}", f"../{step}")):
        monkeypatch.chdir(run / inside)
        loaded = open_run(name, device="cpu")
        assert loaded.radius == facts, name
        assert loaded.results["num_images"] == 6
    shutil.copytree(run / "snapshots" / step, other / "best" / step)
    (other / "radius.json").write_text(json.dumps(facts | {"factor": 9.0}))
    assert open_run(other / "best" / step, device="cpu").radius is None
    # weights of another step
    (run / "radius.json").write_text(json.dumps(facts | {"step": 2}))
    assert open_run(run / "snapshots" / step, device="cpu").radius is None


def test_a_further_format_has_the_points_of_the_table_and_a_picture_of_each_file(
    landmark_run: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "films", 2)
    summary = predict_images(landmark_run, [tmp_path / "films"], tmp_path / "out", formats=["coco"], device="cpu")
    assert summary.predicted == 2
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    content = json.loads((tmp_path / "out" / "coco" / "annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["film-0.png", "film-1.png"]
    for image, annotation in zip(images, content["annotations"], strict=True):
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        wanted = [(point["x"], point["y"]) for point in image["points"]]
        np.testing.assert_allclose(points[:, :2], wanted, atol=0.0006)
    assert (tmp_path / "out" / "coco" / "images" / "film-1.png").is_file()


def test_files_of_one_name_get_overlays_of_their_own(landmark_run: Path, tmp_path: Path) -> None:
    first = write_pictures(tmp_path / "a", 1)
    second = write_pictures(tmp_path / "b", 1)
    predict_images(landmark_run, first + second, tmp_path / "out", device="cpu")
    assert sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir()) == ["film-0-1.png", "film-0.png"]


def test_predicting_with_nothing_or_with_another_kind_of_run_is_refused(
    landmark_run: Path, denoise_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no image files"):
        predict_images(landmark_run, [], tmp_path)
    with pytest.raises(ConfigError, match="task denoise, wanted landmarks"):
        predict_images(denoise_run, ["x.png"], tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="wanted a positive number"):
        predict_images(landmark_run, ["x.png"], tmp_path, mm_per_px=-1)


def test_samples_are_one_sheet_and_the_same_every_time(denoise_run: Path, landmark_run: Path, tmp_path: Path) -> None:
    sheets = [
        sample_run(denoise_run, count=3, file=tmp_path / f"{name}.png", num_steps=4, device="cpu") for name in "ab"
    ]
    first, second = (cv2.imread(str(sheet), cv2.IMREAD_GRAYSCALE) for sheet in sheets)
    assert min(first.shape) > 2 * 32
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first)) > 10
    with pytest.raises(ConfigError, match="task landmarks, wanted denoise"):
        sample_run(landmark_run, count=1, file=tmp_path / "c.png", device="cpu")


def test_exported_weights_are_the_runs_weights_with_what_is_needed_to_use_them(
    landmark_run: Path, tmp_path: Path
) -> None:
    (path,) = export_run(landmark_run, out=tmp_path / "weights.safetensors")
    state = open_run(landmark_run, device="cpu").model.state_dict()
    with safetensors.safe_open(str(path), "pt") as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in state.items())
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    assert facts["image_size"] == 32
    assert facts["task"]["spec"]["name"] == "phantom-skull"
    assert facts["pixels"]["aspect"] == "squeeze"
    with pytest.raises(CheckpointError, match="holds weights only"):
        open_run(path, device="cpu")


def test_export_names_the_packages_that_are_missing_and_the_formats_there_are(
    landmark_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"needs onnx and onnxscript, .*pip install 'ddpm-lmk\[onnx\]'"):
        export_run(landmark_run, format="onnx", out=tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match="wanted safetensors, onnx or hub"):
        export_run(landmark_run, format="pt")  # type: ignore[arg-type]


@pytest.mark.extra("onnx")
def test_export_to_onnx_gives_the_same_maps(landmark_run: Path, tmp_path: Path) -> None:
    import onnxruntime as runtime

    (path,) = export_run(landmark_run, format="onnx", out=tmp_path / "net.onnx")
    images = torch.rand(3, 1, 32, 32)
    (maps,) = runtime.InferenceSession(str(path)).run(None, {"images": images.numpy()})
    with torch.inference_mode():
        wanted = open_run(landmark_run, device="cpu").model(images, None)
    np.testing.assert_allclose(maps, wanted.numpy(), atol=1e-4)


def test_the_images_of_a_folder_are_known_by_name_or_by_first_bytes_and_pipes_are_not_waited_for(tmp_path: Path):
    contents = {"a.PNG": b"", "b": bytes(128) + b"DICM", "c": b"DICM", "d.dcm": b"", "e.txt": b"DICOM", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "g")
    found, others = list_images([tmp_path])
    assert [path.name for path in found] == ["a.PNG", "b", "c", "d.dcm"]
    assert others == {".txt": 1, "none": 2}
