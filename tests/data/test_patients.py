"""Patients of protected images are found in a pool whichever kind either pack is, or it is said that they are not."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom")

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.duplicates import report
from ddpm_lmk.data.duplicates.fingerprints import FILE_NAME, keep_prints, prints_of
from ddpm_lmk.data.duplicates.leakage import Source, compare, exclusion, uncompared_patients
from ddpm_lmk.data.images.decode import film_from_bytes
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.phantom import render
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.data.sources.ids import same_patient
from tests.data.dicoms import dataset, to_bytes
from tests.data.dot_packs import run_config

LONG = [f"1000003{number}" for number in range(4)]  # as in MIMIC-CXR
SHORT = ["1", "2", "3", "12"]
OURS = {"table": None, "keyed table": "ours", "dicom": "ours", "table of dicom": "ours", "other key": "theirs"}
PLAIN = ("table", "short table")


def pixels(seed: int) -> np.ndarray:
    film = render("chest", 7, seed, 64).image
    return np.interp(film, (film.min(), film.max()), (0, 4095)).astype(np.uint16)


def make(root: Path, what: str, which: str) -> Manifest:
    """A pack of four films of four patients: `train` in the pool, `test` in the protected one; no film comes twice."""
    split, first = ("train", 0) if which == "pool" else ("test", 100)
    source = root / which / what
    source.mkdir(parents=True)
    patients = SHORT if what.startswith("short") else LONG
    rows = ["image_id,file,split,patient_id"]
    for number, patient in enumerate(patients):
        film = dataset(pixels(first + number), PatientID=f"00{patient} ", IssuerOfPatientID=f"{which} PACS")
        if what == "other key":
            film.PatientID = patient
        (source / f"{number}.dcm").write_bytes(to_bytes(film))
        cell = "" if what == "table of dicom" else f"{patient}.0" if which == "pool" else f"0{patient}"
        rows.append(f"{which}{number},{number}.dcm,{split},{cell}")
    if "table" in what:
        (source / "images.csv").write_text("\n".join(rows) + "\n")
    kind = "table" if "table" in what else "folder" if what == "folder" else "dicom"
    key = OURS.get(what)
    if kind == "folder":
        (source / "list.txt").write_text("".join(f"{number}.dcm\n" for number in range(4)))
    pack(
        source / "list.txt" if kind == "folder" else source,
        root / "packs" / which / what.replace(" ", "-"),
        PackSettings(kind=kind, name=which, size=32, split=split if kind != "table" else None),
        workers=1,
        id_key=root / key if key else None,
    )
    return Manifest.open(root / "packs" / which / what.replace(" ", "-"))


KINDS = ("table", "keyed table", "dicom", "table of dicom", "other key", "short table", "folder")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Manifest]:
    root = tmp_path_factory.mktemp("patients")
    return {(which, what): make(root, what, which) for which in ("pool", "test") for what in KINDS}


def reason_for(one: str, other: str) -> str | None:
    """None where patients are compared, else a part of what is said; nothing is where neither names any."""
    if "folder" in (one, other):
        return "" if one == other else "names no patients"
    plain = [kind in PLAIN for kind in (one, other)]
    if all(plain):
        return None if one == other == "table" else "short ids mean somebody inside one set only"
    if any(plain):
        return "ids are hashed in one of them only"
    return None if OURS[one] == OURS[other] else "hashed with different keys"


@pytest.mark.parametrize(("one", "other"), list(product(KINDS, KINDS)))
def test_every_pair_of_kinds_compares_patients_or_says_why_not(packs, one: str, other: str) -> None:
    found = compare([Source(packs["pool", one], ("train",))], [Source(packs["test", other], ("test",))])
    reason = reason_for(one, other)
    assert [each.kind for each in found.leaks] == ["same patient"] * (4 if reason is None else 0)
    assert len(found.uncompared) == bool(reason)
    assert all(str(reason) in str(pair) for pair in found.uncompared)


def test_the_spellings_of_an_id_are_one_patient() -> None:
    spellings = ["0012", "12", "12.0", " 12 "]
    assert {same_patient(text) for text in spellings} == {"12"}
    assert same_patient("PAT-7") == same_patient("pat-7 ") == "pat-7"
    assert len({same_patient(text) for text in ["1", "10", "1.5", "p1", "0", ""]}) == 6


def test_films_without_a_patient_are_not_one_patient_because_they_have_one_issuer() -> None:
    film = dataset(pixels(0), PatientID="", IssuerOfPatientID="PACS")
    assert film_from_bytes(to_bytes(film)).patient is None
    film.PatientID = " 7"
    assert film_from_bytes(to_bytes(film)).patient == "7"


def test_a_set_that_names_its_patients_by_short_ids_compares_them_within_itself_and_under_its_name(packs) -> None:
    manifest = packs["pool", "short table"]
    patients = prints_of(manifest)["patient"]
    assert (patients & np.uint64(1)).all()
    assert not (prints_of(packs["pool", "table"])["patient"] & np.uint64(1)).any()
    assert compare([Source(manifest, ("train",))], [Source(manifest, ("train",))]).uncompared == []


def test_what_is_not_compared_is_said_by_the_commands_and_by_the_record_of_a_run(packs, tmp_path, capsys) -> None:
    pool, test = packs["pool", "short table"].root, packs["test", "dicom"].root
    said = "the patients of pool and test were not compared: ids are hashed in one of them only"
    assert run(["shards", "compare", str(pool), "--protect", str(test)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert run(["shards", "show", str(pool), str(test), "--out", str(tmp_path / "show")]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "show" / "index.html").read_text()
    data = run_config(pool, task="denoise", data={"protect": [str(test)]}).data
    (pair,) = exclusion([Manifest.open(pool)], data).record["patients_not_compared"]
    assert (pair["trained_on"], pair["protected"]) == ("pool", "test")


def test_a_score_says_that_patients_were_not_compared(packs) -> None:
    tested = Source(packs["test", "table"], ("test",))
    trained = Source(packs["pool", "dicom"], ("train",))
    verdict = report._verdict(tested, [trained])
    assert verdict["status"] == "clean"
    lines = report.refuse_seen([{"num_images": 4, "leakage": {"pretraining": verdict}}], acknowledged=False)
    assert lines[0].startswith("The patients of pool and test were not compared: ids are hashed in one of them only")


def test_prints_of_an_older_version_are_made_anew(packs, tmp_path: Path) -> None:
    made = packs["pool", "table"]
    for path in made.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (made.root / FILE_NAME).read_bytes()
    old = content.replace(b"ddpm-lmk-prints 2", b"ddpm-lmk-prints 1", 1)
    (tmp_path / FILE_NAME).write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    assert np.array_equal(prints_of(Manifest.open(tmp_path)), prints_of(made))
    keep_prints(Manifest.open(tmp_path))
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_which_key_hashed_the_ids_is_in_the_manifest_and_the_key_is_not(packs) -> None:
    ids = {what: packs["pool", what].settings["key_id"] for what in KINDS}
    assert ids["dicom"] == ids["keyed table"] == ids["table of dicom"] != ids["other key"]
    assert (ids["table"], ids["folder"]) == (None, None)
    manifest = json.loads((packs["pool", "dicom"].root / "manifest.json").read_text())
    key = next(packs["pool", "dicom"].root.parents[2].glob("ours")).read_text().strip()
    assert key not in json.dumps(manifest)


def test_of_hashed_packs_of_an_older_version_nobody_knows_the_key(packs, monkeypatch) -> None:
    old, new = packs["pool", "dicom"], packs["test", "dicom"]
    monkeypatch.setattr(old, "settings", {**old.settings, "key_id": None})
    for one, other in ((old, new), (new, old)):
        (pair,) = uncompared_patients([Source(one, ("train",))], [Source(other, ("test",))])
        assert "an older version did not note with which key" in str(pair)
