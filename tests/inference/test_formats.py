"""Predictions in the formats of other tools: the same points, in the tool's own pixels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.annotations.formats import LABEL_FORMATS
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.annotated import read_annotated
from ddpm_lmk.errors import ConfigError, RunConflictError
from ddpm_lmk.inference.formats import FORMATS, open_writers
from ddpm_lmk.inference.predict import unique_ids
from ddpm_lmk.inference.predictions import ImagePrediction, PredictedFile
from tests.cli.commands import run_command
from tests.data.tools import accept

NAMES = ("sella", "nasion", "porion")
POINTS = np.array([[0.0, 0.0], [12.345678, 30.25], [63.0, 47.0]])


def predicted(name: str = "a/film", *, failed: tuple[bool, ...] = (False,) * 3, **facts: object) -> PredictedFile:
    """A picture of 64 x 48 pixels with three points, two of which are the centres of its first and last pixel."""
    values: dict[str, object] = {
        "path": Path(f"films/{name}.dcm"),
        "id": name,
        "grey": np.arange(48 * 64, dtype=np.uint32).reshape(48, 64).astype(np.uint8),
        "landmark_names": NAMES,
        "prediction": ImagePrediction(POINTS, np.full(3, 1.5), np.array(failed)),
        "radius_px": None,
        "coverage": None,
        "mm_per_px": 0.25,
        "spacing": "PixelSpacing",
        "frame": None,
        "weights": "0" * 64,
    }
    return PredictedFile(**(values | facts))  # type: ignore[arg-type]


def write(name: str, out: Path, *images: PredictedFile) -> Path:
    """Write images in one format and return its folder."""
    (writer,) = open_writers([name], out)
    for image in images:
        writer.add(image)
    writer.finish()
    return out / name


def test_coco_counts_from_the_centre_of_the_first_pixel_as_we_do(tmp_path: Path) -> None:
    folder = write("coco", tmp_path, predicted(), predicted("b/film", failed=(False, True, False), mm_per_px=None))
    content = json.loads((folder / "annotations.json").read_text())
    assert content["categories"][0]["keypoints"] == list(NAMES)
    first, second = content["annotations"]
    assert first["keypoints"] == [0.0, 0.0, 2, 12.345678, 30.25, 2, 63.0, 47.0, 2]
    assert (first["num_keypoints"], first["bbox"], first["area"]) == (3, [0.0, 0.0, 63.0, 47.0], 63.0 * 47.0)
    assert second["keypoints"][3:6] == [0, 0, 0]
    assert second["num_keypoints"] == 2
    assert [(image["file_name"], image.get("mm_per_px")) for image in content["images"]] == [
        ("a/film.png", 0.25),
        ("b/film.png", None),
    ]
    picture = cv2.imread(str(folder / "images" / "a" / "film.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(picture, predicted().grey)


def test_other_tools_are_told_their_own_pixels(tmp_path: Path) -> None:
    """The first landmark is in the middle of the first pixel, the last in that of the last."""
    (shape, *_, last) = json.loads((write("labelme", tmp_path, predicted()) / "a" / "film.json").read_text())["shapes"]
    assert (shape["label"], shape["points"], last["points"]) == ("sella", [[0.5, 0.5]], [[63.5, 47.5]])
    assert (
        'points label="sella" source="auto" occluded="0" points="0.5000,0.5000"'
        in (write("cvat", tmp_path, predicted()) / "annotations.xml").read_text()
    )
    content = json.loads((write("datumaro", tmp_path, predicted()) / "annotations" / "default.json").read_text())
    assert [shape["points"] for shape in content["items"][0]["annotations"][::2]] == [[0.5, 0.5], [63.5, 47.5]]
    (task,) = json.loads((write("label-studio", tmp_path, predicted()) / "tasks.json").read_text())
    values = [region["value"] for region in task["predictions"][0]["result"]]
    assert (values[0]["x"], values[0]["y"]) == (50 / 64, pytest.approx(50 / 48))
    assert (values[2]["x"], values[2]["y"]) == (100 - 50 / 64, pytest.approx(100 - 50 / 48))
    text = (write("spreadsheet", tmp_path, predicted()) / "landmarks.csv").read_text("utf-8-sig")
    assert text.splitlines()[1] == "a/film.png,64,48,0.25,0.0000,0.0000,12.3457,30.2500,63.0000,47.0000"


@pytest.mark.parametrize("kind", [name for name, kind in LABEL_FORMATS.items() if kind.write])
def test_predictions_are_packed_again_as_they_were_and_points_not_found_stay_missing(kind: str, tmp_path: Path) -> None:
    points = POINTS + 0.25  # tables write (0, 0) for what was not seen
    one = predicted("a/film", prediction=ImagePrediction(points, np.ones(3), np.zeros(3, bool)))
    other = predicted("b/film", prediction=ImagePrediction(points, np.ones(3), np.array([False, True, False])))
    folder = write(kind, tmp_path, one, other)
    accept(folder, kind)
    settings = PackSettings(kind=kind).filled_for(folder, has_key=False)  # type: ignore[arg-type]
    again = read_annotated(folder, settings, None)
    (sample,) = again.samples
    assert sample.points is not None
    np.testing.assert_allclose(sample.points, points, atol=0.01)
    assert again.spec.landmark_names == NAMES
    assert sample.mm_per_px == (None if kind == "cvat" else 0.25)
    (refused,) = again.refused
    assert refused["id"].endswith("b/film")
    assert refused["reason"].startswith("landmark nasion ")


def test_the_help_names_every_format() -> None:
    help_text = run_command("predict", "--help").out
    assert [name for name in FORMATS if name not in help_text] == []


def test_what_may_hold_corrections_is_not_written_over(tmp_path: Path) -> None:
    write("coco", tmp_path, predicted())
    with pytest.raises(RunConflictError, match="may hold corrections; name another --out"):
        open_writers(["coco"], tmp_path)


def test_an_unknown_format_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--format xls: wanted one of {', '.join(FORMATS)}"):
        open_writers(["xls"], tmp_path)


def test_ids_are_paths_without_suffix_unless_only_the_suffix_tells_files_apart() -> None:
    names = ["a/1.dcm", "b/1.dcm", "2.png", "2.tif", "1.2.840.7", "x", "x", "x-1.jpg"]
    assert unique_ids(names) == ["a/1", "b/1", "2.png", "2.tif", "1.2.840.7", "x", "x-1", "x-1-1"]
