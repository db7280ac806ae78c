"""Damaged packs: every changed byte is found, by a check of everything or when the pack is opened."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.shards.verify import CorruptSampleError, Manifest, verify
from ddpm_lmk.errors import CheckpointError, DataError
from tests.data.sets import IDS, write


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "set")


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
    write_fingerprints(manifest)
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
