"""The grey scale pipeline of DICOM: stored values -> Modality -> VOI -> presentation (PS3.3 C.11, PS3.4 N.2).

Values stay integers where nothing but an inversion is to be done; otherwise they become float32. Each stage adds its
name to `applied`. An attribute that does not read is passed over; with a Modality stage that is left out go the windows
that count in its units.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ddpm_lmk.data.images.dicom_attributes import Attributes
from ddpm_lmk.data.images.image import RefusedImageError, check_information

if TYPE_CHECKING:
    from pydicom import Dataset

Range = tuple[float, float]
GREY_TAGS = (
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth"),
    *("VOILUTFunction", "PresentationLUTShape"),
)
PALETTE_TAGS = tuple(
    f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
)


def displayed(
    pixels: np.ndarray, attributes: Attributes, applied: list[str], *, voi: bool
) -> tuple[np.ndarray, Range, bool]:
    """What a viewer would show of stored `[H, W]`, black at the low end.

    Returns:
        The values, what is black and what is white, and whether the file's own grey window was applied.
    """
    values, full_range, has_units = _apply_modality(pixels, attributes, applied)
    windowed = _apply_voi(values, attributes) if voi and has_units else None
    if windowed is not None:
        values, full_range, stage = windowed
        applied.append(stage)
    # The shape INVERSE belongs to MONOCHROME1 (PS3.3 C.8.11.3.1.2): together they are one inversion, not two.
    is_negative = attributes.get("PhotometricInterpretation") == "MONOCHROME1"
    if is_negative or attributes.code("PresentationLUTShape") == "INVERSE":
        values = _invert(values, full_range)
        applied.append("inverted")
    return values, full_range, windowed is not None


def grey_of_palette(pixels: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, Range]:
    """Stored `[H, W]` through a palette whose colours are greys (PS3.3 C.7.6.3.1.5), and what is black and white.

    Raises:
        RefusedImageError: it has colours, or is not there: then the values are numbers of colours and no picture.
    """
    tables = [dataset.get(name) for name in PALETTE_TAGS]
    if any(table is None for table in tables):
        raise RefusedImageError("MODE", "a palette that is not in the file, so its values mean nothing")
    if not (tables[:2] == tables[2:4] == tables[4:]):
        raise RefusedImageError("MODE", "a palette of colours; only one of greys makes an x-ray")
    return _look_up(pixels, SimpleNamespace(LUTDescriptor=tables[0], LUTData=tables[1]), dataset)


def _apply_modality(pixels: np.ndarray, attributes: Attributes, applied: list[str]) -> tuple[np.ndarray, Range, bool]:
    """Values, their range, and whether they are in the units that the file's windows count in."""
    dataset = attributes.dataset
    low = -(1 << (dataset.BitsStored - 1)) if dataset.PixelRepresentation == 1 else 0
    full_range = (float(low), float(low + (1 << dataset.BitsStored) - 1))
    stored = pixels.astype(np.float32) if low < 0 else pixels
    if "ModalityLUTSequence" in attributes.passed_over:
        return stored, full_range, False
    if attributes.get("ModalityLUTSequence"):
        looked_up = _try_table(pixels, attributes, "ModalityLUTSequence")
        if looked_up is None:
            return stored, full_range, False
        applied.append("modality-lut")
        return *looked_up, True
    slope = attributes.number("RescaleSlope")
    if slope == 0:  # it would leave nothing
        attributes.pass_over("RescaleSlope")
    intercept = attributes.number("RescaleIntercept")
    if {"RescaleSlope", "RescaleIntercept"} & set(attributes.passed_over):
        return stored, full_range, False
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if (slope, intercept) == (1.0, 0.0):
        return stored, full_range, True
    applied.append("rescale")
    low_end, high_end = sorted(slope * end + intercept for end in full_range)  # a slope may be negative
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept), (low_end, high_end), True


