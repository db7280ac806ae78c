"""A few real files of every set, packed by the command a user would give: each film is there and right, or told.

What is expected of each set is in the tables; where films belong and how they look is read here by other means.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.records import SampleRecord
from ddpm_lmk.data.shards.verify import verify

SIZE = 64
PICTURES = {".png", ".jpg", ".jpeg"}
SETS: dict[str, dict[str, Any]] = {
    # every film of the set: split by the beginning of its name, landmarks, mm per native px, patient known
    "cephalo": {"kind": "cephalometric", "splits": {"0": "train", "1": "test"}, "points": 19, "mm": 0.1, "group": True},
    "chest_shenzhen": {"kind": "chest", "splits": {"C": "train"}, "points": 6, "mm": None, "group": True},
    "hannover": {"kind": "folder", "splits": {"png/": "train"}, "points": None, "mm": None, "group": False},
    "mednist": {"kind": "folder", "splits": {"CXR/": "train", "Hand/": "train"}, "points": None, "mm": None},
    "nih_chestxray14": {"kind": "folder", "splits": {"images/": "train"}, "points": None, "mm": None},
}
SAID = {
    "cephalo": "5 of 400 cephalograms are here",
    "chest_shenzhen": "11 of 270 labelled images are here",
    "hannover": "2 files with other suffixes were not looked at",
}


def packed(source: Path, out: Path, kind: str, *words: str) -> Manifest:
    options = ["--kind", kind, "--out", str(out), "--size", str(SIZE), "--workers", "1", *words]
    assert run(["shards", "pack", str(source), *options]) == 0
    assert verify(out).is_good
    return Manifest.open(out)


def refused(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    return {line["id"]: line["code"] for line in lines}


@pytest.mark.parametrize("name", SETS)
def test_every_picture_of_a_public_set_is_packed_as_it_looks(real_data, tmp_path, capsys, name):
    source, wanted = real_data("raw_samples") / name, SETS[name]
    manifest = packed(source, tmp_path / "out", wanted["kind"])
    said = capsys.readouterr()
    assert SAID.get(name, "images") in said.out + said.err
    pictures = {path for path in source.rglob("*") if path.suffix in PICTURES}
    records = [manifest.read_record(row) for row in range(len(manifest))]
    files = {record.id: _file_of(record.id, pictures) for record in records}
    assert set(files.values()) == pictures
    assert refused(tmp_path / "out") == {}
    for row, record in enumerate(records):
        assert record.split == next(split for start, split in wanted["splits"].items() if record.id.startswith(start))
        assert (None if record.points is None else len(record.points)) == wanted["points"], record.id
        assert record.mm_per_px == wanted["mm"]
        assert (record.group is not None) == wanted.get("group", False)
        _looks_like(files[record.id], record, manifest.decode(row))


def _file_of(sample_id: str, pictures: set[Path]) -> Path:
    return next(path for path in pictures if str(path.with_suffix("")).endswith(f"/{sample_id}"))


def _looks_like(path: Path, record: SampleRecord, stored: np.ndarray) -> None:
    """Same side up, white is white, and the labels' native size; as Pillow reads the file, with its palette."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"))
        shape = image.size
    if record.points is None or record.source["format"] == "PNG":
        assert record.native_size == shape
    else:
        assert record.native_size == (1935, 2400)  # the size of the scans, which the small copies' labels refer to
    small = cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.ravel(), stored.ravel())[0, 1] > 0.995, path.name
    assert abs(small.astype(int) - stored).mean() < 3, path.name


def test_a_hand_without_a_row_is_left_out_and_said(real_data, tmp_path, capsys):
    source = real_data("raw_samples") / "hand"
    assert run(["shards", "pack", str(source), "--kind", "hand", "--out", str(tmp_path / "out")]) == 3
    assert "'3128': no row in all.csv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_dicom_file_is_packed_as_its_index_says_or_told(real_data, tmp_path, capsys):
    source = real_data("dicom")
    manifest = packed(source, tmp_path / "out", "dicom", "--bits", "16", "--id-map", str(tmp_path / "map.csv"))
    with open(tmp_path / "map.csv", newline="") as file:
        names = {row["path"]: row["id"] for row in csv.DictReader(file)}
    records = {record.id: record for record in (manifest.read_record(row) for row in range(len(manifest)))}
    told = refused(tmp_path / "out")
    assert set(names.values()) == set(records) | set(told)
    assert not set(records) & set(told)
    with open(source / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    others = set(names) - {row["file"] for row in rows}
    assert {told[names[name]] for name in others} == {"NOT_DICOM"}
    for row in rows:
        if names[row["file"]] in told:
            assert told[names[row["file"]]] in _may_be_refused(row), row["file"]
            continue
        record = records[names[row["file"]]]
        assert record.native_size == (int(row["cols"]), int(row["rows"])), row["file"]
        assert ("inverted" in record.source["applied"]) == (row["photometric"] == "MONOCHROME1"), row["file"]
        assert record.source["bits"] == int(row["bits"].split("/")[0])
        assert record.mm_per_px == (json.loads(row["pixel_spacing"] or "[0]")[0] or None), row["file"]
    assert len(records) >= 5
    capsys.readouterr()


def _may_be_refused(row: dict[str, str]) -> set[str]:
    """Only what is a copy of another file, or what no decoder that is installed reads."""
    syntax = row["transfer_syntax"]
    if syntax.startswith("JPEG Extended"):
        return {"BROKEN"}
    if syntax.startswith("JPEG Lossless"):
        return {"NO_DECODER", "DUPLICATE"}
    return {"DUPLICATE"}
