"""Millimetres per pixel in the patient, from the attributes of a DICOM radiograph, or None where they are unknown.

An x-ray source is a point, so what lies before the detector is magnified on it: a spacing at the detector is not one in
the patient, by 5 to 50 %. What is trusted, from the top (PS3.3 sections 10.7.1.1 to 10.7.1.3, C.8.11.4, C.8.7.5;
"receptor" is ImagerPixelSpacing, at the detector, or NominalScannedPixelSpacing, on a film that was digitised):

| PixelSpacing | and                                             | mm per pixel                                        |
|--------------|-------------------------------------------------|-----------------------------------------------------|
| there        | PixelSpacingCalibrationType GEOMETRY, FIDUCIAL  | PixelSpacing                                        |
| there        | no receptor                                     | PixelSpacing (by definition in the patient)         |
| there        | receptor is 1 to 5 times as long                | PixelSpacing (differing means: it was corrected)    |
| there        | receptor has the same value                     | not corrected: as receptor alone                    |
| there        | receptor is shorter, or over 5 times as long    | unknown: no magnification does that                 |
| absent       | receptor, EstimatedRadiographicMagnification-   | receptor / factor                                   |
|              | Factor of 1 to 5                                |                                                     |
| absent       | receptor, DistanceSourceToDetector and          | receptor x DistanceSourceToPatient /                |
|              | DistanceSourceToPatient, their ratio 1 to 5     | DistanceSourceToDetector                            |
| absent       | receptor, no magnification stated               | receptor, said to be at the detector                |
| absent       | receptor, a factor or ratio outside 1 to 5, or  | unknown                                             |
|              | the two over 10 % apart                         |                                                     |
| absent       | ImagerPixelSpacing and NominalScannedPixel-     | unknown                                             |
|              | Spacing that differ                             |                                                     |
| absent       | none of these                                   | unknown                                             |

A value of 0 is a placeholder (`[0, 0]` is common), one that is negative, no number or not a pair does not read; both
count as absent. A result is unknown as well where pixels are not square (the two values, or PixelAspectRatio, differ by
over 0.1 %), and where the longer side of the picture would measure less than 1 mm or more than 2 m: then the unit was
another. Never used: SpatialResolution (the finest detail that is resolved), DetectorElementSpacing (before binning),
and PixelSpacingCalibrationDescription, which is free text.
"""

from __future__ import annotations

from ddpm_lmk.data.images.dicom_attributes import Attributes

_RECEPTOR = ("ImagerPixelSpacing", "NominalScannedPixelSpacing")
_FACTOR = "EstimatedRadiographicMagnificationFactor"
_DISTANCES = ("DistanceSourceToDetector", "DistanceSourceToPatient")
SPACING_TAGS = ("PixelSpacing", "PixelSpacingCalibrationType", "PixelAspectRatio", *_RECEPTOR, _FACTOR, *_DISTANCES)
AT_DETECTOR, UNKNOWN = ", at the detector", "unknown: "  # how the text about a spacing ends, and begins

_MAX_MAGNIFICATION = 5.0  # contact images have 1.0 to 1.3, magnified mammograms 2
_SAME = 0.01  # values written with two or three digits
_SQUARE = 0.001
_DISAGREE = 0.1
_SIDES_MM = (1.0, 2000.0)  # an image of a tooth has 30 mm, a whole body 1800

Pair = tuple[float, float]


class _UnknownError(Exception):
    """The tags contradict one another; the message says how."""


def spacing(attributes: Attributes) -> tuple[float | None, str | None]:
    """Millimetres per pixel, None where unknown; and from which tags, or why not (None: no tag says anything)."""
    try:
        (rows, columns), source = _trusted_pair(attributes)
        _require_square(rows, columns, attributes)
        longer_mm = max(rows * attributes.dataset.Rows, columns * attributes.dataset.Columns)
        if not _SIDES_MM[0] <= longer_mm <= _SIDES_MM[1]:
            source = source.removesuffix(AT_DETECTOR)
            raise _UnknownError(f"{source} makes a picture of less than 1 mm or more than 2 m")
    except _UnknownError as reason:
        return None, UNKNOWN + str(reason) if str(reason) else None
    return rows, source


