"""DICOM documents: points and units by value, the patient and study of their image, and nothing else of its file."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian

from ddpm_lmk.data.images.decode import decode_image, read_content
from ddpm_lmk.data.images.image import ReadOptions, RefusedImageError
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.annotated import read_annotated
from ddpm_lmk.errors import DataError, LaunchError
from ddpm_lmk.inference.dicom_documents import PATIENT, STUDY
from ddpm_lmk.inference.formats import open_writers
from ddpm_lmk.inference.predictions import ImagePrediction, PredictedFile
from tests.data.dicoms import FILM, dataset, malformed, table, to_bytes

NAMES = ("sella", "Punkt Ä\\1", "x" * 80, "outside", "lost")
POINTS = np.array([[0.0, 0.0], [12.345, 30.25], [39.0, 59.0], [39.6, 3.0], [5.0, 5.0]])  # of 40 x 60 pixels
THERE = (0, 1, 2)
UIDS = {"StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": "1.2.3.2", "SOPInstanceUID": "1.2.3.3"}
WEIGHTS = "0123456789abcdef" * 4


def film(**tags: Any) -> Dataset:
    """A radiograph that says whose it is."""
    return dataset(**(UIDS | {"PatientBirthDate": "19700101", "PatientSex": "F", "StudyDate": "20260102"} | tags))


def write(kind: str, tmp_path: Path, content: Dataset | bytes, **facts: Any) -> Any:
    """The document of a film with POINTS, as pydicom reads it."""
    path = tmp_path / "film.dcm"
    path.write_bytes(to_bytes(content) if isinstance(content, Dataset) else content)
    values: dict[str, Any] = {
        "path": path,
        "id": "a/film",
        "grey": np.zeros((60, 40), np.uint8),
        "landmark_names": NAMES,
        "prediction": ImagePrediction(POINTS, np.array([1.5, 2, 0, 1, 1]), np.arange(5) == 4),
        "radius_px": np.array([4.0, 6.5, np.nan, 2, np.nan]),
        "coverage": 0.9,
        "mm_per_px": 0.25,
        "spacing": "PixelSpacing",
        "frame": None,
        "weights": WEIGHTS,
    }
    out = tmp_path / "out" / str(len(list(tmp_path.glob("out/*"))))
    (writer,) = open_writers([kind], out)
    writer.add(PredictedFile(**(values | facts)))
    writer.finish()
    return dcmread(out / kind / "a" / "film.dcm")


def groups(report: Dataset) -> list[Any]:
    return highdicom.sr.ComprehensiveSR.from_dataset(report).content.get_planar_roi_measurement_groups()


def numbers(group: Any) -> list[tuple[str, float, str]]:
    found = group.get_measurements()
    return [(each.name.value, float(each.value), f"{each.unit.value} {each.unit.scheme_designator}") for each in found]


# --- structured report


def test_points_of_a_report_count_from_the_corner_of_the_first_pixel(tmp_path: Path) -> None:
    report = write("dicom-sr", tmp_path, film())
    for group, index in zip(groups(report), THERE, strict=True):
        region = group.roi
        assert region.graphic_type.value == "POINT"
        np.testing.assert_allclose(region.value, POINTS[index : index + 1] + 0.5, atol=1e-5)
        [source] = region.ContentSequence[0].ReferencedSOPSequence
        assert (source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID) == (film().SOPClassUID, "1.2.3.3")
        assert "ReferencedFrameNumber" not in source
        assert group.tracking_identifier == NAMES[index]


def test_uncertainty_has_units_of_ucum_and_stands_only_where_it_is_known(tmp_path: Path) -> None:
    first, second, third = (numbers(group) for group in groups(write("dicom-sr", tmp_path, film())))
    px, mm = "{pixels} UCUM", "mm UCUM"
    wanted = [("SPREAD", 1.5, px), ("RADIUS", 4.0, px), ("SPREAD", 0.375, mm), ("RADIUS", 1.0, mm)]
    assert first == [*wanted, ("COVERAGE", 90.0, "% UCUM")]
    assert second[1] == ("RADIUS", 6.5, px)
    assert third == []
    [only, *_] = groups(write("dicom-sr", tmp_path, film(), radius_px=None, coverage=None, mm_per_px=None))
    assert numbers(only) == [("SPREAD", 1.5, px)]


def test_a_landmark_without_a_point_in_the_picture_is_said_to_have_none(tmp_path: Path) -> None:
    report = write("dicom-sr", tmp_path, film())
    content = highdicom.sr.ComprehensiveSR.from_dataset(report).content
    lost = [group for group in content.get_image_measurement_groups() if group.get_qualitative_evaluations()]
    assert [group.tracking_identifier for group in lost] == ["outside", "lost"]
    [evaluation] = lost[0].get_qualitative_evaluations()
    assert (evaluation.name.value, evaluation.value.value) == ("POSITION", "NOT_FOUND")
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "PARTIAL",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    whole = write(
        "dicom-sr", tmp_path, film(), prediction=ImagePrediction(POINTS[[0] * 5], *np.ones((1, 5)), np.zeros(5))
    )
    assert whole.CompletionFlag == "COMPLETE"


def test_names_of_landmarks_become_legal_codes(tmp_path: Path) -> None:
    report = write("dicom-sr", tmp_path, film())
    codes = [group.finding_type for group in groups(report)]
    assert [code.meaning for code in codes] == ["sella", "Punkt Ä/1", "x" * 64]
    assert len({code.value for code in codes}) == 3
    assert all(
        code.scheme_designator == "99DDPMLMK" and code.value.isalnum() and len(code.value) == 16 for code in codes
    )
    [scheme] = report.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == "99DDPMLMK"


def test_a_report_says_what_made_it_and_that_it_is_no_diagnosis(tmp_path: Path) -> None:
    report = write("dicom-sr", tmp_path, film())
    assert "not for diagnosis" in report.SeriesDescription
    [*_, comment] = report.ContentSequence
    assert comment.ConceptNameCodeSequence[0].CodeValue == "121106"
    assert "Not a medical device" in comment.TextValue
    assert "Millimetres: PixelSpacing." in comment.TextValue
    observer = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in report.ContentSequence}
    assert observer["Device Observer Serial Number"].TextValue == WEIGHTS
    assert observer["Device Observer Name"].TextValue == report.ManufacturerModelName == "ddpm-lmk"
    [library] = [item for item in report.ContentSequence if item.get("ContentSequence") and "Library" in str(item)][:1]
    [image] = library.ContentSequence[0].ContentSequence
    assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.3"


# --- presentation state


def test_graphics_lie_where_the_points_are_and_circles_are_as_large_as_radii(tmp_path: Path) -> None:
    state = write("dicom-gsps", tmp_path, film())
    points, radii = state.GraphicAnnotationSequence
    for item, text, index in zip(points.GraphicObjectSequence, points.TextObjectSequence, THERE, strict=True):
        assert (item.GraphicType, item.GraphicAnnotationUnits) == ("POINT", "PIXEL")
        np.testing.assert_allclose(item.GraphicData, POINTS[index] + 0.5, atol=1e-5)
        np.testing.assert_allclose(text.AnchorPoint, POINTS[index] + 0.5, atol=1e-5)
        assert item.TrackingID == NAMES[index]
    assert [text.UnformattedTextValue for text in points.TextObjectSequence] == ["sella", "Punkt Ä/1", "x" * 64]
    for item, index, radius in zip(radii.GraphicObjectSequence, (0, 1), (4.0, 6.5), strict=True):
        centre, rim = np.reshape(item.GraphicData, (2, 2))
        np.testing.assert_allclose(centre, POINTS[index] + 0.5, atol=1e-5)
        assert np.linalg.norm(rim - centre) == pytest.approx(radius, abs=1e-5)
    assert "90 %" in state.GraphicLayerSequence[1].GraphicLayerDescription


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ({}, "IDENTITY"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "INVERSE"),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, "INVERSE"),
        ({"PresentationLUTShape": "INVERSE"}, "INVERSE"),
    ],
)
def test_a_presentation_state_has_the_polarity_of_the_picture(tmp_path: Path, tags: Any, shape: str) -> None:
    assert write("dicom-gsps", tmp_path, film(**tags)).PresentationLUTShape == shape


def test_a_presentation_state_has_the_tables_of_the_picture_whatever_its_byte_order(tmp_path: Path) -> None:
    squares, roots = np.linspace(0, 60, 4096) ** 2, np.sqrt(np.arange(3601)) * 1000
    tables = {"ModalityLUTSequence": [table(squares)], "VOILUTSequence": [table(roots)]}
    tables["ModalityLUTSequence"][0].LUTExplanation = "Doe^Jane"
    big = dataset(syntax=ExplicitVRBigEndian, **UIDS, PixelData=FILM.astype(">u2").tobytes(), **tables)
    for source in (film(**tables), big):
        state = write("dicom-gsps", tmp_path, source)
        modality = apply_modality_lut(FILM, state)
        np.testing.assert_array_equal(modality, apply_modality_lut(FILM, film(**tables)))
        [shown] = state.SoftcopyVOILUTSequence
        np.testing.assert_array_equal(apply_voi_lut(modality, shown), apply_voi_lut(modality, film(**tables)))
        assert "Doe" not in str(state.ModalityLUTSequence)


def test_a_presentation_state_has_the_first_window_that_reads(tmp_path: Path) -> None:
    made = malformed(film(RescaleSlope="0.5", RescaleIntercept="-7"), WindowCenter=b"x\\900", WindowWidth=b"5\\333.25")
    state = write("dicom-gsps", tmp_path, made)
    np.testing.assert_array_equal(apply_modality_lut(FILM, state), FILM * 0.5 - 7)
    [shown] = state.SoftcopyVOILUTSequence
    assert (shown.WindowCenter, shown.WindowWidth, shown.VOILUTFunction) == (900, 333.25, "LINEAR")
    broken = write("dicom-gsps", tmp_path, malformed(film(), WindowCenter=b"n/a ", WindowWidth=b"4"))
    assert "SoftcopyVOILUTSequence" not in broken


def test_pixels_that_are_not_square_are_shown_as_they_are(tmp_path: Path) -> None:
    for tags, name, value in (
        ({"PixelSpacing": [0.2, 0.1]}, "PresentationPixelSpacing", [0.2, 0.1]),
        ({"PixelAspectRatio": [2, 1]}, "PresentationPixelAspectRatio", [2, 1]),
        ({"PixelSpacing": [0, 0]}, "PresentationPixelAspectRatio", [1, 1]),
    ):
        [area] = write("dicom-gsps", tmp_path, film(**tags)).DisplayedAreaSelectionSequence
        assert list(area[name].value) == value


def test_colours_have_no_grey_scale_presentation_state(tmp_path: Path) -> None:
    rgb = {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "Columns": 40,
        "Rows": 60,
    }
    colours = film(pixels=np.stack([(FILM >> 4).astype(np.uint8)] * 3, 2), bits=8, **rgb)
    with pytest.raises(RefusedImageError, match="colours or a palette"):
        write("dicom-gsps", tmp_path, colours)
    assert len(groups(write("dicom-sr", tmp_path, colours))) == 3


# --- both


BOTH = pytest.mark.parametrize("kind", ["dicom-sr", "dicom-gsps"])


@BOTH
def test_patient_and_study_are_those_of_the_picture_and_nothing_else_of_its_file_is_there(
    kind: str, tmp_path: Path
) -> None:
    kept = {
        "PatientName": "Doe^Jane",
        "PatientID": "MRN-4711",
        "IssuerOfPatientID": "St. Elsewhere",
        "StudyTime": "101112",
        "StudyID": "S1",
        "AccessionNumber": "A1",
        "ReferringPhysicianName": "Roe^Richard",
    }
    planted = {
        "PatientComments": "PLANTED",
        "PatientAddress": "PLANTED",
        "OtherPatientNames": "PLANTED^A",
        "StudyDescription": "PLANTED",
        "SeriesDescription": "PLANTED",
        "ProtocolName": "PLANTED",
        "InstitutionName": "PLANTED",
        "StationName": "PLANTED",
        "OperatorsName": "PLANTED^B",
        "ImageComments": "PLANTED",
        "Manufacturer": "PLANTED",
        "DeviceSerialNumber": "PLANTED",
        "PerformingPhysicianName": "PLANTED^C",
        "AdditionalPatientHistory": "PLANTED",
        "Occupation": "PLANTED",
        "RescaleType": "PLANTED",
        "WindowCenterWidthExplanation": "PLANTED",
        "WindowCenter": 9,
        "WindowWidth": 9,
    }
    source = film(**kept, **planted)
    source.private_block(0x11, "PLANTED", create=True).add_new(1, "LO", "PLANTED")
    source.add_new(0x60003000, "OW", b"PLANTED ")
    document = write(kind, tmp_path, source)
    buffer = io.BytesIO()
    document.save_as(buffer)
    assert b"PLANTED" not in buffer.getvalue()
    for name in (*PATIENT, *STUDY):
        assert document[name].value == source[name].value, name
    assert [element.keyword for element in document.group_dataset(0x10)] == [
        *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
    ]


@BOTH
def test_the_same_predictions_of_the_same_weights_are_the_same_document(kind: str, tmp_path: Path) -> None:
    first, again = write(kind, tmp_path, film()), write(kind, tmp_path, film())
    times = ("InstanceCreation", "Content", "PresentationCreation")
    for document in (first, again):
        for name in (f"{time}{part}" for time in times for part in ("Date", "Time")):
            if name in document:
                del document[name]
        del document.ContributingEquipmentSequence[0].ContributionDateTime
    assert first == again
    moved = write(kind, tmp_path, film(), prediction=ImagePrediction(POINTS + 1e-6, np.ones(5), np.zeros(5, bool)))
    assert moved.SOPInstanceUID != first.SOPInstanceUID
    assert moved.SeriesInstanceUID == first.SeriesInstanceUID
    other = write(kind, tmp_path, film(), weights="f" * 64)
    assert len({other.SeriesInstanceUID, first.SeriesInstanceUID, other.SOPInstanceUID, first.SOPInstanceUID}) == 4
    assert first.SOPInstanceUID.is_valid
    assert int(first.SOPInstanceUID.removeprefix("2.25.")) < 2**128


@BOTH
def test_the_frame_of_a_file_with_several_is_named(kind: str, tmp_path: Path) -> None:
    frames = film(pixels=np.stack([FILM, FILM]), Rows=60, Columns=40, NumberOfFrames=2)
    document = write(kind, tmp_path, frames, frame=1)
    if kind == "dicom-sr":
        assert {
            int(group.roi.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber)
            for group in groups(document)
        } == {2}
    else:
        places = [document.ReferencedSeriesSequence[0], *document.GraphicAnnotationSequence]
        assert [int(place.ReferencedImageSequence[0].ReferencedFrameNumber) for place in places] == [2, 2, 2]


@BOTH
def test_a_class_of_a_maker_is_referred_to_as_it_is(kind: str, tmp_path: Path) -> None:
    document = write(kind, tmp_path, film(SOPClassUID="1.2.392.200036.9125.1.1.2"))
    found = {str(element.value) for element in document.iterall() if element.keyword == "ReferencedSOPClassUID"}
    assert found == {"1.2.392.200036.9125.1.1.2"}


@BOTH
@pytest.mark.parametrize(("charset", "name"), [("ISO_IR 100", "Müller^Jürg"), ("ISO_IR 192", "山田^太郎")])
def test_names_of_patients_survive_the_change_of_character_set(
    kind: str, tmp_path: Path, charset: str, name: str
) -> None:
    document = write(kind, tmp_path, film(SpecificCharacterSet=charset, PatientName=name))
    assert (document.SpecificCharacterSet, str(document.PatientName)) == ("ISO_IR 192", name)


@BOTH
def test_what_is_malformed_and_may_be_empty_is_empty(kind: str, tmp_path: Path) -> None:
    source = malformed(
        film(), PatientBirthDate=b"1.1.70", StudyDate=b"yesterday", PatientSex=b"female", StudyTime=b"12:3"
    )
    document = write(kind, tmp_path, source)
    for name in ("PatientBirthDate", "StudyDate", "PatientSex", "StudyTime", "AccessionNumber"):
        assert not document[name].value, name


@BOTH
@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"StudyInstanceUID": None}, "no valid StudyInstanceUID"),
        ({"SeriesInstanceUID": ""}, "no valid SeriesInstanceUID"),
        ({"SOPInstanceUID": b"1.2.x.4711"}, "no valid SOPInstanceUID"),
        ({"PatientID": b"4711\\4712"}, "a PatientID that does not read"),
    ],
)
def test_a_file_that_does_not_say_what_it_is_has_no_document(kind: str, tmp_path: Path, tags: Any, words: str) -> None:
    source = malformed(film(), **{name: value for name, value in tags.items() if value is not None})
    for name in (name for name, value in tags.items() if value is None):
        delattr(source, name)
    buffer = io.BytesIO()
    source.save_as(buffer, enforce_file_format=False)
    with pytest.raises(RefusedImageError, match=words) as caught:
        write(kind, tmp_path, buffer.getvalue())
    assert "4711" not in str(caught.value)


@BOTH
def test_a_picture_that_is_no_dicom_file_has_no_document(kind: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedImageError, match="no DICOM file"):
        write(kind, tmp_path, b"\x89PNG\r\n\x1a\n")


@BOTH
def test_without_highdicom_the_extra_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(LaunchError, match=r"pip install 'ddpm-lmk\[dicom\]'"):
        open_writers([kind], tmp_path)


# --- and back


def item(kind: str, concept: tuple[str, str, str], *children: Dataset, **values: Any) -> Dataset:
    """An item of a report, made by hand."""
    made = Dataset()
    made.ValueType = kind
    made.ConceptNameCodeSequence = [coded(*concept)]
    for name, value in values.items():
        setattr(made, name, value)
    if children:
        made.ContentSequence = list(children)
    return made


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = value, scheme, meaning
    return made


def drawn_in_a_viewer(label: str, x: float, y: float, uid: str = "1.2.3.3", frame: int | None = None) -> Dataset:
    """A group as OHIF writes it (dcmjs, TID300 Point): the place is below a number, the label is the finding."""
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = film().SOPClassUID, uid
    if frame is not None:
        reference.ReferencedFrameNumber = frame
    image = item("IMAGE", ("260753009", "SCT", "Source"), ReferencedSOPSequence=[reference])
    place = item("SCOORD", ("", "", ""), image, GraphicType="POINT", GraphicData=[x, y])
    free = coded("CST4", "CORNERSTONEJS", label)
    return item(
        "CONTAINER",
        ("125007", "DCM", "Measurement Group"),
        item("TEXT", ("112039", "DCM", "Tracking Identifier"), TextValue="Cornerstone3DTools@^0.1.0:ArrowAnnotate"),
        item("CODE", ("121071", "DCM", "Finding"), ConceptCodeSequence=[free]),
        item("NUM", ("111010", "DCM", "Center"), place),
    )


def report_of(path: Path, *groups: Dataset, **tags: Any) -> Path:
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.3.4", "SR"
    report.ContentSequence = [item("CONTAINER", ("126010", "DCM", "Imaging Measurements"), *groups)]
    for name, value in tags.items():
        setattr(report, name, value)
    report.file_meta = film().file_meta
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save_as(path, enforce_file_format=True)
    return path


def packed(tmp_path: Path, **settings: Any) -> Any:
    """The labels of tmp_path/reports, with the films of tmp_path/films."""
    want = PackSettings(kind="dicom-sr", **settings).filled_for(tmp_path, has_key=False)
    return read_annotated(tmp_path / "reports", want, None, tmp_path / "films")


def test_a_verified_report_is_packed_with_the_points_that_it_was_made_of(tmp_path: Path) -> None:
    points = {"landmark_names": NAMES[:3], "radius_px": None}
    prediction = ImagePrediction(POINTS[:3], np.ones(3), np.zeros(3, bool))
    report = write("dicom-sr", tmp_path, film(PixelSpacing=[0.3, 0.3]), prediction=prediction, **points)
    for folder in ("films", "reports"):
        (tmp_path / folder).mkdir()
    (tmp_path / "film.dcm").rename(tmp_path / "films" / "some name")
    report.save_as(tmp_path / "reports" / "r.dcm")
    with pytest.raises(DataError, match="reports of predict that nobody has verified 1"):
        packed(tmp_path)
    report.VerificationFlag = "VERIFIED"
    report.save_as(tmp_path / "reports" / "r.dcm")
    found = packed(tmp_path)
    [sample] = found.samples
    np.testing.assert_allclose(sample.points, POINTS[:3], atol=1e-5)
    assert (sample.path, sample.mm_per_px) == (tmp_path / "films" / "some name", 0.3)
    assert found.spec.landmark_names == NAMES[:3]


def test_points_that_were_drawn_in_a_viewer_are_packed(tmp_path: Path) -> None:
    for index in range(2):
        path = tmp_path / "films" / f"{index}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(to_bytes(film(SOPInstanceUID=f"1.2.3.{3 + index}")))
    groups = [drawn_in_a_viewer("sella", 0.5, 0.5), drawn_in_a_viewer("nasion", 12.5, 30)]
    groups += [drawn_in_a_viewer(name, 7.5, 8.5, uid="1.2.3.4") for name in ("nasion", "sella")]
    other = item(
        "CONTAINER", ("125007", "DCM", "Measurement Group"), item("TEXT", ("112039", "DCM", "x"), TextValue="x")
    )
    report_of(tmp_path / "reports" / "by hand", *groups, other)
    found = packed(tmp_path)
    assert [sample.points.tolist() for sample in found.samples] == [[[0, 0], [12, 29.5]], [[7, 8], [7, 8]]]
    assert found.spec.landmark_names == ("sella", "nasion")
    assert "groups of other measurements 1" in found.warnings[0]


def test_files_beside_the_films_that_do_not_read_stop_nothing(tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    (films / "0.dcm").write_bytes(to_bytes(film(SOPInstanceUID="1.2.3.3")))
    (films / "gone.dcm").symlink_to("nowhere")
    os.mkfifo(films / "pipe.dcm")
    (films / "cut.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\0\0\0UL\4\0\xff\xff\xff\x7f\x08\0")
    report_of(tmp_path / "reports" / "r.dcm", drawn_in_a_viewer("sella", 12.5, 30))
    [sample] = packed(tmp_path).samples
    assert (sample.id, sample.points.tolist()) == ("0", [[12, 29.5]])


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (drawn_in_a_viewer("sella", 1, 2, frame=2), "has points on frame 2; give --frame 1"),
        (drawn_in_a_viewer("", 1, 2), "a landmark without a name"),
        (item("CONTAINER", ("125007", "DCM", "x"), item("SCOORD", ("", "", ""), GraphicType="POINT")), "does not read"),
    ],
)
def test_a_report_that_cannot_be_used_is_named(tmp_path: Path, group: Dataset, words: str) -> None:
    report_of(tmp_path / "reports" / "r.dcm", group)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "0.dcm").write_bytes(to_bytes(film()))
    with pytest.raises(DataError, match=words) as caught:
        packed(tmp_path)
    assert "r.dcm" in str(caught.value)


@pytest.mark.skipif(shutil.which("dcmpschk") is None, reason="needs DCMTK (Debian: dcmtk)")
def test_dcmtk_finds_no_fault(tmp_path: Path) -> None:
    names = ("sella", "nasion", "porion", "orbitale", "menton")  # of others its checker says that it knows no UTF-8
    for index, kind in enumerate(("dicom-sr", "dicom-gsps")):
        write(kind, tmp_path, film(WindowCenter=1500, WindowWidth=900), landmark_names=names)
        path = tmp_path / "out" / str(index) / kind / "a" / "film.dcm"
        program = ("dsrdump", "dcmpschk")[index]
        done = subprocess.run([program, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "POINT,0.5/0.5" in done.stdout or "Test passed" in done.stderr


@BOTH
def test_every_real_file_has_a_document(kind: str, tmp_path: Path, real_data: Any) -> None:
    num_written = 0
    for path in sorted(real_data("dicom").iterdir()):
        try:
            image = decode_image(read_content(path), ReadOptions(allow_burned_in=True, only_dicom=True))
        except RefusedImageError:
            continue
        height, width = image.pixels.shape
        points = np.array([[0, 0], [width - 1, height - 1], [width / 3, height / 3], [-5, 0], [1, 1]])
        prediction = ImagePrediction(points, np.ones(5), np.zeros(5, bool))
        facts = {"grey": np.zeros((height, width), np.uint8), "mm_per_px": image.mm_per_px, "prediction": prediction}
        document = write(kind, tmp_path, path.read_bytes(), **facts)
        assert document.PatientName == dcmread(path, force=True, specific_tags=["PatientName"]).PatientName
        num_written += 1
    assert num_written >= 7
