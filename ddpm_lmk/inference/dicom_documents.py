"""Landmarks as DICOM documents that name their image: a structured report, and a presentation state to draw them.

One document for each image, so that a film that is predicted again, or corrected, replaces its own and no other.

The report (Comprehensive SR) is a TID 1500 measurement report with a TID 1410 group for each landmark: the point as an
SCOORD, and its uncertainty as measurements with UCUM units. A landmark without a point in the picture has a TID 1501
group that says so. The presentation state (GSPS) holds the same points as graphics, and shows the picture as its file
would be shown.

Coordinates are (column, row) from the corner of the top-left pixel, whose centre is (0.5, 0.5) (PS3.3 C.18.6.1.1 and
C.10.5.1.2); ours is (0, 0) there. Of the file nothing is copied but the attributes of `PATIENT` and `STUDY`, which make
the document one of the same patient and study, the ids of the image, and in a presentation state its grey scale.

UIDs are name-based UUIDs under 2.25 (PS3.5 B.2): that of a document follows from everything in it but the time of
writing, so that the same command gives the same document, and an archive knows it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_lmk import __version__
from ddpm_lmk.data.annotations.dicom_sr import PROGRAM, SCHEME, code, landmark_code
from ddpm_lmk.data.annotations.image import CORNER_PX
from ddpm_lmk.data.images.decode import read_content
from ddpm_lmk.data.images.dicom import is_dicom, quiet, read_header
from ddpm_lmk.data.images.dicom_attributes import Attributes
from ddpm_lmk.data.images.dicom_grey import GREY_TAGS, first_window, readable_table
from ddpm_lmk.data.images.image import RefusedImageError
from ddpm_lmk.errors import LaunchError
from ddpm_lmk.inference.predictions import PredictedFile
from ddpm_lmk.system import files as atomic

if TYPE_CHECKING:
    from highdicom import SOPClass
    from pydicom import Dataset
    from pydicom.sr.coding import Code

NOTICE = "Found by a program, checked by nobody. Not a medical device, not for diagnosis."
SERIES = "ddpm-lmk landmarks, not for diagnosis"  # what lists of series show

# Type 1 and 2 of the modules Patient and General Study (PS3.3 C.7.1.1, C.7.2.1), and whose the PatientID is.
PATIENT = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
_NAMES_SOMEBODY = ("PatientName", "PatientID", "IssuerOfPatientID")  # left out, they would name somebody else
_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_PICTURE = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "PixelRepresentation",
)
_SHAPE = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")
_READ = (*PATIENT, *STUDY, *_UIDS, *_PICTURE, *_SHAPE, *GREY_TAGS, "SpecificCharacterSet")

_REPORTS, _STATES = 9001, 9002  # numbers of our series in a study, above those that modalities give
_KNOWN_CLASS = "1.2.840.10008.5.1.4.1.1.1"  # in place of any: highdicom knows the modules of standard ones only


class DicomWriter:
    """A document for each file, as ID.dcm."""

    def __init__(self, folder: Path, make: Callable[[Source, PredictedFile], SOPClass]) -> None:
        require_highdicom()
        self._folder, self._make = folder, make

    def add(self, predicted: PredictedFile) -> None:
        """Write the document of one file; raises RefusedImageError where there cannot be one."""
        with quiet():
            document = self._make(Source(predicted), predicted)
            content = io.BytesIO()
            document.save_as(content, enforce_file_format=True)
        atomic.write_bytes(self._folder / f"{predicted.id}.dcm", content.getvalue())

    def finish(self) -> None:
        """Nothing is left to write."""


def require_highdicom() -> None:
    """Raise LaunchError, naming the extra, where highdicom is not installed."""
    try:
        import highdicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise LaunchError(
            "DICOM documents are written with highdicom, which is not here: pip install 'ddpm-lmk[dicom]'"
        ) from error


class Source:
    """What documents take from the file of an image: `dataset` has valid attributes of `PATIENT`, `STUDY` and ids only.

    Its class is that of any radiograph until `correct` names the true one.

    Raises:
        RefusedImageError: no DICOM file, or one that does not say which image, series, study or patient it is.
    """

    def __init__(self, predicted: PredictedFile) -> None:
        from pydicom import Dataset

        content = read_content(predicted.path)
        if not is_dicom(content):
            raise RefusedImageError("NOT_DICOM", "no DICOM file, from which a document could take patient and study")
        self.attributes: Attributes = read_header(content, _READ)
        self.dataset = Dataset()
        for name in (*PATIENT, *STUDY, *_UIDS):
            self._copy(name)
        self.sop_class = str(self.dataset.SOPClassUID)
        self.dataset.SOPClassUID = _KNOWN_CLASS
        height, width = predicted.grey.shape
        assert (self.attributes.get("Columns"), self.attributes.get("Rows")) == (width, height)
        self.dataset.Columns, self.dataset.Rows, self.dataset.SamplesPerPixel = width, height, 1
        self.frame = (predicted.frame or 0) + 1 if (self.attributes.get("NumberOfFrames") or 1) > 1 else None
        self.uid = str(self.dataset.SOPInstanceUID)

    def _copy(self, name: str) -> None:
        """An attribute that is valid; one that may be empty is so instead."""
        from pydicom.config import RAISE
        from pydicom.datadict import dictionary_VR
        from pydicom.uid import UID
        from pydicom.valuerep import PersonName, validate_value

        value = self.attributes.get(name)
        is_single = value is None or isinstance(value, str | PersonName)
        text = str(value or "").strip() if is_single else ""
        if name in _UIDS:
            if not UID(text).is_valid:
                raise RefusedImageError("NO_REFERENCE", f"no valid {name}, which a DICOM document has to name")
        elif name in _NAMES_SOMEBODY:
            if not is_single or name in self.attributes.passed_over:
                raise RefusedImageError("NO_REFERENCE", f"a {name} that does not read, and whose document would it be?")
        else:
            try:
                validate_value(dictionary_VR(name), text, RAISE)
            except ValueError:
                text = ""
            if name == "PatientSex" and text not in ("M", "F", "O"):
                text = ""
        if text or name != "IssuerOfPatientID":
            setattr(self.dataset, name, value if text and isinstance(value, PersonName) else text or None)

    def correct(self, document: SOPClass) -> SOPClass:
        """The document with the class of the image as its file states it, wherever the image is named."""

        def correct(dataset: Dataset, element: Any) -> None:
            if element.keyword == "ReferencedSOPInstanceUID" and element.value == self.uid:
                dataset.ReferencedSOPClassUID = self.sop_class

        document.walk(correct)
        return document


def _uid(*parts: str | None) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([PROGRAM, *parts])).int}"


def _identity(source: Source, predicted: PredictedFile, kind: str, number: int) -> dict[str, Any]:
    """Arguments that a document of any kind has: its ids, the program and the weights that made it."""
    prediction = predicted.prediction
    points = [array.tolist() for array in (prediction.points, prediction.spread_px, prediction.failed)]
    radius = None if predicted.radius_px is None else np.nan_to_num(predicted.radius_px, nan=-1).tolist()
    facts = (*predicted.landmark_names, points, radius, predicted.coverage, predicted.mm_per_px, predicted.spacing)
    content = hashlib.sha256(json.dumps([*facts, predicted.size, source.frame, __version__]).encode()).hexdigest()
    return {
        "series_instance_uid": _uid(kind, "series", str(source.dataset.SeriesInstanceUID), predicted.weights),
        "series_number": number,
        "sop_instance_uid": _uid(kind, source.uid, predicted.weights, content),
        "instance_number": 1,
        "series_description": SERIES,
        "manufacturer": PROGRAM,
        "manufacturer_model_name": PROGRAM,
        "software_versions": __version__,
        "device_serial_number": predicted.weights,
        "specific_character_set": "ISO_IR 192",
    }


def _corner_points(predicted: PredictedFile) -> dict[str, np.ndarray | None]:
    """Points by landmark, from the corner of the top-left pixel; None where there is none in the picture."""
    points: dict[str, np.ndarray | None] = {}
    prediction = predicted.prediction
    for name, point, failed in zip(
        predicted.landmark_names, prediction.points + CORNER_PX, prediction.failed, strict=True
    ):
        # outside of the picture neither SCOORD nor a graphic may lie
        is_there = not failed and (point >= 0).all() and (point <= predicted.size).all()
        points[name] = point if is_there else None
    return points


# --- structured report


def measurement_report(source: Source, predicted: PredictedFile) -> SOPClass:
    """The landmarks of an image as a TID 1500 report."""
    from highdicom import sr
    from highdicom.sr import RelationshipTypeValues as Relationship
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    identity = _identity(source, predicted, "SR", _REPORTS)
    points = _corner_points(predicted)
    groups = [_group(source, predicted, index, points[name]) for index, name in enumerate(points)]
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid("device", predicted.weights),
            name=PROGRAM,
            manufacturer_name=PROGRAM,
            model_name=f"{PROGRAM} {__version__}",
            serial_number=predicted.weights,
        ),
    )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=Code("363680008", "SCT", "Radiographic imaging procedure"),
        imaging_measurements=groups,
    )
    # By hand: that of highdicom wants an orientation and a spacing, which many films do not state.
    image = sr.ImageContentItem(
        name=Code("260753009", "SCT", "Source"),
        relationship_type=Relationship.CONTAINS,
        **_reference(source),
    )
    library = sr.ContainerContentItem(codes.DCM.ImageLibrary, relationship_type=Relationship.CONTAINS)
    group = sr.ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=Relationship.CONTAINS)
    group.ContentSequence, library.ContentSequence = sr.ContentSequence([image]), sr.ContentSequence([group])
    notice = f"{NOTICE} Millimetres: {predicted.spacing or 'not known'}."
    comment = sr.TextContentItem(codes.DCM.Comment, notice, relationship_type=Relationship.CONTAINS)
    children = report[0].ContentSequence
    children.insert(len(children) - 1, library)  # before the measurements, as TID 1500 orders them
    children.append(comment)
    document = sr.ComprehensiveSR(
        evidence=[source.dataset],
        content=report[0],
        is_complete=all(point is not None for point in points.values()),
        coding_schemes=_coding_schemes(),
        **identity,
    )
    return source.correct(document)


def _reference(source: Source) -> dict[str, Any]:
    return {
        "referenced_sop_class_uid": source.dataset.SOPClassUID,
        "referenced_sop_instance_uid": source.uid,
        "referenced_frame_numbers": None if source.frame is None else [source.frame],
    }


def _group(source: Source, predicted: PredictedFile, index: int, point: np.ndarray | None) -> Any:
    """The measurement group of one landmark."""
    from highdicom import sr

    name = predicted.landmark_names[index]
    facts: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(uid=_uid("landmark", source.uid, name), identifier=name),
        "finding_type": landmark_code(name),
        "algorithm_id": sr.AlgorithmIdentification(
            PROGRAM, __version__, parameters=[f"sha256 of the weights: {predicted.weights}"]
        ),
    }
    if point is None:
        return sr.MeasurementsAndQualitativeEvaluations(
            source_images=[sr.SourceImageForMeasurementGroup(**_reference(source))],
            qualitative_evaluations=[sr.QualitativeEvaluation(code("position"), code("not found"))],
            **facts,
        )
    region = sr.ImageRegion("POINT", point[None], source_image=sr.SourceImageForRegion(**_reference(source)))
    measurements = [sr.Measurement(name, value, unit) for name, value, unit in _measured(predicted, index)]
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_region=region, measurements=measurements or None, **facts
    )


def _measured(predicted: PredictedFile, index: int) -> list[tuple[Code, float, Code]]:
    """What is known of the uncertainty of a point, in pixels and, where their size is known, millimetres."""
    pixels, millimetres, percent = code("pixels"), code("mm"), code("%")
    lengths = {"spread": float(predicted.prediction.spread_px[index])}
    if predicted.radius_px is not None:
        lengths["radius"] = float(predicted.radius_px[index])
    lengths = {kind: value for kind, value in lengths.items() if value > 0}  # NaN, or 0: nothing to be read from a map
    found = [(code(kind), round(value, 3), pixels) for kind, value in lengths.items()]
    if predicted.mm_per_px is not None:
        found += [(code(kind), round(value * predicted.mm_per_px, 4), millimetres) for kind, value in lengths.items()]
    if "radius" in lengths and predicted.coverage is not None:
        found.append((code("coverage"), round(100 * predicted.coverage, 3), percent))
    return found


def _coding_schemes() -> list[Any]:
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return [CodingSchemeIdentificationItem(SCHEME, name="ddpm-lmk landmarks", responsible_organization=PROGRAM)]


# --- presentation state


def presentation_state(source: Source, predicted: PredictedFile) -> SOPClass:
    """The landmarks of an image as graphics over it, with its own grey scale."""
    from highdicom import PresentationLUTTransformation, pr
    from highdicom.pr import AnnotationUnitsValues

    photometric = source.attributes.code("PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise RefusedImageError("MODE", "colours or a palette, which no grey scale presentation state shows")
    pixel = AnnotationUnitsValues.PIXEL
    found = {name: point for name, point in _corner_points(predicted).items() if point is not None}
    tracked: dict[str, dict[str, Any]] = {
        name: {"tracking_id": name, "tracking_uid": _uid("landmark", source.uid, name)} for name in found
    }
    layers = [pr.GraphicLayer("LANDMARKS", order=1, description=SERIES)]
    annotations = [
        pr.GraphicAnnotation(
            [source.dataset],
            layers[0],
            graphic_objects=[pr.GraphicObject("POINT", xy[None], pixel, **tracked[name]) for name, xy in found.items()],
            text_objects=[
                pr.TextObject(
                    landmark_code(name).meaning, pixel, anchor_point=tuple(xy.tolist()), anchor_point_visible=False
                )
                for name, xy in found.items()
            ],
        )
    ]
    circles = [
        pr.GraphicObject("CIRCLE", circle, pixel, **tracked[name])
        for name, circle in _circles(predicted, found).items()
    ]
    if circles:
        held = f"holds the true point with {100 * (predicted.coverage or 0):g} %"
        layers.append(pr.GraphicLayer("RADII", order=2, description=held))
        annotations.append(pr.GraphicAnnotation([source.dataset], layers[1], graphic_objects=circles))
    is_inverse = photometric == "MONOCHROME1" or source.attributes.code("PresentationLUTShape") == "INVERSE"
    document = pr.GrayscaleSoftcopyPresentationState(
        [source.dataset],
        content_label="LANDMARKS",
        content_description="Found by a program, not for diagnosis",
        graphic_layers=layers,
        graphic_annotations=annotations if found else None,
        # the polarity is here alone: a viewer that has a presentation state passes over that of the picture
        presentation_lut_transformation=PresentationLUTTransformation("INVERSE" if is_inverse else "IDENTITY"),
        **_identity(source, predicted, "GSPS", _STATES),
    )
    _copy_grey_scale(source.attributes, document)
    _copy_shape_of_pixels(source.attributes, document)
    source.correct(document)
    if source.frame is not None:

        def name_frame(_: Dataset, element: Any) -> None:
            if element.keyword == "ReferencedImageSequence":
                element.value[0].ReferencedFrameNumber = source.frame

        document.walk(name_frame)
    return document


def _circles(predicted: PredictedFile, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A centre and a point of the circle for each landmark with a radius, as far as both lie in the picture."""
    if predicted.radius_px is None:
        return {}
    circles = {}
    for name, radius in zip(predicted.landmark_names, predicted.radius_px, strict=True):
        if name not in found:
            continue
        rims = [found[name] + offset for offset in ((radius, 0), (-radius, 0), (0, radius), (0, -radius))]
        rim = next((rim for rim in rims if (rim >= 0).all() and (rim <= predicted.size).all()), None)
        if rim is not None:
            circles[name] = np.stack([found[name], rim])
    return circles


