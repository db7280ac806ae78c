"""Millimetres per pixel in the patient, as the tags of a radiograph tell them, and what they are when they are not.

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

Optional attributes of DICOM files, any of which may be malformed beside good pixels.

What does not read is passed over by name, never guessed: a decimal comma could as well separate two values. Only names
of the standard are kept, no value of a file. Reading files is `dicom`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import Dataset


def pass_over_malformed(dataset: Dataset, names: Iterable[str], passed_over: list[str]) -> None:
    """Remove each of the attributes `names` whose value cannot even be converted, so that no reader meets it later."""
    for name in names:
        try:
            dataset.get(name)
        except MemoryError:
            raise
        except Exception:  # pydicom converts when asked, and raises what the conversion raises
            del dataset[name]
            pass_over(name, passed_over)


def numbers(dataset: Dataset, name: str, passed_over: list[str]) -> list[float]:
    """Values of a numeric attribute; none where it is absent or empty. What is no finite number is NaN, and named."""
    found = dataset.get(name)
    if found is None or found == "":
        return []
    is_several = isinstance(found, Sequence) and not isinstance(found, str | bytes)
    values = [_number(value) for value in (found if is_several else [found])]
    if any(math.isnan(value) for value in values):
        pass_over(name, passed_over)
    return values


def number(dataset: Dataset, name: str, passed_over: list[str]) -> float | None:
    """The one value of a numeric attribute; None where it is absent, or passed over."""
    values = numbers(dataset, name, passed_over)
    if len(values) > 1:
        pass_over(name, passed_over)
    return values[0] if len(values) == 1 and not math.isnan(values[0]) else None


def code(dataset: Dataset, name: str) -> str:
    """A code string in capitals; empty where it is absent."""
    return str(dataset.get(name) or "").strip().upper()


def pass_over(name: str, passed_over: list[str]) -> None:
    """Name an attribute once as one that does not read."""
    if name not in passed_over:
        passed_over.append(name)


def _number(value: object) -> float:
    try:
        read = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return read if math.isfinite(read) else math.nan


_RECEPTOR = ("ImagerPixelSpacing", "NominalScannedPixelSpacing")
_FACTOR = "EstimatedRadiographicMagnificationFactor"
_DISTANCES = ("DistanceSourceToDetector", "DistanceSourceToPatient")
SPACING_TAGS = ("PixelSpacing", "PixelSpacingCalibrationType", "PixelAspectRatio", *_RECEPTOR, _FACTOR, *_DISTANCES)
AT_DETECTOR, UNKNOWN = ", at the detector", "unknown: "  # how what is said ends, and begins

_MAX_MAGNIFICATION = 5.0  # contact films have 1.0 to 1.3, magnified mammograms 2
_SAME = 0.01  # values written with two or three digits
_SQUARE = 0.001
_DISAGREE = 0.1
_SIDES_MM = (1.0, 2000.0)  # a tooth film has 30 mm, a whole body 1800

Pair = tuple[float, float]


class _UnknownError(Exception):
    """The tags contradict one another; the message says how."""


def spacing(dataset: Dataset, passed_over: list[str]) -> tuple[float | None, str | None]:
    """Millimetres per pixel, None where unknown; and from which tags, or why not (None: no tag says anything)."""
    try:
        (rows, columns), said, is_at_detector = _trusted(dataset, passed_over)
        _require_square(rows, columns, dataset, passed_over)
        side_mm = max(rows * dataset.Rows, columns * dataset.Columns)
        if not _SIDES_MM[0] <= side_mm <= _SIDES_MM[1]:
            raise _UnknownError(f"{said} makes a picture of less than 1 mm or more than 2 m")
    except _UnknownError as reason:
        return None, UNKNOWN + str(reason) if str(reason) else None
    return rows, said + AT_DETECTOR * is_at_detector


def _trusted(dataset: Dataset, passed_over: list[str]) -> tuple[Pair, str, bool]:
    """The table above: row and column spacing, their source, and whether they are at the detector."""
    patient = _pair(dataset, "PixelSpacing", passed_over)
    receptors = {name: pair for name in _RECEPTOR if (pair := _pair(dataset, name, passed_over)) is not None}
    if patient is not None:
        if not receptors or code(dataset, "PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL"):
            return patient, "PixelSpacing", False
        ratios = [pair[0] / patient[0] for pair in receptors.values()]
        if all(abs(ratio - 1) > _SAME for ratio in ratios):
            if not all(1 < ratio <= _MAX_MAGNIFICATION for ratio in ratios):
                raise _UnknownError(f"PixelSpacing and {' and '.join(receptors)} contradict each other")
            return patient, "PixelSpacing", False
    if not receptors:
        raise _UnknownError
    first, last = next(iter(receptors.values())), list(receptors.values())[-1]
    if any(abs(one / other - 1) > _SAME for one, other in zip(first, last)):
        raise _UnknownError(f"{' and '.join(receptors)} contradict each other")
    name = "PixelSpacing" if patient is not None else next(iter(receptors))
    magnification, by = _magnification(dataset, passed_over)
    if magnification is None:
        return patient or first, name, True
    rows, columns = patient or first
    return (rows / magnification, columns / magnification), f"{name} / {by}", False


def _magnification(dataset: Dataset, passed_over: list[str]) -> tuple[float | None, str]:
    """How much larger things are at the detector than in the patient, None where the file does not say; and by what."""
    factor = _positive(dataset, _FACTOR, passed_over)
    detector, patient = (_positive(dataset, name, passed_over) for name in _DISTANCES)
    ratio = detector / patient if detector is not None and patient is not None else None
    is_usable = [value is not None and 1 <= value <= _MAX_MAGNIFICATION for value in (factor, ratio)]
    if factor is not None and not is_usable[0]:
        raise _UnknownError(f"{_FACTOR} is not between 1 and {_MAX_MAGNIFICATION:g}")
    if factor is None and ratio is not None and not is_usable[1]:
        raise _UnknownError(f"{' / '.join(_DISTANCES)} is not between 1 and {_MAX_MAGNIFICATION:g}")
    if factor is not None and ratio is not None and is_usable[1] and abs(ratio / factor - 1) > _DISAGREE:
        raise _UnknownError(f"{_FACTOR} and {' / '.join(_DISTANCES)} contradict each other")
    return (factor, _FACTOR) if factor is not None else (ratio, f"({' / '.join(_DISTANCES)})")


def _require_square(rows: float, columns: float, dataset: Dataset, passed_over: list[str]) -> None:
    if abs(rows - columns) > _SQUARE * rows:
        raise _UnknownError("pixels are not square")
    aspect = numbers(dataset, "PixelAspectRatio", passed_over)
    if len(aspect) == 2 and all(side > 0 for side in aspect) and abs(aspect[0] - aspect[1]) > _SQUARE * aspect[0]:
        raise _UnknownError("PixelAspectRatio says that pixels are not square, the spacing that they are")


def _pair(dataset: Dataset, name: str, passed_over: list[str]) -> Pair | None:
    values = numbers(dataset, name, passed_over)
    if values and (len(values) != 2 or min(values) < 0):
        pass_over(name, passed_over)
    return (values[0], values[1]) if len(values) == 2 and all(value > 0 for value in values) else None


def _positive(dataset: Dataset, name: str, passed_over: list[str]) -> float | None:
    value = number(dataset, name, passed_over)
    if value is not None and value < 0:
        pass_over(name, passed_over)
    return value if value is not None and value > 0 else None
