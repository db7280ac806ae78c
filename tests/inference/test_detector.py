"""Landmarks in Python: the points of `ddpm-lmk predict`, from files, Pillow images and arrays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import ddpm_lmk
from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.inference.predict import predict_images
from ddpm_lmk.run import execute
from tests.data.dicoms import dataset, to_bytes

UNET = {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8}


def config(path: list[str], task: dict[str, object], **data: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"path": path, "image_size": 32, **data},
            "model": UNET,
            "task": task,
            "train": {"duration": "2 steps", "global_batch_size": 4, "precision": "fp32"},
            "runtime": {"workers": 0},
            "evaluate": {"split": "test" if task["kind"] == "landmarks" else None, "batch": 2},
        }
    )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Skulls and chests of 64 pixels, 19 and 6 landmarks."""
    folder = tmp_path_factory.mktemp("packs")
    for kind in ("skull", "chest"):
        settings = PackSettings(kind="phantom", size=64, counts={"train": 4, "test": 2}, seed=7)
        pack(kind, folder / kind, settings, workers=1)
    return [str(folder / "skull"), str(folder / "chest")]


@pytest.fixture(scope="module")
def run(packs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chests, looked at twice."""
    out = tmp_path_factory.mktemp("runs") / "twice"
    execute(config(packs[1:], {"kind": "landmarks", "refine": {"crop": 0.5}}, fine_size=64), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return render("chest", 7, 0).image


def test_a_file_has_the_points_of_the_command(run: Path, film: np.ndarray, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "film.png"), film)
    (tmp_path / "film.dcm").write_bytes(to_bytes(dataset(film, bits=16, PixelSpacing=[0.25, 0.25])))
    files = [tmp_path / "film.png", tmp_path / "film.dcm", tmp_path / "film.png"]
    predict_images(run, files, tmp_path / "out", device="cpu")
    wanted = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    found = ddpm_lmk.load(run, device="cpu").predict([*files[:2], str(files[2])])
    assert len(found) == 3  # a list is answered image by image, also where one comes twice
    for each, image in zip(found[:2], wanted, strict=True):
        assert each.names == tuple(point["name"] for point in image["points"])
        assert each.size == (image["width"], image["height"])
        assert each.points.round(3).tolist() == [[point["x"], point["y"]] for point in image["points"]]
        assert each.spread_px.round(3).tolist() == [point["spread_px"] for point in image["points"]]
        assert each.failed.tolist() == [point["failed"] for point in image["points"]]
        assert each.radius_px is None
    plain, dicom = found[:2]
    assert (plain.mm_per_px, plain.points_mm, plain.spread_mm) == (None, None, None)
    assert dicom.points_mm is not None
    in_mm = [[point["x_mm"], point["y_mm"]] for point in wanted[1]["points"]]
    np.testing.assert_allclose(dicom.points_mm, in_mm, atol=3e-4)  # of pixels rounded to three digits
    # A few more images in a pass may be added up in another order.
    np.testing.assert_allclose(found[2].points, plain.points, atol=1e-3)


def test_pixels_and_pillow_images_are_the_file(run: Path, film: np.ndarray, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "film.png"), film)
    cv2.imwrite(str(tmp_path / "film.tif"), film)
    detector = ddpm_lmk.load(run, device="cpu")
    file = detector.predict(tmp_path / "film.png", mm_per_px=0.5)
    with Image.open(tmp_path / "film.png") as opened, Image.open(tmp_path / "film.tif") as tiff:
        same = [film, opened, tiff, film.astype(">u2"), np.asfortranarray(film)]
        for each in (*detector.predict(same), detector.predict(film)):
            np.testing.assert_allclose(each.points, file.points, atol=1e-3)
            np.testing.assert_allclose(each.spread_px, file.spread_px, atol=1e-3)
    assert file.points_mm is not None
    np.testing.assert_array_equal(file.points_mm, file.points * 0.5)
    # Floats have no white of their own: percentiles decide, as they do for this run's 16-bit files.
    for floats in (film.astype(np.float32), film / 65535.0):
        np.testing.assert_allclose(detector.predict(floats).points, file.points, atol=1e-2)
    assert repr(detector) == "<Detector tiny: 6 landmarks of phantom-chest>"


def test_a_picture_that_its_camera_has_turned_is_seen_upright(run: Path, film: np.ndarray, tmp_path: Path) -> None:
    grey = Image.fromarray((film >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    detector = ddpm_lmk.load(run, device="cpu")
    with Image.open(tmp_path / "turned.png") as opened:
        turned, upright, file = detector.predict([opened, grey, tmp_path / "turned.png"])
    assert turned.size == upright.size == grey.size
    np.testing.assert_allclose(turned.points, upright.points, atol=1e-3)
    np.testing.assert_allclose(turned.points, file.points, atol=1e-3)


def test_a_radius_comes_with_its_coverage(run: Path, film: np.ndarray, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    detector = ddpm_lmk.load(run, device="cpu")
    radius = {"spec": "phantom-chest", "step": 2, "landmarks": list(detector.names), "coverage": 0.9, "factor": 1.5}
    (tmp_path / "run" / "radius.json").write_text(json.dumps(radius))
    found = ddpm_lmk.load(str(tmp_path / "run"), device="cpu").predict(film, mm_per_px=0.1)
    assert found.coverage == 0.9
    assert found.radius_px is not None
    assert found.radius_mm is not None
    read = ~found.failed
    assert read.any()
    np.testing.assert_allclose(found.radius_px[read], 1.5 * found.spread_px[read])
    np.testing.assert_allclose(found.radius_mm, 0.1 * found.radius_px)


def test_of_a_mixture_one_dataset_is_named(packs: list[str], film: np.ndarray, tmp_path: Path) -> None:
    execute(config(packs, {"kind": "landmarks"}), tmp_path / "both", device="cpu")
    with pytest.raises(ConfigError, match="has learnt phantom-skull, phantom-chest, asked for none of them"):
        ddpm_lmk.load(tmp_path / "both", device="cpu")
    chest = ddpm_lmk.load(tmp_path / "both", dataset="phantom-chest", device="cpu")
    assert len(chest.predict(film).points) == len(chest.names) == 6


def test_what_is_no_image_or_no_landmark_run_is_refused_in_words(
    run: Path, packs: list[str], film: np.ndarray, tmp_path: Path
) -> None:
    detector = ddpm_lmk.load(run, device="cpu")
    assert detector.predict([]) == []
    refusals: list[tuple[object, type[Exception], str]] = [
        (3, ConfigError, "found int; wanted a path, a Pillow image or a numpy array"),
        (film[None], ConfigError, r"found an array \[1, .* of uint16; wanted grey pixels"),
        (film.astype(np.int32), ConfigError, "of int32; wanted grey pixels"),
        (np.zeros((64, 64), np.uint8), DataError, "image 0: constant image"),
        (film[:8], DataError, "too small or too narrow"),
        ([film, np.full((64, 64), np.nan)], DataError, "image 1: pixels that are not finite"),
        (np.where(film > 1000, 1e300, 0.5 * film), DataError, "not finite"),
        (tmp_path / "absent.png", DataError, "absent.png: cannot be opened"),
        (Image.new("HSV", (64, 64)), DataError, "colour mode HSV"),
    ]
    for image, error, words in refusals:
        with pytest.raises(error, match=words):
            detector.predict(image)  # type: ignore[call-overload]
    for spacing in (0, "0.1", True, np.inf):
        with pytest.raises(ConfigError, match="wanted a positive number"):
            detector.predict(film, mm_per_px=spacing)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="device='tpu'; wanted 'auto', 'cpu' or 'cuda'"):
        ddpm_lmk.load(tmp_path, device="tpu")  # type: ignore[arg-type]
    execute(config(packs[:1], {"kind": "denoise", "num_timesteps": 20}), tmp_path / "pretrained", device="cpu")
    with pytest.raises(ConfigError, match="is a run of task denoise, wanted landmarks"):
        ddpm_lmk.load(tmp_path / "pretrained", device="cpu")
