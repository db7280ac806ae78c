"""Predictions in the formats of other tools: the same points, in the tool's own pixels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddpm_lmk.errors import ConfigError, RunConflictError
from ddpm_lmk.inference.formats import FORMATS, open_writers
from ddpm_lmk.inference.predict import unique_ids
from ddpm_lmk.inference.predictions import ImagePrediction, PredictedFile

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
