"""Readers: the three public sets in their real layouts, and tables of one's own with all their faults."""

import csv
import shutil
from itertools import chain

import cv2
import numpy as np
import pytest

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.pack import READERS
from ddpm_lmk.data.sources.base import parse_decimal
from ddpm_lmk.data.sources.folder import read_folder
from ddpm_lmk.data.sources.kinds import KINDS, ONLY_FOR
from ddpm_lmk.data.sources.public import CHEST_EXCLUDED, read_cephalometric, read_chest, read_hand
from ddpm_lmk.data.sources.table import read_table
from ddpm_lmk.errors import ConfigError, DataError

HEADER = "image_id,landmark_index,landmark_name,x,y\n"


def table(root, images="a,a.png,train\nb,b.png,test\n", labels=None, columns="image_id,file,split"):
    (root / "images.csv").write_text(f"{columns}\n{images}", "utf-8")
    if labels is not None:
        (root / "landmarks.csv").write_text(labels, "utf-8")
    return root


def read(root, **settings):
    return read_table(root, PackSettings(kind="table", name="mine", **settings), None)


def pool(root, **settings):
    return read_folder(root, PackSettings(kind="folder", name="pool", **settings), None)


def labels_for(*ids, header=HEADER):
    return header + "".join(f"{image},{index},n{index},{index + 1},{index + 2}\n" for image in ids for index in (0, 1))


def splits(found):
    return {sample.id: sample.split for sample in found.samples}


# --- numbers


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("-0.5", -0.5), ("+.5e1", 5), ("7.", 7), (" 3 ", 3)])
def test_plain_numbers_are_read(text, value):
    assert parse_decimal(text, "here") == value


@pytest.mark.parametrize("text", ["nan", "inf", "1_0", "１２", "", "0x10", "1,5", "1e999", "--1", "1 2", "1\n"])
def test_anything_else_is_refused_with_its_place(text):
    with pytest.raises(DataError, match=r"here: .* is not a number"):
        parse_decimal(text, "here")


# --- folders


def test_a_folder_is_read_in_order_of_id_and_split_by_hash(tmp_path):
    for name in ("b/2.png", "a.JPG", "b/10.tif", ".hidden.png", "b/.x/3.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    found = pool(tmp_path, val_fraction=0.5)
    assert [sample.id for sample in found.samples] == ["a", "b/10", "b/2"]
    before = splits(found)
    (tmp_path / "b/3.png").write_bytes(b"")
    after = splits(pool(tmp_path, val_fraction=0.5))
    assert {key: after[key] for key in before} == before
    for number in range(400):
        (tmp_path / f"{number}.png").write_bytes(b"")
    assert 70 <= sum(split == "val" for split in splits(pool(tmp_path, val_fraction=0.25, seed=3)).values()) <= 130


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no image below"):
        pool(tmp_path)
    with pytest.raises(DataError, match="is not there"):
        pool(tmp_path / "nowhere")


# --- the public sets


def picture(path, width=40, height=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (height, width), np.uint8))


def test_chest_labels_become_native_pixels(real_data):
    found = read_chest(real_data("raw_samples") / "chest_shenzhen", convention="paper")
    first = found.samples[0]
    assert (first.id, first.native_size, len(found.samples)) == ("CHNCXR_0001_0", (750, 730), 11)
    np.testing.assert_allclose(first.points[0], [0.41625 * 750, 0.14375 * 730])
    assert "11 of 270" in found.warnings[0]


@pytest.mark.parametrize(("convention", "counts"), [("paper", (195, 34, 41)), ("published", (195, 34, 50))])
def test_chest_splits_are_those_of_the_convention(real_data, tmp_path, convention, counts):
    shutil.copytree(real_data("raw_samples") / "chest_shenzhen" / "labels", tmp_path / "labels")
    (tmp_path / "pngs").mkdir()
    picture(tmp_path / "one.png")
    for label in (tmp_path / "labels").iterdir():
        (tmp_path / "pngs" / f"{label.stem}.png").hardlink_to(tmp_path / "one.png")
    found = read_chest(tmp_path, convention=convention)
    names = splits(found)
    assert tuple(list(names.values()).count(name) for name in ("train", "val", "test")) == counts
    if convention == "paper":
        assert not CHEST_EXCLUDED & set(names)
        assert len(found.refused) == 9
        borders = ("0245", "0246", "0281", "0282")
        assert [names[f"CHNCXR_{n}_0"] for n in borders] == ["train", "val", "val", "test"]


