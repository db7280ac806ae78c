"""Labels of other tools: files as those tools write them, by value, and what is wrong with bad ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.annotations.formats import LABEL_FORMATS
from ddpm_lmk.data.annotations.image import AnnotatedImage
from ddpm_lmk.data.annotations.spreadsheet import columns_of
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import PackSummary, pack
from ddpm_lmk.data.sources.annotated import read_annotated
from ddpm_lmk.data.sources.base import RawDataset, RawSample
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.dicoms import dataset, to_bytes
from tests.data.tools import accept

WIDTH, HEIGHT = 64, 48
GREY = np.add.outer(3 * np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8)


def picture(path: Path, *, dicom: bool = False, shape: tuple[int, int] = (HEIGHT, WIDTH), **tags: Any) -> Path:
    """A film of 64 x 48 pixels, as PNG or DICOM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = cv2.resize(GREY, shape[::-1], interpolation=cv2.INTER_NEAREST)
    if dicom:
        path.write_bytes(to_bytes(dataset(pixels.astype(np.uint16) * 16, **tags)))
    else:
        assert cv2.imwrite(str(path), pixels)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def read(source: Path, kind: str, images: Path | None = None, **settings: Any) -> RawDataset:
    want = PackSettings(kind=kind, **settings).filled_for(source, has_key=False)  # type: ignore[arg-type]
    return read_annotated(source, want, None, images)


def points_of(found: RawDataset) -> dict[str, list[list[float]] | None]:
    return {sample.id: None if sample.points is None else sample.points.tolist() for sample in found.samples}


def the_sample(found: RawDataset) -> RawSample:
    (sample,) = found.samples
    return sample


# --- files as the tools write them, with the centre of the first pixel and that of the last as landmarks


def labelme(folder: Path, name: str = "a", *, suffix: str = ".png", **changes: Any) -> Path:
    """A file of labelme 5: the two points lie in the middle of the first and the last pixel of the canvas."""
    shapes = [
        {"label": label, "points": [point], "group_id": None, "description": "", "shape_type": "point", "flags": {}}
        for label, point in (("first", [0.5, 0.5]), ("last", [WIDTH - 0.5, HEIGHT - 0.5]))
    ]
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}{suffix}", "imageData": None}
    return write_json(folder / f"{name}.json", content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | changes)


def coco(folder: Path, *, files: tuple[str, ...] = ("a.png",), keypoints: Any = None, **changes: Any) -> Path:
    """A file of COCO keypoints."""
    values = [0, 0, 2, WIDTH - 1, HEIGHT - 1, 2] if keypoints is None else keypoints
    content = {
        "images": [
            {"id": 7 + index, "file_name": file, "width": WIDTH, "height": HEIGHT} for index, file in enumerate(files)
        ],
        "annotations": [
            {"id": index, "image_id": 7 + index, "category_id": 3, "keypoints": values, "num_keypoints": 2}
            for index in range(len(files))
        ],
        "categories": [{"id": 3, "name": "film", "keypoints": ["first", "last"], "skeleton": []}],
    }
    return write_json(folder / "labels.json", content | changes)


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>1</id><name>films</name><mode>annotation</mode><labels>
    <label><name>skull</name><color>#ff0000</color><type>skeleton</type><attributes></attributes><svg></svg></label>
    <label><name>last</name><color>#00ff00</color><type>points</type><attributes></attributes></label>
    <label><name>first</name><color>#0000ff</color><type>points</type><attributes></attributes></label>
  </labels></task></meta>
  <image id="0" name="{name}" width="64" height="48">
    {shapes}
  </image>
</annotations>
"""
CVAT_POINTS = (
    '<points label="first" source="manual" occluded="0" points="0.50,0.50" z_order="0"></points>'
    '<points label="last" source="manual" occluded="0" points="63.50,47.50" z_order="0"></points>'
)


def cvat(folder: Path, *, name: str = "a.png", shapes: str = CVAT_POINTS) -> Path:
    """A file of CVAT for images 1.1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.xml").write_text(CVAT.format(name=name, shapes=shapes))
    return folder / "annotations.xml"


def datumaro(folder: Path, *, shapes: list[dict[str, Any]] | None = None, subset: str = "default") -> Path:
    """A file of Datumaro 1.0 as CVAT exports it."""
    points = {"first": [0.5, 0.5], "last": [63.5, 47.5]}
    shapes = shapes or [
        {"id": 0, "type": "points", "attributes": {"occluded": False}, "group": 0, "label_id": index, "points": point}
        for index, point in enumerate(points.values())
    ]
    labels = [{"name": name, "parent": "", "attributes": []} for name in points]
    item = {"id": "a", "annotations": shapes, "attr": {"frame": 0}, "image": {"path": "a.png", "size": [HEIGHT, WIDTH]}}
    content = {"info": {}, "categories": {"label": {"labels": labels}, "points": {"items": []}}, "items": [item]}
    return write_json(folder / "annotations" / f"{subset}.json", content)


