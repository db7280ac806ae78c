"""Tables as people save them: what they mean comes out right, and what cannot be known is refused or told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.sources.base import RawDataset
from ddpm_lmk.data.sources.ids import KeyedIds, open_key
from ddpm_lmk.data.sources.table import read_table
from ddpm_lmk.errors import ConfigError, DataError

IMAGES = "image_id,file,split\n" + "".join(f"{number:03d},{number:03d}.png,train\n" for number in range(1, 11))
NAMES = ("Nasenrücken", "鼻根点")


def landmarks(separator: str = ",", decimal: str = ".", *, names: tuple[str, str] = NAMES, ids: str = "{:03d}") -> str:
    """Two landmarks of ten images: (10.5 + n, 20.25) and (30.5, 40 + n)."""
    rows = [separator.join(("image_id", "landmark_index", "landmark_name", "x", "y"))]
    for number in range(1, 11):
        for index, (x, y) in enumerate([(10.5 + number, 20.25), (30.5, 40 + number)]):
            cells = [ids.format(number), str(index), names[index], str(x), str(y)]
            rows.append(separator.join(cells[:3] + [cell.replace(".", decimal) for cell in cells[3:]]))
    return "\n".join(rows) + "\n"


def read(
    root: Path,
    labels: str | bytes | None,
    images: str | bytes = IMAGES,
    keys: KeyedIds | None = None,
    thresholds: tuple[float, ...] = (3.0,),
    **settings: Any,
) -> RawDataset:
    for name, content in (("images.csv", images), ("landmarks.csv", labels)):
        if content is not None:
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(root, PackSettings(kind="table", name="mine", thresholds=thresholds, **settings), keys)


def assert_right(found: RawDataset, names: tuple[str, str] = NAMES) -> None:
    assert found.spec.landmark_names == names
    for number, sample in enumerate(found.samples, 1):
        assert sample.id == f"{number:03d}"
        np.testing.assert_array_equal(sample.points, [[10.5 + number, 20.25], [30.5, 40 + number]])


# --- how the text is written


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", "."), ("\t", "."), ("|", "."), (";", ",")])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_any_usual_text_says_the_same(tmp_path: Path, encoding: str, separator: str, decimal: str, ends: str) -> None:
    text = landmarks(separator, decimal).replace("\n", ends)
    found = read(tmp_path, text.encode(encoding), IMAGES.replace("\n", ends).encode(encoding))
    assert_right(found)
    assert any("decimal commas: '11,5' is 11.5" in line for line in found.warnings) == (decimal == ",")


def test_what_windows_writes_is_read_with_a_word_and_no_surrogate_gets_in(tmp_path: Path) -> None:
    names = ("Nasenrücken", "Größe")
    found = read(tmp_path, landmarks(names=names).encode("cp1252"))
    assert_right(found, names)
    (line,) = [line for line in found.warnings if "cp1252" in line]
    assert "Nasenrücken" in line


def test_what_spreadsheets_leave_behind_is_passed_over(tmp_path: Path) -> None:
    text = "sep=;\r\n" + landmarks(";").replace("\n", ";\r\n") + ";;;;;\r\n\r\n ; ; ; ; ;\r\n"
    assert_right(read(tmp_path, text, IMAGES.replace("image_id", " Image_ID ").replace(",train", " ,train ")))


def test_a_name_in_quotes_over_two_lines_is_one_name_and_lines_are_still_counted(tmp_path: Path) -> None:
    text = landmarks(names=('"Nasen-\nrücken"', "鼻根点"))
    assert read(tmp_path, text).spec.landmark_names == ("Nasen- rücken", "鼻根点")
    with pytest.raises(DataError, match=r"landmarks\.csv line 6: 'x' is not a number"):
        read(tmp_path, text.replace("12.5", "x", 1))


def test_composed_and_decomposed_letters_are_the_same_name(tmp_path: Path) -> None:
    text = landmarks().replace("002,0,Nasenrücken", "002,0,Nasenru\u0308cken")
    assert_right(read(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (landmarks().encode("utf-16-le"), "line 1: a NUL"),
        (landmarks().encode("utf-16")[:-1], "begins as utf-16 and is damaged"),
        (b"PK\x03\x04 xlsx", "workbook of a spreadsheet"),
        (landmarks().encode() + b"\x81\x8d,\xff\n", "line 22: neither UTF-8 nor cp1252"),
        (landmarks().replace("landmark_name", "x").encode(), "column 'x' comes twice"),
        (landmarks(";").replace("11.5", "1,234").replace(".5", "").replace(".25", "").encode(), "may be 1234 or 1.234"),
        (landmarks(";").replace("11.5", "1,5").encode(), "'1,5' is not a number"),
        (landmarks().replace("11.5", '"1,5"').encode(), "'1,5' is not a number"),
        (landmarks().replace("11.5", "1.234.5").encode(), "is not a number"),
        (landmarks(names=("a", "a")).encode(), "landmarks 0 and 1 are both called 'a'; give each"),
        (landmarks(names=("a\x07", "b")).encode(), "control characters"),
        (landmarks().replace(",1,", ",2,").replace(",0,", ",1,").encode(), "runs from 1 to 2, wanted from 0"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_shares_of_the_sides_are_not_taken_for_pixels(tmp_path: Path) -> None:
    text = "image_id,landmark_index,x,y\n" + "".join(f"{n:03d},0,0.{n:02d},0.5\n" for n in range(1, 11))
    with pytest.raises(DataError, match="all x and y lie from 0 to 1"):
        read(tmp_path, text)


# --- labels that are not whole


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        *((cells, "has no coordinates") for cells in (",", "nan,nan", "NaN,3", "5,N/A", "-,-", "None,null")),
        *((f"{value},{value}", "tables write for not seen") for value in ("0", "0.0", "-1", "-1.0", "-999", "-9999")),
    ],
)
def test_a_landmark_that_was_not_seen_is_never_a_label(tmp_path: Path, cells: str, reason: str) -> None:
    text = landmarks().replace("002,1,鼻根点,30.5,42", f"002,1,鼻根点,{cells}")
    found = read(tmp_path, text)
    assert [sample.id for sample in found.samples] == [f"{n:03d}" for n in (1, *range(3, 11))]
    assert all(sample.points is not None for sample in found.samples)
    (line,) = found.refused
    assert (line["id"], line["code"]) == ("002", "INCOMPLETE_LABEL")
    assert "鼻根点" in line["reason"]
    assert reason in line["reason"]
    assert any("missing or not seen: 鼻根点 in 1" in line for line in found.warnings)
    kept = read(tmp_path, text, keep_unlabelled=True)
    assert [sample.id for sample in kept.samples if sample.points is None] == ["002"]


def test_a_landmark_without_a_row_costs_its_image_and_no_other(tmp_path: Path) -> None:
    found = read(tmp_path, landmarks().replace("002,1,鼻根点,30.5,42\n", ""))
    assert (len(list(found.samples)), found.refused[0]["id"]) == (9, "002")
    assert "landmark 鼻根点 has no row" in found.refused[0]["reason"]


def test_each_annotator_of_an_image_gives_every_landmark_or_the_image_is_left_out(tmp_path: Path) -> None:
    rows = "image_id,landmark_index,x,y,annotator\n001,0,1,2,a\n001,0,3,4,b\n002,0,5,6,a\n002,0,-1,-1,b\n003,0,7,8,a\n"
    found = read(tmp_path, rows)
    points = {sample.id: sample.points for sample in found.samples}
    np.testing.assert_array_equal(points["001"], [[2, 3]])
    np.testing.assert_array_equal(points["003"], [[7, 8]])
    assert "002" not in points
    np.testing.assert_array_equal(list(read(tmp_path, rows, annotator="a").samples)[1].points, [[5, 6]])
    with pytest.raises(ConfigError, match="has a, b"):
        read(tmp_path, rows, annotator="z")


def test_places_that_repeat_to_the_last_digit_are_told(tmp_path: Path) -> None:
    text = landmarks()
    for number in (2, 3, 4):
        text = text.replace(f"30.5,{40 + number}\n", "512,512\n")
    found = read(tmp_path, text.replace("007,1,鼻根点,30.5,47", "007,1,鼻根点,17.5,20.25"))
    assert any("landmark 鼻根点 lies at the same place (512, 512) in 3 of 10 images" in s for s in found.warnings)
    assert any("lie at the same place in 1 images, first '007'" in line for line in found.warnings)
    assert not any("same place" in line for line in read(tmp_path, landmarks()).warnings)


# --- files, ids, patients


def test_files_are_found_in_whatever_spelling_the_table_has(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    old = os.fsdecode("rücken.png".encode("cp1252"))
    names = ["plain.png", "u\u0308.png", "sub/x.png", old, " blank.png "]
    for name in names:
        (tmp_path / name).touch()
    rows = ["plain.png ", "ü.png", "sub\\x.png", "rücken.png", " blank.png "]
    text = "image_id,file,split\n" + "".join(f"{n},{row},train\n" for n, row in enumerate(rows))
    found = read(tmp_path, None, text.encode("cp1252"))
    assert [sample.path for sample in found.samples] == [tmp_path / name for name in names]


def test_an_image_without_a_file_is_left_out_and_not_every_image(tmp_path: Path) -> None:
    found = read(tmp_path, landmarks(), IMAGES.replace("002.png", " "))
    assert (len(list(found.samples)), [line["id"] for line in found.refused]) == (9, ["002"])
    assert found.refused[0]["reason"] == "line 3 of images.csv names no file"


@pytest.mark.parametrize(("ids", "example"), [("{}", "'1' and '001'"), ("{:03d}.png", "'001.png' and '001'")])
def test_ids_that_do_not_match_are_told_with_an_example(tmp_path: Path, ids: str, example: str) -> None:
    with pytest.raises(DataError, match=rf"they do not match, e\.g\. {example}"):
        read(tmp_path, landmarks(ids=ids))
    some = landmarks(ids=ids).replace("\n" + ids.format(7) + ",", "\n007,")
    found = read(tmp_path, some)
    assert [sample.id for sample in found.samples] == ["007"]
    assert any("9 ids of landmarks.csv and images.csv do not match, e.g." in line for line in found.warnings)


def test_labels_without_an_image_are_told_and_are_no_refused_images(tmp_path: Path) -> None:
    found = read(tmp_path, landmarks(), "image_id,file,split\n001,001.png,train\n")
    assert found.refused == []
    assert any("9 ids of landmarks.csv are not in images.csv, first '002'" in line for line in found.warnings)


def test_unknown_patients_are_not_one_patient(tmp_path: Path) -> None:
    cells = ["A", "nan", "", "N/A", "unknown", "B", "B", "B", "B", "B"]
    rows = "".join(f"{n:03d},{n:03d}.png,train,{cell}\n" for n, cell in enumerate(cells, 1))
    found = read(tmp_path, None, "image_id,file,split,patient_id\n" + rows + "011,1.png,train,B\n012,1.png,train,B\n")
    assert [sample.group for sample in found.samples] == ["A", None, None, None, None, *"BBBBBBB"]
    assert any("7 of 8 images have one patient_id" in line for line in found.warnings)


def test_a_key_hides_ids_and_patients_and_is_the_same_for_all_kinds(tmp_path: Path) -> None:
    keys = open_key(tmp_path / "key")
    rows = "image_id,file,split,patient_id\nDoe,a.png,train,MRN-1\nRoe,,train,MRN-2\nPoe,b.png,test,\n"
    found = read(tmp_path, None, rows, keys=keys)
    assert {sample.id: sample.group for sample in found.samples} == {
        keys.of_path("Doe"): keys.of_patient("MRN-1"),
        keys.of_path("Poe"): None,
    }
    assert [line["id"] for line in found.refused] == [keys.of_path("Roe")]
    assert found.listing is not None
    assert dict(found.listing) == {keys.of_path("Doe"): "a.png", keys.of_path("Poe"): "b.png"}


# --- success rates


def test_millimetres_bring_the_usual_thresholds_and_pixels_a_word(tmp_path: Path) -> None:
    with_spacing = IMAGES.replace("split\n", "split,mm_per_pixel\n").replace(",train\n", ",train,0.1\n")
    spec = read(tmp_path, landmarks(), with_spacing, thresholds=()).spec
    assert (spec.unit, spec.spacing.kind, spec.sdr_thresholds) == ("mm", "file", (2, 2.5, 3, 4))
    found = read(tmp_path, landmarks(), thresholds=())
    assert found.spec.sdr_thresholds == ()
    assert any("no success rate (SDR) is known for them; give --threshold" in line for line in found.warnings)


def test_a_spacing_pair_that_is_none_of_the_landmarks_is_a_plain_refusal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spacing pair 0, 9 must be two of the 2 landmarks"):
        read(tmp_path, landmarks(), spacing_pair=(0, 9))


# --- points outside their image


def films(root: Path, width: int = 413, height: int = 512) -> Path:
    for number in range(1, 11):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    (root / "images.csv").write_text(IMAGES)
    return root


def label(root: Path, points: list[tuple[float, float]]) -> None:
    rows = "".join(f"{n:03d},{i},{x + n},{y + n}\n" for n in range(1, 11) for i, (x, y) in enumerate(points))
    (root / "landmarks.csv").write_text("image_id,landmark_index,x,y\n" + rows)


@pytest.mark.parametrize("clip", [False, True])
def test_points_of_a_larger_original_are_never_moved_into_a_corner(tmp_path: Path, clip: bool) -> None:
    label(films(tmp_path), [(700, 300), (1459, 1690)])
    wanted = "points reach 1469 x 1700, the file is 413 x 512: fill in orig_width and orig_height"
    with pytest.raises(DataError, match=wanted):
        pack(tmp_path, tmp_path / "out", PackSettings(kind="table", clip_landmarks=clip), workers=1)


def test_slips_over_the_edge_are_counted_when_they_are_clipped(tmp_path: Path) -> None:
    label(films(tmp_path), [(410, 300), (100, 100)])
    with pytest.raises(DataError, match=r"8 images have landmarks outside .* or pass --clip-landmarks"):
        pack(tmp_path, tmp_path / "out", PackSettings(kind="table"), workers=1)
    summary = pack(tmp_path, tmp_path / "out", PackSettings(kind="table", clip_landmarks=True), workers=1)
    assert "--clip-landmarks moved 8 points of 8 images, by up to 8.0 px" in summary.warnings
    record = Manifest.open(tmp_path / "out").read_record(9)
    np.testing.assert_array_equal(record.points, [[412, 310], [110, 110]])


def test_landmarks_that_all_lie_in_one_corner_are_told(tmp_path: Path) -> None:
    label(films(tmp_path), [(50, 60), (100, 120)])
    summary = pack(tmp_path, tmp_path / "out", PackSettings(kind="table"), workers=1)
    assert any("no landmark of 10 images lies beyond 27% of the width and 25% of the" in s for s in summary.warnings)