def test_ceph_labels_are_the_mean_of_both_readers_or_one(real_data):
    root = real_data("raw_samples") / "cephalo"
    mean = read_cephalometric(root, convention="paper", annotator="mean").samples[0]
    np.testing.assert_array_equal(mean.points[0], [(829 + 835) / 2, (991 + 996) / 2])
    junior = read_cephalometric(root, convention="paper", annotator="junior").samples[0]
    np.testing.assert_array_equal(junior.points[0], [829, 991])
    with pytest.raises(ConfigError, match="mean, junior or senior"):
        read_cephalometric(root, convention="paper", annotator="third")


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "png"])
@pytest.mark.parametrize(
    ("convention", "wanted"),
    [
        ("paper", ["train", "train", "val", "test", "test"]),
        ("published", ["train", "train", "train", "test1", "test2"]),
    ],
)
def test_ceph_splits_follow_the_number_in_any_format(tmp_path, suffix, convention, wanted):
    numbers = ("001", "130", "150", "151", "301")
    for number in numbers:
        picture(tmp_path / "RawImage" / "SomeData" / f"{number}.{suffix}")
        for reader in ("junior", "senior"):
            label = tmp_path / "AnnotationsByMD" / f"400_{reader}" / f"{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("3,4\r\n" * 19 + "1\r\n" * 8)
    found = read_cephalometric(tmp_path, convention=convention, annotator="mean")
    assert [splits(found)[number] for number in numbers] == wanted


@pytest.mark.parametrize(("lines", "message"), [(18, "wanted 19 lines"), (20, "number of points differs")])
def test_a_ceph_label_with_a_wrong_number_of_points_is_an_error(tmp_path, lines, message):
    picture(tmp_path / "001.png")
    for reader in ("junior", "senior"):
        (tmp_path / f"400_{reader}").mkdir()
        (tmp_path / f"400_{reader}" / "001.txt").write_text("3,4\n" * lines)
    with pytest.raises(DataError, match=message):
        read_cephalometric(tmp_path, convention="paper", annotator="mean")


def test_ceph_images_without_both_labels_are_listed(real_data, tmp_path):
    shutil.copytree(real_data("raw_samples") / "cephalo", tmp_path / "set")
    (tmp_path / "set" / "400_senior" / "002.txt").unlink()
    found = read_cephalometric(tmp_path / "set", convention="paper", annotator="mean")
    assert found.refused == [{"id": "002", "code": "NO_LABEL", "reason": "no label file in 400_senior"}]


def test_hand_images_without_a_row_are_listed_and_rows_without_image_ignored(real_data, tmp_path):
    shutil.copytree(real_data("raw_samples") / "hand", tmp_path / "set")
    for name in ("3142", "3143"):
        picture(tmp_path / "set" / "jpg" / f"{name}.jpg")
    found = read_hand(tmp_path / "set", spacing_pair=None)
    assert splits(found) == {"3142": "train", "3143": "train"}
    np.testing.assert_array_equal(found.samples[0].points[0], [297, 1913])
    assert found.refused == [{"id": "3128", "code": "NO_LABEL", "reason": "no row in all.csv"}]
    assert (found.spec.spacing.i, found.spec.spacing.j) == (1, 5)
    assert (found.spec.paper_pair.i, found.spec.paper_pair.j) == (0, 4)
    assert read_hand(tmp_path / "set", spacing_pair=(0, 4)).spec.spacing.i == 0


def test_hand_splits_are_550_59_and_the_rest_sorted_as_text(real_data, tmp_path):
    shutil.copytree(real_data("raw_samples") / "hand" / "labels", tmp_path / "labels")
    with open(tmp_path / "labels" / "all.csv") as file:
        names = [row[0] for row in csv.reader(file)]
    (tmp_path / "jpg").mkdir()
    for name in names:
        (tmp_path / "jpg" / f"{name}.jpg").write_bytes(b"")
    found = splits(read_hand(tmp_path, spacing_pair=None))
    assert [list(found.values()).count(name) for name in ("train", "val", "test")] == [550, 59, len(names) - 609]
    assert list(found) == sorted(names)