def region(name: str, x: float, y: float, **changes: Any) -> dict[str, Any]:
    """A point of Label Studio, in percent."""
    value = {"x": x, "y": y, "width": 0.5, "keypointlabels": [name]}
    return {
        "id": name,
        "type": "keypointlabels",
        "from_name": "kp",
        "to_name": "img",
        "origin": "manual",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": value,
    } | changes


def label_studio(folder: Path, *, image: str = "/data/upload/3/1a2b3c4d-a.png", **changes: Any) -> Path:
    """An export "JSON" of Label Studio."""
    result = [
        region("first", 50 / WIDTH, 50 / HEIGHT),
        region("last", 100 - 50 / WIDTH, 100 - 50 / HEIGHT),
    ]
    annotation = {"id": 5, "completed_by": 1, "was_cancelled": False, "ground_truth": False, "result": result}
    task = {"id": 12, "data": {"image": image}, "annotations": [annotation], "predictions": []}
    return write_json(folder / "export.json", [task | changes])


def spreadsheet(folder: Path) -> Path:
    """A German Excel's CSV: semicolons, decimal commas, its own code page."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "Datei;first_x;first_y;last_x;last_y;Bemerkung\r\na.png;0,0;0,0001;63,0;47,0;schräg\r\n"
    (folder / "punkte.csv").write_bytes(lines.encode("cp1252"))
    return folder / "punkte.csv"


TOOLS: dict[str, Callable[[Path], Path]] = {
    "coco": coco,
    "labelme": labelme,
    "cvat": cvat,
    "datumaro": datumaro,
    "label-studio": label_studio,
    "spreadsheet": spreadsheet,
}


@pytest.mark.parametrize("kind", TOOLS)
def test_the_middle_of_the_first_and_last_pixel_is_the_same_place_from_every_tool(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    TOOLS[kind](tmp_path)
    found = read(tmp_path, kind)
    sample = the_sample(found)
    assert (sample.id, sample.split, sample.path) == ("a", "train", tmp_path / "a.png")
    in_order = ("last", "first") if kind == "cvat" else ("first", "last")  # CVAT's file lists its labels that way
    assert found.spec.landmark_names == in_order
    places = dict(zip(found.spec.landmark_names, sample.points))
    np.testing.assert_allclose(places["first"], [0, 0], atol=1e-3)
    np.testing.assert_allclose(places["last"], [WIDTH - 1, HEIGHT - 1], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "file", "split"),
    [("labelme", "labelme.json", "train"), ("datumaro", "val.json", "val"), ("cvat", "val.xml", "train")],
)
def test_files_that_the_tools_wrote_say_where_the_pixels_are(kind: str, file: str, split: str, tmp_path: Path) -> None:
    """`tool_labels/make.py` made them: in labelme by clicks into the middle of the two pixels."""
    picture(tmp_path / "film.png")
    found = read(Path(__file__).parent / "tool_labels" / file, kind, tmp_path)
    assert found.spec.landmark_names == ("first", "last")
    assert points_of(found) == {"film": [[0, 0], [WIDTH - 1, HEIGHT - 1]]}
    assert the_sample(found).split == split


@pytest.mark.parametrize("kind", [name for name, kind in LABEL_FORMATS.items() if kind.write])
def test_what_is_written_for_a_tool_is_read_again_to_a_hundredth_of_a_pixel(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    names = ("Sella", "Nasion", "ä ö")
    images, wanted = [], {}
    for index, stem in enumerate(("b/film", "film", "c d")):
        pictures = tmp_path / kind / LABEL_FORMATS[kind].pictures
        picture(pictures / f"{stem}.png")
        points = random.uniform(0.5, 46, (3, 2))
        wanted[f"{LABEL_FORMATS[kind].pictures}/{stem}".strip("/")] = points - (
            0.5 if LABEL_FORMATS[kind].origin == "corner" else 0
        )
        places: dict[str, Any] = dict(zip(names, map(tuple, points.tolist())))
        images.append(AnnotatedImage(f"{stem}.png", places, (WIDTH, HEIGHT), mm_per_px=0.1 + index))
    LABEL_FORMATS[kind].write(tmp_path / kind, images, names)
    accept(tmp_path / kind, kind)
    found = read(tmp_path / kind, kind)
    assert found.spec.landmark_names == names
    assert points_of(found).keys() == wanted.keys()
    for sample in found.samples:
        np.testing.assert_allclose(sample.points, wanted[sample.id], atol=0.01)
        assert sample.native_size == (WIDTH, HEIGHT)
    spacings = {sample.mm_per_px for sample in found.samples}
    assert spacings == ({None} if kind == "cvat" else {0.1, 1.1, 2.1})  # CVAT has no place for it


@pytest.mark.parametrize("kind", ["label-studio", "labelme"])
def test_drafts_that_nobody_has_looked_at_are_no_labels(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    image = AnnotatedImage("a.png", {"first": (1.0, 2.0)}, (WIDTH, HEIGHT))
    LABEL_FORMATS[kind].write(tmp_path, [image], ["first"])
    with pytest.raises(DataError, match=r"no point of any landmark, first first is a draft: (nobody|`checked`)"):
        read(tmp_path, kind)


# --- labels on other images than those of the tool


def test_labels_of_png_copies_are_given_to_the_dicom_files_with_their_spacing(tmp_path: Path) -> None:
    """The copies are half as large; the points count their pixels, and so does the spacing."""
    labelme(tmp_path / "labels")
    picture(tmp_path / "dicom" / "x" / "a.dcm", dicom=True, shape=(2 * HEIGHT, 2 * WIDTH), PixelSpacing=[0.1, 0.1])
    picture(tmp_path / "dicom" / "IM0001", dicom=True)
    found = read(tmp_path / "labels", "labelme", tmp_path / "dicom")
    sample = the_sample(found)
    assert (sample.id, sample.native_size, sample.mm_per_px) == ("x/a", (WIDTH, HEIGHT), pytest.approx(0.2))
    assert (found.spec.unit, found.spec.sdr_thresholds) == ("mm", (2.0, 2.5, 3.0, 4.0))
    assert "1 images have no label and are left out; --keep-unlabelled takes them" in found.warnings
    kept = read(tmp_path / "labels", "labelme", tmp_path / "dicom", keep_unlabelled=True)
    assert {sample_id: points is not None for sample_id, points in points_of(kept).items()} == {
        "IM0001": False,
        "x/a": True,
    }


def test_packed_shards_hold_the_points_and_the_spacing(tmp_path: Path) -> None:
    labelme(tmp_path / "labels")
    picture(tmp_path / "dicom" / "a.dcm", dicom=True, PixelSpacing=[0.1, 0.1])
    settings = PackSettings(kind="labelme", size=32)
    summary: PackSummary = pack(tmp_path / "labels", tmp_path / "out", settings, images=tmp_path / "dicom", workers=1)
    assert summary.packed == 1
    manifest = Manifest.open(tmp_path / "out")
    record = manifest.read_record(0)
    assert record.points is not None
    np.testing.assert_allclose(record.points, [[0, 0], [WIDTH - 1, HEIGHT - 1]])
    assert (record.mm_per_px, record.native_size, record.id) == (0.1, (WIDTH, HEIGHT), "a")
    assert {"landmarks", "pixel_origin", "mm_per_px", "columns"}.isdisjoint(manifest.settings)


def test_files_of_one_name_in_two_folders_are_told_apart_by_their_path_or_not_at_all(tmp_path: Path) -> None:
    for folder in "ab":
        picture(tmp_path / "images" / folder / "1.png")
    coco(tmp_path / "labels", files=("images/b/1.png",))
    assert the_sample(read(tmp_path / "labels", "coco", tmp_path / "images")).id == "b/1"
    coco(tmp_path / "labels", files=("b/1.png", "1.png"))
    with pytest.raises(DataError, match=r"image '1.png' of the labels may be a/1\.png or b/1\.png"):
        read(tmp_path / "labels", "coco", tmp_path / "images")
    coco(tmp_path / "labels", files=("b/1.png", "other/b/1.png"))
    with pytest.raises(DataError, match=r"b/1.png is labelled twice, as 'b/1.png' and 'other/b/1.png'"):
        read(tmp_path / "labels", "coco", tmp_path / "images")


def test_a_name_that_leads_out_of_the_folder_is_never_opened(tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    picture(tmp_path / "images" / "b.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..\\secret.png"):
        labelme(tmp_path / "labels", imagePath=name)
        with pytest.raises(DataError, match="none of the 1 labelled images is below"):
            read(tmp_path / "labels", "labelme", tmp_path / "images")


def test_a_picture_of_another_place_is_found_by_its_name_and_that_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "films" / "a.png")
    labelme(tmp_path / "labels", imagePath="..\\old\\a.png")
    found = read(tmp_path / "labels", "labelme", tmp_path / "films")
    assert "found by their name in another folder: ../old/a.png is a.png" in "\n".join(found.warnings)


def test_a_missing_picture_is_refused_by_name_and_the_others_are_taken(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    coco(tmp_path, files=("a.png", "gone.png"))
    found = read(tmp_path, "coco")
    assert points_of(found).keys() == {"a"}
    assert [(line["id"], line["code"]) for line in found.refused] == [("gone.png", "MISSING")]


# --- what is missing, hidden, declared


def test_points_that_are_not_there_cost_their_image_its_label_and_hidden_ones_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    coco(tmp_path, files=("a.png", "b.png"))
    content = json.loads((tmp_path / "labels.json").read_text())
    content["annotations"][0]["keypoints"] = [1, 2, 1, 30, 40, 2]
    content["annotations"][1]["keypoints"] = [0, 0, 0, 30, 40, 2]
    write_json(tmp_path / "labels.json", content)
    found = read(tmp_path, "coco")
    assert points_of(found) == {"a": [[1, 2], [30, 40]]}
    assert [(line["id"], line["code"]) for line in found.refused] == [("b", "INCOMPLETE_LABEL")]
    assert "1 points are marked as hidden; shards keep them as any other" in found.warnings
    assert points_of(read(tmp_path, "coco", keep_unlabelled=True))["b"] is None


def test_skeletons_of_cvat_are_read_by_their_elements(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    elements = (
        '<points label="first" source="manual" outside="{outside}" occluded="1" points="1.25,2.50"></points>'
        '<points label="last" source="manual" outside="0" occluded="0" points="3.00,4.00"></points>'
    )
    shapes = f'<skeleton label="skull" source="manual" z_order="0">{elements}</skeleton><box label="x" xtl="1"></box>'
    cvat(tmp_path, shapes=shapes.format(outside=0))
    found = read(tmp_path, "cvat")
    assert points_of(found) == {"a": [[2.5, 3.5], [0.75, 2.0]]}
    assert "no landmarks, so not looked at: shapes box 1" in found.warnings
    cvat(tmp_path, shapes=shapes.format(outside=1))
    found = read(tmp_path, "cvat", keep_unlabelled=True)
    assert found.spec.landmark_names == ("last",)  # the other has no place in any image
    assert points_of(found) == {"a": [[2.5, 3.5]]}


def test_skeletons_of_datumaro_are_read_by_their_elements(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = datumaro(tmp_path)
    content = json.loads(path.read_text())
    names = {"skull": "", "nasion": "skull", "sella": "skull", "chin": ""}
    content["categories"]["label"]["labels"] = [{"name": name, "parent": parent} for name, parent in names.items()]
    content["categories"]["points"]["items"] = [{"label_id": 0, "labels": ["sella", "nasion"], "joints": []}]
    elements = [
        {"type": "points", "label_id": 1, "points": [1.5, 2.5], "visibility": [1]},
        {"type": "points", "label_id": 2, "points": [3.5, 4.5], "visibility": [2]},
    ]
    chin = {"type": "points", "label_id": 3, "points": [5.5, 6.5], "attributes": {"occluded": True}}
    content["items"][0]["annotations"] = [{"type": "skeleton", "label_id": 0, "elements": elements}, chin]
    write_json(path, content)
    found = read(tmp_path, "datumaro")
    assert found.spec.landmark_names == ("sella", "nasion", "chin")
    assert points_of(found) == {"a": [[3, 4], [1, 2], [5, 6]]}
    assert "2 points are marked as hidden; shards keep them as any other" in found.warnings
    content["items"][0]["annotations"] = [
        {"type": "points", "label_id": 0, "points": [1, 2, 3, 4], "visibility": [2, 0]}
    ]
    write_json(path, content)
    assert read(tmp_path, "datumaro", keep_unlabelled=True).spec.landmark_names == ("sella",)


def test_several_points_of_one_label_are_numbered(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    cvat(tmp_path, shapes='<points label="first" occluded="0" points="0.50,0.50;10.50,20.50;30.50,40.50"></points>')
    (tmp_path / "annotations.xml").write_text(
        (tmp_path / "annotations.xml").read_text().replace("<label><name>last", "<label><type>x</type><name>last")
    )
    with pytest.raises(DataError, match="point 'first_1' is none of the"):
        read(tmp_path, "cvat")
    found = read(tmp_path, "cvat", landmarks=("first_1", "first_2", "first_3"))
    assert points_of(found) == {"a": [[0, 0], [10, 20], [30, 40]]}


def test_the_order_of_landmarks_is_that_of_the_tools_list(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    labelme(tmp_path)
    (tmp_path / "labels.txt").write_text("__ignore__\nlast\nfirst\n")
    assert read(tmp_path, "labelme").spec.landmark_names == ("last", "first")
    assert read(tmp_path, "labelme", landmarks=("first", "last")).spec.landmark_names == ("first", "last")


def test_names_of_landmarks_are_one_whether_their_accents_are_composed_or_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    shapes = [{"label": name, "points": [[10, 10]], "shape_type": "point"} for name in ("b", "\u00e9")]
    labelme(tmp_path, shapes=shapes)
    assert read(tmp_path, "labelme", landmarks=("e\u0301", "b")).spec.landmark_names == ("\u00e9", "b")


def test_a_misspelt_landmark_is_answered_with_the_one_that_was_meant(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    labelme(tmp_path)
    with pytest.raises(DataError, match=r"point 'first' is none of the 2 landmarks; did you mean 'fiirst'\?"):
        read(tmp_path, "labelme", landmarks=("fiirst", "last"))


def test_splits_come_from_the_tool_the_folder_or_the_caller(tmp_path: Path) -> None:
    picture(tmp_path / "test" / "a.png")
    datumaro(tmp_path)
    assert the_sample(read(tmp_path, "datumaro")).split == "test"
    assert the_sample(read(tmp_path, "datumaro", split="mine")).split == "mine"
    with pytest.raises(ConfigError, match=r"val_fraction=0.5, but test/a.png is of split test already"):
        read(tmp_path, "datumaro", val_fraction=0.5)
    (tmp_path / "annotations" / "default.json").rename(tmp_path / "annotations" / "Validation.json")
    assert the_sample(read(tmp_path, "datumaro")).split == "val"


def test_of_annotators_the_mean_is_taken_or_the_one_that_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    annotations = [
        {"id": 1, "completed_by": {"id": 1, "email": "a@x"}, "updated_at": "2026-02", "result": [region("p", 10, 10)]},
        {"id": 2, "completed_by": {"id": 1, "email": "a@x"}, "updated_at": "2026-01", "result": [region("p", 90, 90)]},
        {"id": 3, "completed_by": {"id": 2, "email": "b@x"}, "updated_at": "2026-01", "result": [region("p", 30, 30)]},
        {"id": 4, "completed_by": 3, "was_cancelled": True, "result": [region("p", 99, 99)]},
    ]
    label_studio(tmp_path, annotations=annotations)
    x = {percent: percent / 100 * WIDTH - 0.5 for percent in (10, 20, 30)}
    y = {percent: percent / 100 * HEIGHT - 0.5 for percent in (10, 20, 30)}
    for annotator, percent in (("mean", 20), ("a@x", 10), ("b@x", 30)):
        points = the_sample(read(tmp_path, "label-studio", annotator=annotator)).points
        np.testing.assert_allclose(points, [[x[percent], y[percent]]])
    with pytest.raises(ConfigError, match="annotator='c@x', but"):
        read(tmp_path, "label-studio", annotator="c@x")
    label_studio(tmp_path, annotations=[*annotations[:2], annotations[2] | {"ground_truth": True}])
    np.testing.assert_allclose(the_sample(read(tmp_path, "label-studio")).points, [[x[30], y[30]]])


@pytest.mark.parametrize(
    "image",
    [
        "/data/local-files/?d=films%2Fa.png",
        "s3://bucket/films/a.png",
        "http://host/films/a.png?token=3",
        "/data/upload/1/0a1b2c3d-a.png",
        "a.png",
    ],
)
def test_label_studio_names_its_pictures_in_many_ways(image: str, tmp_path: Path) -> None:
    picture(tmp_path / "films" / "a.png")
    label_studio(tmp_path, image=image)
    assert the_sample(read(tmp_path, "label-studio")).id == "films/a"


# --- spreadsheets


@pytest.mark.parametrize(
    ("header", "landmarks"),
    [
        ("image,sella_x,sella_y,Nasion_x,Nasion_y", ("sella", "Nasion")),
        ("filename,sella.X,sella.Y,Nasion.X,Nasion.Y", ("sella", "Nasion")),
        ("File,sella x [px],sella y [px],Nasion x [px],Nasion y [px]", ("sella", "Nasion")),
        ("image_id,x_sella,y_sella,x_Nasion,y_Nasion", ("sella", "Nasion")),
        ("image,sella (x),sella (y),Nasion (x),Nasion (y)", ("sella", "Nasion")),
        ("image,sellaX,sellaY,NasionX,NasionY", ("sella", "Nasion")),
        ("img,x1,y1,x2,y2", ("1", "2")),
    ],
)
def test_pairs_of_columns_are_known_by_many_names(header: str, landmarks: tuple[str, str], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "points.csv").write_text(f"{header}\na.png,1.5,2,3,4\n")
    found = read(tmp_path / "points.csv", "spreadsheet")
    assert found.spec.landmark_names == landmarks
    assert points_of(found) == {"a": [[1.5, 2], [3, 4]]}


def test_columns_of_any_name_are_read_as_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    text = "Aufnahme;S1;S2;N1;N2;mm\r\na;1,5;2;3;4;0,25\r\n"
    (tmp_path / "points.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "columns.map").write_text("sella.x = S1\nsella.y = S2\nnasion.x=N1\nnasion.y=N2\n")
    columns = columns_of(["image=Aufnahme", str(tmp_path / "columns.map"), "mm_per_px=mm"])
    found = read(tmp_path / "points.csv", "spreadsheet", columns=columns)
    assert points_of(found) == {"a": [[1.5, 2], [3, 4]]}
    assert (the_sample(found).mm_per_px, found.spec.unit) == (0.25, "mm")
    with pytest.raises(DataError, match="which column names the image"):
        read(tmp_path / "points.csv", "spreadsheet")
    with pytest.raises(ConfigError, match="wanted image, landmark"):
        columns_of(["films=x"])
    with pytest.raises(ConfigError, match="no readable file"):
        columns_of(["nowhere"])


def test_one_row_for_each_landmark_is_read_too(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = ["a.png\tsella\t1.5\t2", "a.png\tnasion\t3\t4", "b.png\tsella\t5\t6", "b.png\tnasion\t\t"]
    (tmp_path / "points.tsv").write_text("\n".join(["Image\tLandmark\tX\tY", *rows]) + "\n")
    found = read(tmp_path, "spreadsheet")
    assert points_of(found) == {"a": [[1.5, 2], [3, 4]]}
    assert [line["reason"] for line in found.refused] == ["landmark nasion has no coordinates (line 5)"]
    (tmp_path / "points.tsv").write_text("\n".join(["Image\tLandmark\tX\tY", *rows, rows[0]]) + "\n")
    with pytest.raises(DataError, match="landmark 'sella' is there twice"):
        read(tmp_path, "spreadsheet")


def test_pixels_that_count_from_the_corner_are_moved_by_half_of_one(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "points.csv").write_text("image,p_x,p_y\na.png,1.5,2.5\n")
    assert points_of(read(tmp_path, "spreadsheet", pixel_origin="corner")) == {"a": [[1, 2]]}
    assert points_of(read(tmp_path, "spreadsheet")) == {"a": [[1.5, 2.5]]}


# --- bad files


def test_truncated_files_are_answered_with_their_name(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for kind, write in TOOLS.items():
        if kind == "spreadsheet":
            continue
        path = write(tmp_path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"{path.name} is not whole (JSON|XML)"):
            read(path, kind)
        path.unlink()


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_entities_is_refused(encoding: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = cvat(tmp_path, name="&b;")
    head, rest = path.read_text().split("\n", 1)
    path.write_bytes(f"{head.replace('utf-8', encoding)}\n{BOMB}{rest}".encode(encoding))
    with pytest.raises(DataError, match="has a document type, which may define entities"):
        read(path, "cvat")


def test_json_that_nests_too_deep_or_holds_huge_numbers_is_an_error_of_its_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for content in ("[" * 100_000, "[" + "9" * 5000 + "]"):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(DataError, match=r"labels\.json is not whole JSON"):
            read(tmp_path, "coco")


ANYTHING: tuple[Any, ...] = (
    *(None, True, -1, 3, 1e308, float("nan"), 10**400, "", "x", "..", "..\\x", "\ud800"),
    *([], [1], [[1, 2], "a"], {}, {"a": 1}),
)


def changed(node: Any, values: tuple[Any, ...]) -> Iterator[Any]:
    """A JSON value with any part of it replaced by each of `values`, or left out."""
    yield from values
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        for part in changed(node[key], values):
            copy = node.copy()
            copy[key] = part
            yield copy
        copy = node.copy()
        del copy[key]
        yield copy


@pytest.mark.parametrize("kind", ["coco", "labelme", "datumaro", "label-studio"])
def test_whatever_stands_anywhere_in_a_file_it_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    path = TOOLS[kind](tmp_path)
    content = json.loads(path.read_text())
    if kind == "datumaro":
        element = {"type": "points", "label_id": 0, "points": [1, 2], "visibility": [2]}
        skeleton = {"type": "skeleton", "label_id": 0, "elements": [element]}
        content["items"][0]["annotations"] = [skeleton, content["items"][0]["annotations"][1]]
    if kind == "label-studio":
        content.append({"id": 13, "data": {"image": "a.png"}, "predictions": [{"result": [region("first", 1, 1)]}]})
    every = list(changed(content, ANYTHING))
    assert len(every) > 300
    for damaged in every:
        path.write_text(json.dumps(damaged))
        with contextlib.suppress(DataError):
            read(tmp_path, kind, tmp_path / "images")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ('<points points="1,2"></points>', "a landmark without a name"),
        ('<points label="a"></points>', "'' is not a point; wanted x,y"),
        ('<points label="a" points="1,2,3"></points>', "'1,2,3' is not a point; wanted x,y"),
        ('<points label="a" points="1,inf"></points>', "inf is not a coordinate"),
        ('<points label="a" points="1,2"></points><points label="a" points="3,4"></points>', "'a' is there twice"),
        ('<points label="a" points="nan,2"></points>', "no point of any landmark"),
    ],
)
def test_points_of_cvat_that_are_none_are_named(shapes: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    cvat(tmp_path, shapes=shapes)
    with pytest.raises(DataError, match=message):
        read(tmp_path, "cvat")


def test_labels_twice_and_labels_on_no_image_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = labelme(tmp_path)
    content = json.loads(path.read_text())
    write_json(path, content | {"shapes": [*content["shapes"], content["shapes"][0]]})
    with pytest.raises(DataError, match=r"a.json: landmark 'first' is there twice"):
        read(tmp_path, "labelme")
    path.unlink()
    coco(tmp_path, annotations=[{"id": 1, "image_id": 99, "category_id": 3, "keypoints": [1, 2, 2, 3, 4, 2]}])
    with pytest.raises(DataError, match="image 99 is not in the list of images"):
        read(tmp_path, "coco")
    coco(tmp_path, keypoints=[1, 2, 2, 3, 4])
    with pytest.raises(DataError, match="5 numbers of keypoints, wanted x, y, v for each of 2"):
        read(tmp_path, "coco")
    coco(tmp_path, keypoints=[1, 2, 7, 3, 4, 2])
    with pytest.raises(DataError, match="visibility 7 of first; wanted 0, 1 or 2"):
        read(tmp_path, "coco")
    coco(tmp_path, keypoints=[1, "2", 2, 3, 4, 2])
    with pytest.raises(DataError, match="'2' is not a coordinate"):
        read(tmp_path, "coco")


@pytest.mark.parametrize("percent", [101.0, -1.0])
def test_points_outside_of_their_image_stop_the_packing(percent: float, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    label_studio(tmp_path, annotations=[{"id": 1, "result": [region("p", percent, 50)]}])
    with pytest.raises(DataError, match=r"1 images have landmarks outside \('a'\)"):
        pack(tmp_path, tmp_path / "out", PackSettings(kind="label-studio", size=32), workers=1)


def test_an_image_that_was_labelled_in_another_shape_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    coco(tmp_path, files=("a.png", "b.png"))
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"][1] |= {"width": HEIGHT, "height": WIDTH}
    write_json(tmp_path / "labels.json", content)
    summary = pack(tmp_path, tmp_path / "out", PackSettings(kind="coco", size=32), workers=1)
    assert (summary.packed, summary.reasons) == (1, {"SHAPE": 1})


def test_shares_of_the_sides_are_no_pixels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "points.csv").write_text("image,p_x,p_y\na.png,0.25,0.5\n")
    with pytest.raises(DataError, match="which look like shares"):
        read(tmp_path, "spreadsheet")


def test_options_of_tools_are_refused_for_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pixel_origin means nothing for kind folder"):
        PackSettings(kind="folder", pixel_origin="corner")
    with pytest.raises(ConfigError, match="--images means nothing for kind folder; it is for coco, labelme"):
        pack(tmp_path, tmp_path / "out", PackSettings(kind="folder"), images=tmp_path)


def test_a_json_min_of_label_studio_and_a_video_of_cvat_are_told_how_to_export(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write_json(tmp_path / "export.json", [{"id": 1, "image": "a.png", "label": []}])
    with pytest.raises(DataError, match="export the project as 'JSON', not as 'JSON-MIN'"):
        read(tmp_path, "label-studio")
    (tmp_path / "annotations.xml").write_text("<annotations><track id='0' label='x'></track></annotations>")
    with pytest.raises(DataError, match=r"export it as 'CVAT for images 1\.1'"):
        read(tmp_path, "cvat")


def test_a_validation_share_parts_patients_whom_only_the_dicom_files_name(tmp_path: Path) -> None:
    for number in range(6):
        picture(tmp_path / "films" / f"{number}.dcm", dicom=True, PatientID=f"patient {number // 3}")
        labelme(tmp_path / "labels", str(number))
    settings = PackSettings(kind="labelme", size=16, val_fraction=0.5)
    pack(tmp_path / "labels", tmp_path / "out", settings, images=tmp_path / "films", workers=1)
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(6)]
    assert [record.split for record in records] == ["train"] * 3 + ["val"] * 3
    assert {record.group for record in records} == {None}  # without a key nothing of a patient is kept


def test_both_splits_of_a_validation_share_are_there_whichever_images_fall_into_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    labelme(tmp_path)
    assert read(tmp_path, "labelme", val_fraction=1e-9).split_names() == ("train", "val")


def test_tasks_of_a_cvat_project_without_a_subset_are_of_no_split_called_default(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = cvat(tmp_path)
    plain = path.read_text()
    for subset, split in (("default", "train"), ("Validation", "val"), ("test", "test")):
        path.write_text(plain.replace("<image ", f'<image subset="{subset}" '))
        assert the_sample(read(tmp_path, "cvat")).split == split


def test_labels_of_label_studio_with_an_alias_are_in_its_results_by_that(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    label_studio(tmp_path, annotations=[{"id": 1, "result": [region("S", 50, 50), region("Nasion", 25, 25)]}])
    labels = '<Label value="Nasion"/><Label value="Sella turcica" alias="S"/>'
    (tmp_path / "label_config.xml").write_text(f"<View><KeyPointLabels>{labels}</KeyPointLabels></View>")
    found = read(tmp_path, "label-studio")
    assert found.spec.landmark_names == ("Nasion", "S")
    assert points_of(found) == {"a": [[15.5, 11.5], [31.5, 23.5]]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("reader,width,height,p_x,p_y", "a,64,48,10,10", "b,128,96,20,20"), r"size \(64, 48\) and \(128, 96\)"),
        (("reader,mm_per_px,p_x,p_y", "a,0.1,10,10", "b,0.2,20,20"), "mm_per_px 0.1 and 0.2"),
        (("reader,split,p_x,p_y", "a,train,10,10", "b,test,20,20"), "split train and test"),
        (("landmark,x,y,split", "p,10,10,train", "q,20,20,test"), "line 3: split is 'test' here and 'train' before"),
        (("p_x,p_y,p x,p y", "1,2,30,40"), "columns p_x and p x both name x of p"),
    ],
)
def test_spreadsheets_that_say_two_things_of_an_image_are_refused(
    lines: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    header, *rows = lines
    (tmp_path / "points.csv").write_text("\n".join([f"image,{header}", *(f"a.png,{row}" for row in rows)]))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "points.csv", "spreadsheet")


def test_what_one_row_or_annotator_says_of_an_image_counts_for_all_of_it(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    table = tmp_path / "points.csv"
    for text in (
        "image,landmark,x,y,mm_per_px,split\na,p,10,20,,\na,q,30,40,0.5,test\n",
        "image,reader,p_x,p_y,q_x,q_y,mm_per_px,split\na,one,10,20,30,40,,\na,two,10,20,30,40,0.5,test\n",
    ):
        table.write_text(text)
        sample = the_sample(read(table, "spreadsheet"))
        assert (sample.mm_per_px, sample.split) == (0.5, "test")
        np.testing.assert_array_equal(sample.points, [[10, 20], [30, 40]])


def test_two_landmarks_that_differ_in_blanks_only_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    shapes = [{"label": name, "points": [[10, 10]], "shape_type": "point"} for name in ("p 1", "p  1")]
    labelme(tmp_path, shapes=shapes)
    with pytest.raises(DataError, match=r"a.png: two landmarks differ in nothing but blanks"):
        read(tmp_path, "labelme")


def test_cells_that_stand_for_unknown_say_nothing_of_an_image_or_its_patient(tmp_path: Path) -> None:
    facts = {"a": "unknown,-,nan", "b": "Anonymous,n/a,", "c": "-,0.5,test", "d": "p9,,"}
    for name in facts:
        picture(tmp_path / f"{name}.png")
    rows = [f"{name},{text},3,4" for name, text in facts.items()]
    (tmp_path / "points.csv").write_text("\n".join(["image,patient_id,mm_per_px,split,p_x,p_y", *rows]))
    found = read(tmp_path / "points.csv", "spreadsheet").samples
    assert [(each.group, each.mm_per_px, each.split) for each in found] == [
        (None, None, "train"),
        (None, None, "train"),
        (None, 0.5, "test"),
        ("p9", None, "train"),
    ]


def test_pictures_of_one_name_in_two_subsets_of_datumaro_are_told_apart(tmp_path: Path) -> None:
    for index, subset in enumerate(("Test", "Train")):
        picture(tmp_path / "images" / subset / "a.png")
        point = {"type": "points", "label_id": 0, "points": [3.5 + index, 4.5]}
        datumaro(tmp_path, shapes=[point], subset=subset)
    found = read(tmp_path, "datumaro")
    assert points_of(found) == {"images/Test/a": [[3, 4]], "images/Train/a": [[4, 4]]}
    assert [sample.split for sample in found.samples] == ["test", "train"]
    (tmp_path / "images" / "Train" / "a.png").unlink()
    with pytest.raises(DataError, match=r"images/Test/a.png is labelled twice, as 'Test/a.png' and 'Train/a.png'"):
        read(tmp_path, "datumaro")


def test_a_set_is_called_after_its_label_file_and_after_a_list_or_tar_with_its_suffix(tmp_path: Path) -> None:
    for name in ("points.csv", "films.txt", "films.tar"):
        (tmp_path / name).touch()
    for kind, name, called in (
        ("spreadsheet", "points.csv", "points"),
        ("folder", "films.txt", "films.txt"),
        ("folder", "films.tar", "films.tar"),
    ):
        assert PackSettings(kind=kind).filled_for(tmp_path / name, has_key=False).name == called
