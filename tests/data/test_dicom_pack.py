"""A tree of DICOM files becomes a pack in which nothing says whose they are."""

import csv
import json

import numpy as np
import pytest

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.sources.ids import secret_key
from ddpm_lmk.errors import ConfigError, DataError
from tests.data.dicoms import FILM, dataset, malformed, to_bytes

# Long enough never to stand by chance in the names, which are hashed with a new key each time.
PRIVATE = (b"Doe_Jane", b"Doe^Jane", b"Jane_Doe", b"MRN-4711", b"study-4711", b"Elsewhere")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "Doe_Jane"
    (root / "study-4711").mkdir(parents=True)
    for number in range(6):
        pixels = np.roll(FILM, 3 * number, 1)
        made = dataset(pixels, PatientID=f"MRN-4711-{number // 2}", PixelSpacing=[0.15, 0.15])
        (root / "study-4711" / f"IM{number}").write_bytes(to_bytes(made))
    (root / "study-4711" / "Doe.txt").write_text("no film")
    return root


def test_a_tree_is_packed_with_hashed_names_and_patients(tree, tmp_path):
    summary = pack(tree, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1, id_map=tmp_path / "map.csv")
    assert (summary.packed, dict(summary.reasons)) == (6, {"NOT_DICOM": 1})
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(6)]
    assert sorted(np.unique([record.group for record in records], return_counts=True)[1]) == [2, 2, 2]
    assert {record.mm_per_px for record in records} == {0.15}
    assert all(len(record.id) == 16 and int(record.id, 16) >= 0 for record in records)
    with open(tmp_path / "map.csv", newline="") as file:
        names = {row["id"]: row["path"] for row in csv.DictReader(file)}
    assert {names[record.id] for record in records} == {f"study-4711/IM{number}" for number in range(6)}
    for path in (tmp_path / "out.key", tmp_path / "map.csv"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_words_for_a_patient_who_was_taken_out_are_nobody(tmp_path):
    root = tmp_path / "anonymous"
    root.mkdir()
    for number, patient in enumerate(
        ("ANONYMOUS", "Anonymized ", "000000", "unknown", "", "XXXX", "0042", "anonymous1")
    ):
        (root / str(number)).write_bytes(to_bytes(dataset(np.roll(FILM, 3 * number, 1), PatientID=patient)))
    pack(root, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1, id_map=tmp_path / "map.csv")
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(8)]
    with open(tmp_path / "map.csv", newline="") as file:
        names = {row["id"]: row["path"] for row in csv.DictReader(file)}
    assert {names[record.id] for record in records if record.group is not None} == {"2", "6", "7"}


def test_a_list_names_files_of_many_folders(tree, tmp_path):
    (tmp_path / "list.txt").write_text(f"# some\n{tree}/study-4711/IM0\nDoe_Jane/study-4711/IM5\n")
    assert pack(tmp_path / "list.txt", tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1).packed == 2


def test_nothing_private_is_in_the_pack(tree, tmp_path, capfd):
    (tree / "study-4711" / "Jane_Doe_broken").write_bytes(to_bytes(dataset())[:900])
    pack(tree, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    said = "".join(capfd.readouterr()).encode()
    assert [word for word in PRIVATE if word in written + said] == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["hashed_ids"] is True


def test_one_key_gives_one_name_and_others_may_not_read_it(tree, tmp_path):
    for name in ("a", "b"):
        pack(tree, tmp_path / name, PackSettings(kind="dicom", name="own", size=32), workers=1, id_key=tmp_path / "key")
    assert Manifest.open(tmp_path / "a").fingerprint == Manifest.open(tmp_path / "b").fingerprint
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        pack(tree, tmp_path / "c", PackSettings(kind="dicom", name="own", size=32), workers=1, id_key=tmp_path / "key")


def test_patients_are_not_split_between_training_and_validation(tree, tmp_path):
    pack(tree, tmp_path / "out", PackSettings(kind="dicom", size=32, val_fraction=0.5), workers=1)
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(6)]
    assert len({(record.group, record.split) for record in records}) == 3


@pytest.mark.parametrize(("share", "has_key", "is_said"), [(0.5, False, True), (0.5, True, False), (0.0, False, False)])
def test_a_folder_that_is_split_by_file_though_files_name_patients_is_told(tmp_path, share, has_key, is_said):
    """Files that are DICOM whatever their suffix says."""
    folder = tmp_path / "films"
    folder.mkdir()
    for number in range(3):
        (folder / f"film-{number}.tif").write_bytes(to_bytes(dataset(np.roll(FILM, 30 * number, 1), PatientID="one")))
    settings = PackSettings(kind="folder", size=32, val_fraction=share)
    key = tmp_path / "key" if has_key else None
    summary = pack(folder, tmp_path / "out", settings, workers=1, id_key=key)
    told = [line for line in summary.warnings if "can be in train and in val; pack again with --id-key" in line]
    assert [line.split()[0] for line in told] == (["3"] if is_said else [])


def test_a_packing_that_failed_leaves_no_key_that_it_made(tmp_path):
    root = tmp_path / "films"
    root.mkdir()
    (root / "broken").write_bytes(to_bytes(dataset())[:900])
    with pytest.raises(DataError, match="nothing to pack"):
        pack(root, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["films"]
    secret_key(tmp_path / "out.key")
    with pytest.raises(DataError, match="nothing to pack"):
        pack(root, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1)
    assert (tmp_path / "out.key").is_file()


def test_what_was_passed_over_is_counted_by_name(tree, tmp_path):
    for number, tags in enumerate(({"WindowCenter": b"1,5"}, {"WindowCenter": b"n/a", "PixelSpacing": b"x"})):
        made = malformed(dataset(np.roll(FILM, 30 + number, 1), WindowWidth=900), **tags)
        (tree / f"odd-{number}").write_bytes(to_bytes(made))
    summary = pack(tree, tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1)
    assert summary.packed == 8
    assert "passed over: PixelSpacing of 1 images, WindowCenter of 2 images" in " ".join(summary.warnings)