# --- tables


def test_the_real_ceph_table_follows_its_spec(real_data):
    found = read(real_data("isbi2015_ceph"), spec="cephalometric")
    assert (len(found.samples), found.spec.unit, found.spec.num_landmarks) == (300, "mm", 19)
    assert list(splits(found).values()).count("test1") == 150
    np.testing.assert_array_equal(found.samples[0].points[0], [832, 993.5])
    senior = read(real_data("isbi2015_ceph"), spec="cephalometric", annotator="senior")  # in a file of its own
    np.testing.assert_array_equal(senior.samples[0].points[0], [835, 996])


def test_the_annotators_pair_agrees_with_the_stated_spacing_of_the_hands(real_data):
    found = read(real_data("dha_hand"), spec="hand")
    assert len(found.samples) == 9
    for sample in found.samples:
        assert found.spec.resolve_spacing(sample.points, None) == pytest.approx(sample.mm_per_px, abs=1e-6)
    assert found.refused == [{"id": "3128", "code": "NO_LABEL", "reason": "no row in landmarks.csv"}]


def test_without_spacing_a_table_is_in_pixels_and_never_in_guessed_millimetres(tmp_path):
    table(tmp_path, labels=labels_for("a", "b"))
    assert read(tmp_path).spec.unit == "px"
    with pytest.raises(DataError, match="2 of 2 labelled images have no mm_per_pixel"):
        read(tmp_path, unit="mm")


def test_a_table_without_landmarks_is_unlabelled_and_its_split_may_be_given(tmp_path):
    found = read(table(tmp_path))
    assert (found.spec.num_landmarks, splits(found)) == (0, {"a": "train", "b": "test"})
    table(tmp_path, "a,a.png\n", columns="image_id,file")
    assert splits(read(tmp_path, split="test")) == {"a": "test"}
    with pytest.raises(DataError, match="no column 'split'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("", None, "has no rows"),
        ("a,a.png,train\na,b.png,train\n", None, r"images\.csv line 3: image_id 'a' is there twice"),
        ("a,../a.png,train\n", None, "leaves the table's folder"),
        ("a,/a.png,train\n", None, "leaves the table's folder"),
        ("a,a.png\n", None, "line 2: 2 fields, the header has 3"),
        ("a,a.png,tr ain\n", None, "split 'tr ain'"),
        ("a,a.png,train\n", HEADER + "a,0,n,1_0,2\n", r"landmarks\.csv line 2: '1_0' is not a number"),
        ("a,a.png,train\n", HEADER + "a,0,n,1,2\na,0,n,1,2\n", "line 3: landmark 0 of image 'a' is there twice"),
        ("a,a.png,train\n", HEADER + "a,0,n,1,2\na,2,m,1,2\n", "must run from 0 without a gap"),
        ("a,a.png,train\n", HEADER + "a,0,n,1,2\nb,0,m,1,2\n", "landmark 0 is called 'm' here"),
        ("a,a.png,train\n", HEADER + "a,0.5,n,1,2\n", "wanted a whole number"),
        ("a,a.png,train\n", "image_id,landmark_index,x\n", "no column 'y'"),
    ],
)
def test_a_contradictory_table_is_refused_with_file_and_line(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        read(table(tmp_path, images, labels))


@pytest.mark.parametrize("value", ["0", "-0.1", "nan"])
def test_a_spacing_that_is_no_length_is_refused(tmp_path, value):
    table(tmp_path, f"a,a.png,train,{value}\n", columns="image_id,file,split,mm_per_pixel")
    with pytest.raises(DataError, match=r"images\.csv line 2"):
        read(tmp_path)


def test_labels_of_another_set_do_not_pass_as_a_known_one(tmp_path):
    table(tmp_path, labels=labels_for("a", "b"))
    with pytest.raises(DataError, match="has 2 landmarks, spec chest has 6"):
        read(tmp_path, spec="chest")
    with pytest.raises(ConfigError, match="not known"):
        read(tmp_path, spec="knee")


def test_every_kind_of_source_has_its_reader():
    assert set(READERS) == set(KINDS)
    assert set(chain(*ONLY_FOR.values())) <= set(KINDS)
    assert set(ONLY_FOR) <= set(PackSettings.model_fields)
