"""Landmarks in DICOM structured reports: names as codes, and the points of TID 1500 reports, ours or of viewers.

(0, 0) is the corner of the top-left pixel (PS3.3 C.18.6.1.1). A report names its image by SOPInstanceUID. A landmark
is a code of the private scheme 99DDPMLMK (PS3.16 8.2): its value is a hash of the name, since names are text
of users and values have 16 characters of ASCII; its meaning is the name, as far as 64 characters go. The whole name is
the Tracking Identifier of the group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_lmk.data.annotations.image import AnnotatedImage, Annotations, Marks, Origin, as_point, read_bytes
from ddpm_lmk.data.images.decode import read_content
from ddpm_lmk.data.images.dicom import is_dicom, quiet, read_header, require_pydicom
from ddpm_lmk.data.images.image import RefusedImageError
from ddpm_lmk.data.sources.walk import images_below
from ddpm_lmk.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.sr.coding import Code

ORIGIN: Origin = "corner"
PROGRAM = "ddpm-lmk"  # manufacturer of our documents
SCHEME = "99DDPMLMK"
_MEANINGS = {
    "spread": "Standard deviation of the position",
    "radius": "Radius around the true position",
    "coverage": "Probability of the radius",
    "position": "Position",
    "not found": "No position found in the picture",
}
_UNITS = {"pixels": ("{pixels}", "pixels"), "mm": ("mm", "millimeter"), "%": ("%", "percent")}  # UCUM
_LONGEST_MEANING = 64  # characters of LO
_REPORTS = "1.2.840.10008.5.1.4.1.1.88."
_GROUP, _NAME, _FINDING = "125007", "112039", "121071"  # Measurement Group, Tracking Identifier, Finding (DCM)


def code(word: str) -> Code:
    """The code of a unit, of a measurement, or of an answer."""
    from pydicom.sr.coding import Code

    if word in _UNITS:
        return Code(_UNITS[word][0], "UCUM", _UNITS[word][1])
    return Code(word.upper().replace(" ", "_"), SCHEME, _MEANINGS[word])


def landmark_code(name: str) -> Code:
    """The code of a landmark."""
    from pydicom.sr.coding import Code

    value = "L" + hashlib.sha256(name.encode()).hexdigest()[:15]
    return Code(value, SCHEME, name.replace("\\", "/")[:_LONGEST_MEANING])


def read_reports(files: Sequence[Path], frame: int | None) -> Annotations:
    """The points of all reports among `files`; images are named by SOPInstanceUID (`find_images`).

    What `predict` wrote is a draft, and counts once somebody has verified it. A landmark is called what the Finding of
    its group means, or as its Tracking Identifier says where that is our code, whose meaning may be cut short, or there
    is none.

    Raises:
        DataError: a report that does not read, or whose points are on another frame than `frame`, counted from 0.
        LaunchError: pydicom is not installed.
    """
    require_pydicom()
    found = Annotations()
    for path in files:
        header = _header(path, read_bytes(path), "SOPClassUID", "Manufacturer", "VerificationFlag", "ContentSequence")
        if header is None or not str(header.get("SOPClassUID")).startswith(_REPORTS):
            continue
        if header.get("Manufacturer") == PROGRAM and header.get("VerificationFlag") != "VERIFIED":
            found.passed_over["reports of predict that nobody has verified"] += 1
            continue
        try:
            with quiet():
                found.images += _read_report(path, header, frame, found)
        except DataError:
            raise
        except Exception as error:  # values are converted when they are asked for, and anything may be in them
            raise DataError(f"{path} is a report that does not read ({type(error).__name__})") from None
    return found


def _read_report(path: Path, report: Dataset, frame: int | None, found: Annotations) -> list[AnnotatedImage]:
    images: dict[str, Marks] = {}
    for group in _items(report, _GROUP):
        children = list(_items(group))
        places = [each for each in children if (each.get("ValueType"), each.get("GraphicType")) == ("SCOORD", "POINT")]
        answers = [_code(each, "ConceptCodeSequence") for each in children]
        if not places and tuple(code("not found")[:2]) in answers:
            places = [group]
        elif not places:
            found.passed_over["groups of other measurements"] += 1
        for place in places:
            [image, *_] = (each for child in _items(place) for each in child.get("ReferencedSOPSequence", ()))
            if (number := int(image.get("ReferencedFrameNumber") or 1)) != (frame or 0) + 1:
                raise DataError(f"{path} has points on frame {number}; give --frame {number - 1}")
            marks = images.setdefault(str(image.ReferencedSOPInstanceUID), Marks(str(path)))
            if place is group:
                marks.put(_name(children), "was not found")
            else:
                x, y = (float(value) for value in place.GraphicData)
                marks.put(_name(children), as_point(x, y, str(path)))
    return [AnnotatedImage(uid, marks) for uid, marks in images.items()]


def find_images(found: Annotations, root: Path) -> Annotations:
    """The same with images called by their paths below `root`, where the file is there.

    Files that do not read have no part in it: they are refused by name where they are decoded.
    """
    paths = {}
    for name in images_below(root)[0]:
        try:
            header = _header(root / name, read_content(root / name), "SOPInstanceUID")
        except (OSError, RefusedImageError, DataError):
            continue
        if header is not None:
            paths[str(header.get("SOPInstanceUID"))] = name
    return replace(found, images=[replace(image, name=paths.get(image.name, image.name)) for image in found.images])


def _header(path: Path, data: bytes, *names: str) -> Dataset | None:
    """Attributes of a DICOM file, None of any other; raises DataError where they do not read."""
    if not is_dicom(data):
        return None
    try:
        return read_header(data, names).dataset
    except RefusedImageError as error:
        raise DataError(f"{path}: {error}") from None


def _items(item: Dataset, concept: str | None = None) -> Iterator[Dataset]:
    """Everything below an item of a report, or what has this concept name."""
    for child in item.get("ContentSequence", ()):
        if concept is None or _code(child, "ConceptNameCodeSequence")[0] == concept:
            yield child
        yield from _items(child, concept)


def _code(item: Dataset, name: str) -> tuple[str, str]:
    """Value and scheme; empty where there is none."""
    codes = item.get(name) or [{}]
    return str(codes[0].get("CodeValue") or ""), str(codes[0].get("CodingSchemeDesignator") or "")


def _name(children: Sequence[Dataset]) -> str:
    named = {_code(child, "ConceptNameCodeSequence")[0]: child for child in reversed(children)}
    finding, tracked = named.get(_FINDING), named.get(_NAME)
    is_told = finding is not None and _code(finding, "ConceptCodeSequence")[1] not in ("", SCHEME)
    if finding is not None and (is_told or tracked is None):
        return str(finding.ConceptCodeSequence[0].get("CodeMeaning") or "")
    return str(tracked.get("TextValue") or "") if tracked is not None else ""