def _apply_voi(values: np.ndarray, attributes: Attributes) -> tuple[np.ndarray, Range, str] | None:
    """Values through the file's first table, or window, that reads and leaves something to see, and what it was."""
    if attributes.get("VOILUTSequence") and (looked_up := _try_table(values, attributes, "VOILUTSequence")):
        if _is_informative(looked_up[0]):
            return *looked_up, "voi-lut"
        attributes.pass_over("VOILUTSequence")
    window = first_window(attributes)
    if window is None:
        return None
    windowed = apply_window(values, *window)
    if not _is_informative(windowed):
        attributes.pass_over("WindowCenter")
        return None
    return windowed, (0.0, 1.0), f"voi-{window[2].lower()}"


def _is_informative(values: np.ndarray) -> bool:
    try:
        check_information(values)
    except RefusedImageError:
        return False
    return True


def _try_table(values: np.ndarray, attributes: Attributes, name: str) -> tuple[np.ndarray, Range] | None:
    try:
        return _look_up(values, attributes.dataset[name].value[0], attributes.dataset)
    except MemoryError:
        raise
    except Exception:  # tags that are not there, not numbers, not as many as they say: whatever reading them raises
        attributes.pass_over(name)
        return None


def readable_table(attributes: Attributes, name: str) -> tuple[int, int, np.ndarray] | None:
    """The first table of a sequence: which value its first entry is of, the bits of an entry, and the entries uint16.

    None where there is none, or it does not read.
    """
    if not attributes.get(name) or _try_table(np.zeros((1, 1), np.int64), attributes, name) is None:
        return None
    first, depth, table = _table(attributes.dataset[name].value[0], attributes.dataset)
    return first, depth, table.astype(np.uint16)


def _look_up(values: np.ndarray, item: Dataset | SimpleNamespace, dataset: Dataset) -> tuple[np.ndarray, Range]:
    """Apply a table (PS3.3 C.11.1.1): values below its first entry take the first, above its last the last."""
    first, depth, table = _table(item, dataset)
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index].astype(np.uint16), (0.0, float((1 << depth) - 1))


def _table(item: Dataset | SimpleNamespace, dataset: Dataset) -> tuple[int, int, np.ndarray]:
    """Which value the first entry is of, the bits of an entry, and the entries; raises ValueError for a wrong table."""
    count, first, depth = (int(entry) for entry in item.LUTDescriptor)
    count = count or 1 << 16  # its field has 16 bits
    if not 8 <= depth <= 16:
        raise ValueError("entries of a look-up table have 8 to 16 bits")
    if dataset.PixelRepresentation == 1 and first >= 1 << 15:
        first -= 1 << 16  # written as US, meant as SS
    table = _table_entries(item.LUTData, count, is_little=bool(dataset.original_encoding[1]))
    depth = min(depth, 8 * table.itemsize)
    if table.max() >> depth:
        raise ValueError("entries of a look-up table have more bits than it says")
    return first, depth, table


def _table_entries(data: bytes | list[int], count: int, *, is_little: bool) -> np.ndarray:
    if isinstance(data, bytes):
        # entries of 8 bits may be packed, two in a word
        width = np.dtype(np.uint8) if len(data) < 2 * count else np.dtype("<u2" if is_little else ">u2")
        table = np.frombuffer(data, width)
    else:
        table = np.atleast_1d(np.asarray(data, np.uint16))
    if len(table) < count:
        raise ValueError("a look-up table is shorter than it says")
    return table[:count]


def first_window(attributes: Attributes) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window that can be applied."""
    centers, widths = attributes.numbers("WindowCenter"), attributes.numbers("WindowWidth")
    function = attributes.code("VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        attributes.pass_over("VOILUTFunction")
        return None
    smallest = 1.0 if function == "LINEAR" else 0.0  # LINEAR divides by width - 1
    for center, width in zip(centers, widths):
        if not math.isnan(center) and width > smallest:
            return center, width, function
    return None


def apply_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values through a window to float32 in [0, 1] (PS3.3 C.11.2.1.2.1, C.11.2.1.3)."""
    values = values.astype(np.float32)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80)))  # exp(89) is no float32
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _invert(values: np.ndarray, full_range: Range) -> np.ndarray:
    low, high = full_range
    if values.dtype.kind == "u":
        return np.clip(int(low) + int(high) - values.astype(np.int32), int(low), int(high)).astype(values.dtype)
    return np.float32(low + high) - values
