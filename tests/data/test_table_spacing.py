"""A table of DICOM files is in the millimetres that its files state."""

import json

import numpy as np
import pytest

pytest.importorskip("pydicom")

from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from ddpm_lmk.errors import DataError
from tests.data.dicoms import FILM, dataset, to_bytes

PATIENT = {"PixelSpacing": [0.16, 0.16]}
MAGNIFIED = {"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": 1.25}


def table(root, spacings, *, columns="", cells=None, shape=(60, 40)):
    """A labelled table of DICOM films, each with the tags of its entry."""
    root.mkdir()
    cells = cells or [""] * len(spacings)
    rows, labels = [f"image_id,file,split{columns}"], ["image_id,landmark_index,x,y"]
    for number, tags in enumerate(spacings):
        (root / f"{number}.dcm").write_bytes(to_bytes(dataset(np.roll(FILM, number, 1), **tags)))
        rows.append(f"{number},{number}.dcm,train{cells[number]}")
        labels += [f"{number},0,10,20", f"{number},1,13,24"]
    (root / "images.csv").write_text("\n".join(rows) + "\n")
    (root / "landmarks.csv").write_text("\n".join(labels) + "\n")
    return root


def packed(root, **settings):
    pack(root, root.parent / "out", PackSettings(kind="table", size=32, **settings), workers=1)
    manifest = Manifest.open(root.parent / "out")
    spacings = [manifest.read_record(row).mm_per_px for row in range(len(manifest))]
    return json.loads((root.parent / "out" / "manifest.json").read_text())["spec"], spacings


@pytest.mark.parametrize("unit", [None, "mm"])
def test_a_table_is_in_the_millimetres_that_its_dicom_files_state(tmp_path, unit):
    spec, spacings = packed(table(tmp_path / "t", [PATIENT, MAGNIFIED, {"PixelSpacing": [0.3, 0.3]}]), unit=unit)
    assert (spec["unit"], spec["spacing"]) == ("mm", {"kind": "file"})
    assert spacings == pytest.approx([0.16, 0.16, 0.3])


def test_what_a_table_states_goes_before_what_its_files_state(tmp_path):
    root = table(tmp_path / "t", [PATIENT, PATIENT], columns=",mm_per_pixel", cells=[",0.5", ","])
    assert packed(root)[1] == pytest.approx([0.5, 0.16])


def test_a_table_whose_files_leave_one_spacing_open_is_in_pixels_or_refused(tmp_path):
    root = table(tmp_path / "t", [PATIENT, {}])
    with pytest.raises(DataError, match="1 of 2 labelled images have no mm_per_pixel, nor are they DICOM files that"):
        pack(root, tmp_path / "mm", PackSettings(kind="table", unit="mm"), workers=1)
    assert packed(root)[0]["unit"] == "px"


def test_a_file_that_is_refused_anyway_does_not_take_the_millimetres_of_the_others(tmp_path):
    root = table(tmp_path / "t", [PATIENT, PATIENT])
    (root / "1.dcm").write_bytes((root / "1.dcm").read_bytes()[:500])
    spec, spacings = packed(root)
    assert (spec["unit"], spacings) == ("mm", pytest.approx([0.16]))


def test_a_file_stored_smaller_than_it_was_annotated_states_the_spacing_of_its_own_pixels(tmp_path):
    root = table(tmp_path / "t", [PATIENT], columns=",orig_width,orig_height", cells=[",160,240"])
    spec, spacings = packed(root)
    assert (spec["unit"], spacings) == ("mm", pytest.approx([0.04]))
