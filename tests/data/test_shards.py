"""Shards: written whole or not at all, the same bytes every time, and every changed byte is noticed."""

import gc
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.prints import write_prints
from ddpm_lmk.data.records import member_key, record_from_json, record_to_json, to_stored_matrix
from ddpm_lmk.data.shards import CorruptSampleError, Manifest, SampleRecord, ShardWriter, verify
from ddpm_lmk.data.spec import DatasetSpec, FixedSpacing
from ddpm_lmk.data.stored import encode
from ddpm_lmk.errors import CheckpointError, DataError, ResourceError, RunConflictError

SPEC = DatasetSpec(name="t", landmark_names=("a", "b"), unit="mm", spacing=FixedSpacing(mm_per_px=0.1))
IDS = ["001", "002.x", "a b/ü\n", "b\udcff", "c" * 300]


def record(sample_id, number, split="train"):
    points = np.array([[number + 0.25, 2.0], [10.0, number / 3]])
    native = (50 + number, 80)
    return SampleRecord(sample_id, "t", split, points, native, 0.1, f"p{number}", to_stored_matrix(native, 32, "pad"))


def picture(number, bits=8):
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (32, 32), dtype, endpoint=True)


def write(out, *, encoding="raw", bits=8, shard_bytes=6000, ids=IDS):
    names = {"dataset": "t", "spec": SPEC, "splits": ("train", "test1"), "settings": {"kind": "test"}}
    shape = {"encoding": encoding, "bits": bits, "stored_size": 32, "aspect": "pad", "shard_bytes": shard_bytes}
    with ShardWriter(out, **names, **shape) as writer:
        for number, sample_id in enumerate(ids):
            split = "test1" if number == 1 else "train"
            writer.add(record(sample_id, number, split), encode(picture(number, bits), encoding, 95))
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "set")


def test_what_was_written_is_read_back(packed):
    manifest = Manifest.open(packed)
    assert len(manifest) == 5
    assert len(manifest.shards) == 3
    for row, sample_id in enumerate(IDS):
        found, wanted = manifest.read_record(row), record(sample_id, row, "test1" if row == 1 else "train")
        assert (found.id, found.split, found.group) == (wanted.id, wanted.split, wanted.group)
        np.testing.assert_array_equal(found.points, wanted.points)
        np.testing.assert_array_equal(found.to_stored, wanted.to_stored)
        np.testing.assert_array_equal(manifest.decode(row), picture(row))
        assert (manifest.index["width"][row], manifest.index["height"][row]) == wanted.native_size


@pytest.mark.parametrize(("encoding", "bits"), [("raw", 16), ("png", 8), ("png", 16)])
def test_lossless_encodings_keep_every_value(tmp_path, encoding, bits):
    manifest = Manifest.open(write(tmp_path / "set", encoding=encoding, bits=bits))
    np.testing.assert_array_equal(manifest.decode(3), picture(3, bits))
    assert verify(tmp_path / "set").is_good


def test_jpeg_keeps_the_picture_nearly(tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    with ShardWriter(
        tmp_path / "set",
        dataset="t",
        spec=SPEC,
        splits=("train",),
        settings={},
        encoding="jpeg",
        bits=8,
        stored_size=32,
        aspect="pad",
    ) as writer:
        writer.add(record("001", 0), encode(smooth, "jpeg", 95))
    assert np.abs(Manifest.open(tmp_path / "set").decode(0).astype(int) - smooth).max() <= 6


def test_rows_are_those_of_the_splits_in_order_of_id(packed):
    manifest = Manifest.open(packed)
    assert manifest.rows(["train"]).tolist() == [0, 2, 3, 4]
    assert manifest.rows(["test1", "train"]).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="no split 'val'; it has train, test1"):
        manifest.rows(["val"])


def test_the_index_is_memory_mapped(packed):
    assert isinstance(Manifest.open(packed).index, np.memmap)


def test_writing_twice_gives_the_same_bytes(packed, tmp_path):
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