def _copy_grey_scale(attributes: Attributes, document: Dataset) -> None:
    """The stages from stored values to what is shown, those that read: table or rescaling, then table or window."""
    from pydicom import Dataset

    slope, intercept = attributes.number("RescaleSlope"), attributes.number("RescaleIntercept")
    if (table := readable_table(attributes, "ModalityLUTSequence")) is not None:
        item = _table_item(*table)
        item.ModalityLUTType = "US"  # unspecified: what a file says may be free text
        document.ModalityLUTSequence = [item]
    elif slope and intercept is not None:
        document.RescaleSlope, document.RescaleIntercept = _decimals(slope, intercept)
        document.RescaleType = "US"
    shown = Dataset()
    if (table := readable_table(attributes, "VOILUTSequence")) is not None:
        shown.VOILUTSequence = [_table_item(*table)]
    elif (window := first_window(attributes)) is not None:
        shown.WindowCenter, shown.WindowWidth = _decimals(*window[:2])
        shown.VOILUTFunction = window[2]
    if shown:
        document.SoftcopyVOILUTSequence = [shown]


def _decimals(*values: float) -> list[Any]:
    """In the 16 characters that a decimal string may have."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(value, auto_format=True) for value in values]


def _table_item(first: int, depth: int, entries: np.ndarray) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % (1 << 16), first, depth])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return item


def _copy_shape_of_pixels(attributes: Attributes, document: Dataset) -> None:
    """Pixels that are not square are shown as long and as wide as they are."""
    [area] = document.DisplayedAreaSelectionSequence
    for name in _SHAPE:
        shape = attributes.numbers(name)
        if len(shape) == 2 and min(shape) > 0:
            if name == "PixelAspectRatio":
                area.PresentationPixelAspectRatio = [int(side) for side in shape]
            else:
                del area.PresentationPixelAspectRatio
                area.PresentationPixelSpacing = _decimals(*shape)
            return
