"""Shards: written whole or not at all, the same bytes every time, and every changed byte is noticed."""

import gc
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import (
    CorruptSampleError,
    member_key,
    record_from_json,
    record_to_json,
    to_stored_matrix,
)
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import DataError, ResourceError, RunConflictError
from tests.data.sets import IDS, picture, record, write


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "set")


def test_what_was_written_is_read_back(packed):
    manifest = Manifest.open(packed)
    assert len(manifest) == 5
    assert len(manifest.shards) == 3
    assert isinstance(manifest.index, np.memmap)
    for row, sample_id in enumerate(IDS):
        found, wanted = manifest.read_record(row), record(sample_id, row, "test1" if row == 1 else "train")
        assert (found.id, found.split, found.group) == (wanted.id, wanted.split, wanted.group)
        np.testing.assert_array_equal(found.points, wanted.points)
        np.testing.assert_array_equal(found.to_stored, wanted.to_stored)
        np.testing.assert_array_equal(manifest.decode(row), picture(row))
        assert (manifest.index["width"][row], manifest.index["height"][row]) == wanted.native_size
    assert manifest.rows(["train"]).tolist() == [0, 2, 3, 4]
    assert manifest.rows(["test1", "train"]).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="no split 'val'; it has train, test1"):
        manifest.rows(["val"])


@pytest.mark.parametrize(("encoding", "bits"), [("raw", 16), ("png", 8), ("png", 16), ("jpeg", 8)])
def test_lossless_encodings_keep_every_value_and_jpeg_the_picture(tmp_path, encoding, bits):
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    drawn = (lambda number, bits: smooth + number) if encoding == "jpeg" else picture
    manifest = Manifest.open(write(tmp_path / "set", encoding=encoding, bits=bits, drawn=drawn))
    difference = np.abs(manifest.decode(3).astype(int) - drawn(3, bits)).max()
    assert difference <= 6 if encoding == "jpeg" else difference == 0
    assert verify(tmp_path / "set").is_good


def test_writing_twice_gives_the_same_bytes(packed, tmp_path):
    (tmp_path / "set").mkdir()  # an empty folder is filled
    again = write(tmp_path / "set")
    for path in packed.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_fingerprint_tells_data_apart(packed, tmp_path):
    other = Manifest.open(write(tmp_path / "set", ids=IDS[:4]))
    assert other.fingerprint != Manifest.open(packed).fingerprint


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its last file open
def test_webdataset_reads_the_shards(packed):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == IDS
    assert samples[0]["npy"] == Manifest.open(packed).read_bytes(0)
    gc.collect()


@pytest.mark.parametrize(("ids", "message"), [(["001", "001"], "comes twice"), ([], "no image")])
def test_a_name_given_twice_is_refused_and_nothing_is_left(tmp_path, ids, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "set", ids=ids)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_touched(packed, tmp_path):
    before = sorted(packed.iterdir())
    with pytest.raises(RunConflictError, match="already holds packed shards"):
        write(packed)
    assert sorted(packed.iterdir()) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(RunConflictError, match="other files"):
        write(tmp_path / "mine")
    with pytest.raises(ResourceError, match="is a file"):
        write(tmp_path / "mine" / "note.txt")


@given(st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("\udc80\udcff"), min_size=1))
def test_member_keys_are_plain(sample_id):
    key = member_key(sample_id)
    assert key.isascii()
    assert not set(key) & set("./\n ")
    assert 1 <= len(key) <= 88


def test_a_changed_coordinate_in_the_json_is_noticed():
    text = record_to_json(record("001", 0))
    with pytest.raises(CorruptSampleError):
        record_from_json(text.replace(b"0.25", b"0.26"), size=32, aspect="pad")


@pytest.mark.parametrize("aspect", ["squeeze", "pad"])
@pytest.mark.parametrize("native", [(1935, 2400), (2400, 1935), (100, 100), (64, 640)])
def test_stored_coordinates_keep_the_corners_of_the_image(native, aspect):
    matrix = to_stored_matrix(native, 256, aspect)
    corners = np.array([[-0.5, -0.5], [native[0] - 0.5, native[1] - 0.5]]) @ matrix[:, :2].T + matrix[:, 2]
    sides = corners[1] - corners[0]
    assert (sides == 256).all() if aspect == "squeeze" else max(sides) == 256
    if aspect == "pad":
        np.testing.assert_allclose(sides / max(sides), np.array(native) / max(native), atol=0.5 / 256)
        np.testing.assert_allclose(corners.mean(0), 127.5, atol=0.51)
