"""Millimetres are those in the patient, by every tag that may say something about them, or unknown."""

import numpy as np
import pytest

pytest.importorskip("pydicom")

from ddpm_lmk.data.images.decode import decode_image
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import pack
from tests.data.dicoms import FILM, dataset, malformed, to_bytes

PATIENT, IMAGER, SCANNED = {"PixelSpacing": [0.16] * 2}, {"ImagerPixelSpacing": [0.2] * 2}, "NominalScannedPixelSpacing"
FACTOR = {"EstimatedRadiographicMagnificationFactor": 1.25}
DISTANCES = {"DistanceSourceToDetector": 1500, "DistanceSourceToPatient": 1200}


def film(**tags):
    return decode_image(to_bytes(malformed(dataset(), **tags)))


@pytest.mark.parametrize(  # one for each row of the table in `dicom_spacing`; all combinations are in `faults/kinds.py`
    ("tags", "wanted"),
    [
        # calibrated, or by definition in the patient
        (PATIENT, 0.16),
        (PATIENT | IMAGER, 0.16),
        (PATIENT | IMAGER | FACTOR, 0.16),
        ({"PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "GEOMETRY"} | IMAGER | FACTOR, 0.2),
        # at the receptor, and magnified
        (IMAGER | FACTOR, 0.16),
        (IMAGER | DISTANCES, 0.16),
        (IMAGER | DISTANCES | {"EstimatedRadiographicMagnificationFactor": 1.28}, 0.2 / 1.28),
        (IMAGER | {"EstimatedRadiographicMagnificationFactor": 1}, 0.2),
        ({SCANNED: [0.2, 0.2]} | FACTOR, 0.16),
        # PixelSpacing that only repeats the receptor's was not corrected
        ({"PixelSpacing": [0.2, 0.2]} | IMAGER | FACTOR, 0.16),
        # placeholders count as absent
        (IMAGER | {"PixelSpacing": [0, 0]}, 0.2),
        (IMAGER | {"DistanceSourceToDetector": 1800}, 0.2),
        # contradictions
        (IMAGER | {"PixelSpacing": [1, 1]}, None),
        (IMAGER | {"PixelSpacing": [0.03, 0.03]}, None),
        (IMAGER | {"EstimatedRadiographicMagnificationFactor": 125}, None),
        (IMAGER | {"DistanceSourceToDetector": 150, "DistanceSourceToPatient": 1200}, None),
        (IMAGER | DISTANCES | {"EstimatedRadiographicMagnificationFactor": 1.5}, None),
        (IMAGER | {SCANNED: [0.1, 0.1]}, None),
        # pixels that are not square
        ({"PixelSpacing": [0.2, 0.1]}, None),
        ({"ImagerPixelSpacing": [0.2, 0.1]} | FACTOR, None),
        (PATIENT | {"PixelAspectRatio": [1, 2]}, None),
        (PATIENT | {"PixelAspectRatio": [1, 1]}, 0.16),
        # another unit
        ({"PixelSpacing": [160, 160]}, None),
        ({"ImagerPixelSpacing": [200, 200]} | FACTOR, None),
        # nothing, and what is no spacing
        ({}, None),
        ({"SpatialResolution": 0.2}, None),
        ({"DetectorElementSpacing": [0.2, 0.2]}, None),
    ],
)
def test_millimetres_are_those_in_the_patient_or_unknown(tags, wanted):
    assert film(**tags).mm_per_px == (None if wanted is None else pytest.approx(wanted, abs=1e-9))


@pytest.mark.parametrize(
    "value", ["0,16\\0,16", "n/a", "-0.16\\-0.16", "0.16", "0.16\\0.16\\0.16", "nan\\nan", "0.16\\"]
)
def test_a_spacing_that_does_not_read_is_passed_over_and_named(value):
    found = film(**IMAGER | FACTOR, PixelSpacing=value.encode())
    assert found.mm_per_px == pytest.approx(0.16)
    assert found.facts["passed_over"] == ["PixelSpacing"]


@pytest.mark.parametrize("vr", ["LO", "FD", "IS", "UN"])
def test_a_spacing_of_another_representation_is_read(vr):
    value = np.array([0.16, 0.16], "<f8").tobytes() if vr == "FD" else b"0.16\\0.16 "
    found = film(PixelSpacing=(vr, value))
    assert found.mm_per_px == pytest.approx(0.16)


def test_the_record_says_where_a_spacing_is_from_and_packing_says_that_it_is_at_the_detector(tmp_path):
    (tmp_path / "films").mkdir()
    for number, tags in enumerate((IMAGER, IMAGER | FACTOR, IMAGER | {"PixelSpacing": [1, 1]})):
        made = dataset(np.roll(FILM, number, 1), **tags)
        (tmp_path / "films" / f"{number}").write_bytes(to_bytes(made))
    summary = pack(tmp_path / "films", tmp_path / "out", PackSettings(kind="dicom", size=32), workers=1)
    assert any("1 images state their spacing at the detector only" in warning for warning in summary.warnings)
    contradiction = "unknown: PixelSpacing and ImagerPixelSpacing contradict each other"
    assert f"the spacing of 1 images is {contradiction}" in summary.warnings
    manifest = Manifest.open(tmp_path / "out")
    assert sorted(manifest.read_record(row).source["spacing"] for row in range(3)) == [
        "ImagerPixelSpacing / EstimatedRadiographicMagnificationFactor",
        "ImagerPixelSpacing, at the detector",
        contradiction,
    ]