def _trusted_pair(attributes: Attributes) -> tuple[Pair, str]:
    """The table above: row and column spacing, and their source."""
    patient = _pair(attributes, "PixelSpacing")
    receptors = {name: pair for name in _RECEPTOR if (pair := _pair(attributes, name)) is not None}
    if patient is not None:
        if not receptors or attributes.code("PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL"):
            return patient, "PixelSpacing"
        ratios = [pair[0] / patient[0] for pair in receptors.values()]
        if all(abs(ratio - 1) > _SAME for ratio in ratios):
            if not all(1 < ratio <= _MAX_MAGNIFICATION for ratio in ratios):
                raise _UnknownError(f"PixelSpacing and {' and '.join(receptors)} contradict each other")
            return patient, "PixelSpacing"
    if not receptors:
        raise _UnknownError
    first, last = next(iter(receptors.values())), list(receptors.values())[-1]
    if any(abs(one / other - 1) > _SAME for one, other in zip(first, last)):
        raise _UnknownError(f"{' and '.join(receptors)} contradict each other")
    # From here on the spacing is one at the detector, also where PixelSpacing repeats it.
    at_detector = patient or first
    name = "PixelSpacing" if patient is not None else next(iter(receptors))
    magnification, source = _magnification(attributes)
    if magnification is None:
        return at_detector, name + AT_DETECTOR
    return (at_detector[0] / magnification, at_detector[1] / magnification), f"{name} / {source}"


def _magnification(attributes: Attributes) -> tuple[float | None, str]:
    """How much larger things are at the detector than in the patient, None where unknown; and the source of that."""
    factor, detector, patient = (_positive(attributes, name) for name in (_FACTOR, *_DISTANCES))
    ratio = detector / patient if detector is not None and patient is not None else None
    ratio_name = " / ".join(_DISTANCES)
    has_ratio = ratio is not None and 1 <= ratio <= _MAX_MAGNIFICATION
    if factor is None:
        if ratio is not None and not has_ratio:
            raise _UnknownError(f"{ratio_name} is not between 1 and {_MAX_MAGNIFICATION:g}")
        return ratio, f"({ratio_name})"
    if not 1 <= factor <= _MAX_MAGNIFICATION:
        raise _UnknownError(f"{_FACTOR} is not between 1 and {_MAX_MAGNIFICATION:g}")
    # A ratio that no geometry allows is no evidence against a factor that one does.
    if ratio is not None and has_ratio and abs(ratio / factor - 1) > _DISAGREE:
        raise _UnknownError(f"{_FACTOR} and {ratio_name} contradict each other")
    return factor, _FACTOR


def _require_square(rows: float, columns: float, attributes: Attributes) -> None:
    if abs(rows - columns) > _SQUARE * rows:
        raise _UnknownError("pixels are not square")
    aspect = attributes.numbers("PixelAspectRatio")
    if len(aspect) == 2 and all(side > 0 for side in aspect) and abs(aspect[0] - aspect[1]) > _SQUARE * aspect[0]:
        raise _UnknownError("PixelAspectRatio says that pixels are not square, the spacing that they are")


def _pair(attributes: Attributes, name: str) -> Pair | None:
    values = attributes.numbers(name)
    if values and (len(values) != 2 or min(values) < 0):
        attributes.pass_over(name)
    return (values[0], values[1]) if len(values) == 2 and all(value > 0 for value in values) else None


def _positive(attributes: Attributes, name: str) -> float | None:
    value = attributes.number(name)
    if value is not None and value < 0:
        attributes.pass_over(name)
    return value if value is not None and value > 0 else None
