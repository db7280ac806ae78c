"""Packing: bad files are listed, contradictory labels stop it, and points stay on what they mark."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import ConfigError, DataError, RunConflictError


def noise(path, seed, shape=(60, 40)):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    for number in range(3):
        noise(root / f"{number}.png", number)
    return root


def test_a_bad_file_is_listed_with_its_reason(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"not a picture")
    content = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    noise(folder / "same.png", 0)
    summary = pack(folder, tmp_path / "out", PackSettings(kind="folder", size=32), workers=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert lines == summary.refused
    assert [line["id"] for line in lines] == ["bad", "cut", "empty", "same"]
    assert "same picture" in lines[3]["reason"]
    assert (summary.packed, summary.per_split) == (3, {"train": 3})


def test_when_nothing_is_left_it_says_why(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"nothing to pack: 1 images were refused \(EMPTY 1\), first 'x'"):
        pack(tmp_path, tmp_path / "out", PackSettings(kind="folder"), workers=1)
    assert not (tmp_path / "out").exists()


def test_any_number_of_workers_writes_the_same_bytes_and_tells_of_every_image(folder, tmp_path):
    for number in range(3, 40):
        noise(folder / f"{number}.png", number)
    (folder / "7.png").write_bytes(b"bad")
    settings, told = PackSettings(kind="folder", size=16, val_fraction=0.2), []
    for workers in (1, 2):
        pack(folder, tmp_path / f"{workers}", settings, workers=workers, progress=lambda *counts: told.append(counts))
    assert told == 2 * [(number, 40) for number in range(1, 41)]
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
    before = Manifest.open(tmp_path / "1").fingerprint
    with pytest.raises(RunConflictError, match="already holds packed shards"):
        pack(folder, tmp_path / "1", PackSettings(kind="folder", size=32))
    assert Manifest.open(tmp_path / "1").fingerprint == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size=8"),
        ({"bits": 12}, "bits=12"),
        ({"encoding": "jpeg", "bits": 16}, "JPEG holds 8 bits"),
        ({"encoding": "gif"}, "encoding='gif'"),
        ({"val_fraction": 1.5}, "val_fraction=1.5"),
        ({"unit": "mm"}, "unit means nothing for kind folder"),
        ({"convention": "published"}, "convention means nothing for kind folder"),
    ],
)
def test_settings_that_cannot_be_honoured_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        PackSettings(kind="folder", **options)


def test_a_key_is_refused_where_no_id_can_be_hashed(tmp_path):
    with pytest.raises(ConfigError, match="hashed_ids means nothing for kind phantom"):
        pack("hand", tmp_path / "out", PackSettings(kind="phantom"), id_key=tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def labelled(tmp_path):
    root = tmp_path / "table"
    root.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        noise(root / f"{name}.png", seed, (30, 20))
    (root / "images.csv").write_text(
        "image_id,file,split,orig_width,orig_height\na,a.png,train,200,300\nb,b.png,test,200,300\n"
    )
    return root


def points(root, *rows):
    text = "".join(f"{image},{index},{x},{y}\n" for image, index, x, y in rows)
    (root / "landmarks.csv").write_text("image_id,landmark_index,x,y\n" + text)


def test_points_of_a_table_stay_in_original_pixels_of_files_of_the_same_shape(labelled, tmp_path):
    points(labelled, ("a", 0, 199.5, 299.5), ("b", 0, -0.5, 100))
    noise(labelled / "b.png", 1, (20, 30))
    summary = pack(labelled, tmp_path / "out", PackSettings(kind="table", size=64))
    record = Manifest.open(tmp_path / "out").read_record(0)
    assert record.native_size == (200, 300)
    np.testing.assert_allclose(record.to_stored @ [*record.points[0], 1], [63.5, 63.5])
    (line,) = summary.refused
    assert line["id"] == "b"
    assert "not the shape of the stated 200 x 300" in line["reason"]


def test_points_outside_are_counted_and_may_be_clipped(labelled, tmp_path):
    points(labelled, ("a", 0, 205, 310), ("b", 0, 10, 10))
    with pytest.raises(DataError, match=r"1 images have landmarks outside \('a'\); correct them"):
        pack(labelled, tmp_path / "out", PackSettings(kind="table"))
    pack(labelled, tmp_path / "out", PackSettings(kind="table", clip_landmarks=True))
    np.testing.assert_array_equal(Manifest.open(tmp_path / "out").read_record(0).points, [[199, 299]])


@pytest.mark.parametrize("clip", [False, True])
def test_exchanged_coordinates_are_guessed(labelled, tmp_path, clip):
    points(labelled, ("a", 0, 290, 100), ("b", 0, 250, 20))
    with pytest.raises(DataError, match=r"2 images .* x and y look exchanged"):
        pack(labelled, tmp_path / "out", PackSettings(kind="table", clip_landmarks=clip))


@pytest.mark.parametrize("aspect", ["squeeze", "pad"])
def test_a_landmark_lies_on_what_was_marked(tmp_path, aspect):
    pixels = np.random.default_rng(0).integers(0, 60, (300, 200), np.uint8)
    cv2.circle(pixels, (150, 40), 9, 255, -1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("image_id,file,split\na,a.png,train\n")
    points(tmp_path, ("a", 0, 150, 40))
    pack(tmp_path, tmp_path / "out", PackSettings(kind="table", aspect=aspect, size=128))
    manifest = Manifest.open(tmp_path / "out")
    record, stored = manifest.read_record(0), manifest.decode(0)
    spot = np.argwhere(stored > 150).mean(0)[::-1]
    np.testing.assert_allclose(record.to_stored @ [*record.points[0], 1], spot, atol=0.3)


@pytest.mark.parametrize("kind", ["chest", "skull", "hand"])
def test_phantoms_are_packed_with_their_points_inside(tmp_path, kind):
    pack(kind, tmp_path / "out", PackSettings(kind="phantom", size=64, counts={"train": 2, "test": 1}, seed=5))
    manifest = Manifest.open(tmp_path / "out")
    assert (manifest.spec.name, manifest.splits) == (f"phantom-{kind}", ("train", "test"))
    for row in range(3):
        record = manifest.read_record(row)
        assert record.points.shape == (manifest.spec.num_landmarks, 2)
        assert record.mm_per_px > 0
    assert manifest.read_record(2).split == "test"


@pytest.mark.parametrize(
    ("source", "settings", "counts"),
    [
        ("isbi2015_ceph", {"kind": "table", "spec": "cephalometric"}, {"train": 150, "test1": 150}),
        ("raw_samples/nih_chestxray14", {"kind": "folder"}, {"train": 3}),  # RGBA among grey
        ("raw_samples/chest_shenzhen", {"kind": "chest"}, {"train": 11}),
        ("raw_samples/cephalo", {"kind": "cephalometric"}, {"train": 3, "test": 2}),
    ],
)
def test_the_real_sets_are_packed_whole(real_data, tmp_path, source, settings, counts):
    summary = pack(real_data(source), tmp_path / "out", PackSettings(size=64, **settings))
    assert (summary.per_split, summary.refused) == (counts, [])
    assert verify(tmp_path / "out").is_good
    if "cephal" in str(settings):
        manifest = Manifest.open(tmp_path / "out")
        assert {manifest.read_record(row).mm_per_px for row in range(len(manifest))} == {0.1}
