"""Damaged shards: every changed byte is found, by a check of everything or when the folder is opened."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.duplicates.fingerprints import write_fingerprints
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import CorruptSampleError
from ddpm_lmk.data.shards.verify import verify
from ddpm_lmk.errors import CheckpointError, DataError
from tests.data.sets import IDS, write


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    return tmp_path / "set"


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


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
    path.write_bytes(flip(path.read_bytes(), 8 * position + data.draw(st.integers(0, 7))))
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


def test_a_flipped_bit_in_any_file_is_found(copy):
    """Six hundred bits over manifest, index, prints, refusals and shards, headers and padding included."""
    write_fingerprints(Manifest.open(copy))
    rng = np.random.default_rng(0)
    missed = []
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        for bit in rng.integers(0, 8 * len(content), 100 if content else 0).tolist():
            path.write_bytes(flip(content, bit))
            try:
                if verify(copy).is_good:
                    missed.append((path.name, bit))
            except DataError:
                continue
        path.write_bytes(content)
    assert missed == []
    verify(copy).check()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("shard-000000.tar", lambda old: flip(old, 8 * len(old) - 1), DataError, "every sample is as it was packed"),
        ("refused.jsonl", lambda old: b'{"id": "x", "reason": "y"}\n', DataError, r"refused\.jsonl"),
        ("refused.jsonl", None, DataError, r"refused\.jsonl"),
        ("extra.pkl", lambda old: b"x", CheckpointError, r"extra\.pkl"),
    ],
)
def test_what_harms_no_sample_or_does_not_belong_there_is_found(copy, name, change, error, message):
    path = copy / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(error, match=message):
        verify(copy).check()


def edited(**fields):
    return lambda old: json.dumps({**json.loads(old), **fields}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-000001.tar", None, r"shard-000001\.tar is missing"),
        ("shard-000001.tar", lambda old: b"", "has 0 bytes"),
        ("shard-000000.tar", lambda old: old[:-1], "cut off or changed"),
        ("shard-000000.tar", lambda old: old + b"x", "cut off or changed"),
        ("index.npy", lambda old: flip(old, 8 * len(old) - 1), r"index\.npy was changed"),
        ("manifest.json", lambda old: b"{}", "not a manifest of this tool"),
        ("manifest.json", edited(format_version=3), "format version 3"),
        ("manifest.json", edited(dataset="other"), "changed after packing"),
        ("manifest.json", None, "shards pack"),
    ],
)
def test_damage_is_noticed_when_the_folder_is_opened(copy, name, change, message):
    if change is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(DataError, match=message):
        Manifest.open(copy)


def test_shards_that_were_tampered_with_are_refused_by_their_signature(packed, copy, tmp_path, monkeypatch):
    """Shard, index and manifest changed together, so that every digest fits: only the signature tells (B4)."""
    key = tmp_path / "key"
    assert run(["shards", "sign", str(copy), "--key", str(key)]) == 0
    assert key.stat().st_mode & 0o077 == 0
    verify(copy).check()
    monkeypatch.setenv("LMK_SIGNING_KEY", str(key))
    Manifest.open(copy)
    with pytest.raises(CheckpointError, match="is not signed"):
        Manifest.open(packed)
    other = write(tmp_path / "other", ids=IDS[:3])  # whole in itself, by someone else
    shutil.copy(copy / "manifest.sig", other)
    with pytest.raises(CheckpointError, match="not signed with your key"):
        Manifest.open(other)
    assert run(["shards", "verify", str(other)]) == 4
    monkeypatch.setenv("LMK_SIGNING_KEY", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is no file"):
        Manifest.open(copy)