def test_verify_counts_and_finds_nothing_wrong(packed):
    report = verify(packed)
    report.check()
    assert (report.samples, report.shards, report.per_split) == (5, 3, {"train": 4, "test1": 1})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(packed, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "set"
    shutil.copytree(packed, folder)
    manifest = Manifest.open(folder)
    shard = data.draw(st.integers(0, len(manifest.shards) - 1))
    path = folder / manifest.shards[shard]["name"]
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert not verify(folder).is_good
    for row, entry in enumerate(manifest.index):
        is_image = entry["shard"] == shard and 0 <= position - int(entry["offset"]) < entry["size"]
        is_json = entry["shard"] == shard and 0 <= position - int(entry["json_offset"]) < entry["json_size"]
        assert _fails(manifest.read_bytes, row) == is_image
        assert _fails(manifest.read_record, row) == is_json
    manifest.close()
    shutil.rmtree(folder)


def _fails(read, row):
    try:
        read(row)
    except CorruptSampleError:
        return True
    return False


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    """Six hundred bits over manifest, index, prints, refusals and shards, headers and padding included."""
    folder = write(tmp_path / "set")
    manifest = Manifest.open(folder)
    write_prints(manifest)
    rng = np.random.default_rng(0)
    missed = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for bit in rng.integers(0, 8 * len(content), 100 if content else 0).tolist():
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                if verify(folder).is_good:
                    missed.append((path.name, bit))
            except DataError:
                continue
        path.write_bytes(content)
    assert missed == []
    verify(folder).check()


def test_harm_to_padding_is_found_and_said_to_be_harmless(packed, tmp_path):
    path = damaged(packed, tmp_path) / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="every sample is as it was packed"):
        verify(path.parent).check()


def test_a_change_of_the_refusals_is_found(packed, tmp_path):
    path = damaged(packed, tmp_path) / "refused.jsonl"
    path.write_text('{"id": "x", "reason": "y"}\n')
    with pytest.raises(DataError, match=r"refused\.jsonl"):
        verify(path.parent).check()
    path.unlink()
    with pytest.raises(DataError, match=r"refused\.jsonl"):
        verify(path.parent).check()


def test_an_emptied_shard_is_noticed_at_the_start(packed, tmp_path):
    path = damaged(packed, tmp_path) / "shard-000001.tar"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes"):
        Manifest.open(path.parent)


def test_a_pack_that_was_tampered_with_is_refused_by_its_signature(packed, tmp_path, monkeypatch):
    """Shard, index and manifest changed together, so that every digest fits: only the signature tells (B4)."""
    folder, key = damaged(packed, tmp_path), tmp_path / "key"
    assert run(["shards", "sign", str(folder), "--key", str(key)]) == 0
    assert key.stat().st_mode & 0o077 == 0
    verify(folder).check()
    monkeypatch.setenv("LMK_SIGNING_KEY", str(key))
    Manifest.open(folder)
    with pytest.raises(CheckpointError, match="is not signed"):
        Manifest.open(packed)
    other = write(tmp_path / "other", ids=IDS[:3])  # whole in itself, by someone else
    shutil.copy(folder / "manifest.sig", other)
    with pytest.raises(CheckpointError, match="not signed with your key"):
        Manifest.open(other)
    assert run(["shards", "verify", str(other)]) == 4
    monkeypatch.setenv("LMK_SIGNING_KEY", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is no file"):
        Manifest.open(folder)


def damaged(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    return tmp_path / "set"


def test_a_missing_shard_is_noticed_at_the_start(packed, tmp_path):
    folder = damaged(packed, tmp_path)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        Manifest.open(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_noticed_at_the_start(packed, tmp_path, change):
    path = damaged(packed, tmp_path) / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change < 0 else content + b"x")
    with pytest.raises(DataError, match="cut off or changed"):
        Manifest.open(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: {}, "not a manifest of this tool"),
        (lambda header: {**header, "format_version": 2}, "format version 2"),
        (lambda header: {**header, "dataset": "other"}, "changed after packing"),
    ],
)
def test_a_foreign_newer_or_edited_manifest_is_refused(packed, tmp_path, change, message):
    path = damaged(packed, tmp_path) / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        Manifest.open(path.parent)


def test_a_changed_index_is_refused(packed, tmp_path):
    path = damaged(packed, tmp_path) / "index.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.npy was changed"):
        Manifest.open(path.parent)


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_without_shards_says_what_is_wanted(tmp_path, folder):
    with pytest.raises(DataError, match="shards pack"):
        Manifest.open(tmp_path / folder)


def test_a_file_that_does_not_belong_there_is_a_matter_of_safety(packed, tmp_path):
    folder = damaged(packed, tmp_path)
    (folder / "extra.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra\.pkl"):
        verify(folder).check()


def test_a_name_given_twice_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(DataError, match="comes twice"):
        write(tmp_path / "set", ids=["001", "001"])
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_packing_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no image"):
        write(tmp_path / "set", ids=[])
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


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    assert verify(write(tmp_path / "set")).is_good


@given(st.text(st.characters(exclude_categories=()), min_size=1))
def test_member_keys_are_plain_and_differ(sample_id):
    key = member_key(sample_id) if _encodable(sample_id) else "x"
    assert key.isascii()
    assert not set(key) & set("./\n ")
    assert 1 <= len(key) <= 88


def _encodable(text):
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


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
