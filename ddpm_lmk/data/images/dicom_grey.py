"""The grey scale pipeline of DICOM: stored values -> Modality -> VOI -> presentation (PS3.3 C.11, PS3.4 N.2).

Values stay integers where nothing but an inversion is to be done; otherwise they become float32. The list `applied` of
the facts records each stage, `passed_over` each attribute of a stage that does not read; with a Modality stage that is
left out go the windows that count in its units. Files and tags are `dicom`'s.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_lmk.data.images.decode import RefusedImageError, check_information
from ddpm_lmk.data.images.dicom_values import code, number, numbers, pass_over

if TYPE_CHECKING:
    from pydicom import Dataset

Range = tuple[float, float]
COLOURS = ("Red", "Green", "Blue")
_PARTS = ("Descriptor", "Data")


def shown(pixels: np.ndarray, dataset: Dataset, facts: dict[str, Any], *, voi: bool) -> tuple[np.ndarray, Range, bool]:
    """What a viewer would show of stored `[H, W]`, black at the low end.

    Returns:
        The values, what is black and what is white, and whether the file's own grey window was applied.
    """
    applied, passed_over = facts["applied"], facts["passed_over"]
    values, full_range, is_sound = _modality(pixels, dataset, applied, passed_over)
    chosen = _voi(values, dataset, passed_over) if voi and is_sound else None
    if chosen is not None:
        values, full_range, stage = chosen
        applied.append(stage)
    # The shape INVERSE belongs to MONOCHROME1 (PS3.3 C.8.11.3.1.2): together they are one inversion, not two.
    if dataset.PhotometricInterpretation == "MONOCHROME1" or code(dataset, "PresentationLUTShape") == "INVERSE":
        values = _inverted(values, full_range)
        applied.append("inverted")
    return values, full_range, chosen is not None


def grey_of_palette(pixels: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, Range]:
    """Stored `[H, W]` through a palette whose colours are greys (PS3.3 C.7.6.3.1.5), and what is black and white.

    Raises:
        RefusedImageError: it has colours, or is not there: then the values are numbers of colours and no picture.
    """
    tables = [dataset.get(f"{colour}PaletteColorLookupTable{part}") for part in _PARTS for colour in COLOURS]
    if any(table is None for table in tables):
        raise RefusedImageError("MODE", "a palette that is not in the file, so its values mean nothing")
    if not (tables[0] == tables[1] == tables[2] and tables[3] == tables[4] == tables[5]):
        raise RefusedImageError("MODE", "a palette of colours; only one of greys makes an x-ray")
    item = SimpleNamespace(LUTDescriptor=tables[0], LUTData=tables[3])
    return _looked_up(pixels, item, dataset)


def _modality(
    pixels: np.ndarray, dataset: Dataset, applied: list[str], passed_over: list[str]
) -> tuple[np.ndarray, Range, bool]:
    """Values, their range, and whether they are in the units that the file's windows count in."""
    low = -(1 << (dataset.BitsStored - 1)) if dataset.PixelRepresentation == 1 else 0
    full_range = (float(low), float(low + (1 << dataset.BitsStored) - 1))
    kept = pixels.astype(np.float32) if low < 0 else pixels
    if "ModalityLUTSequence" in passed_over:
        return kept, full_range, False
    if dataset.get("ModalityLUTSequence"):
        found = _table_applied(pixels, dataset, "ModalityLUTSequence", passed_over)
        if found is None:
            return kept, full_range, False
        applied.append("modality-lut")
        return *found, True
    slope, intercept = (_rescaling(dataset, name, default, passed_over) for name, default in _RESCALE)
    if slope is None or intercept is None:
        return kept, full_range, False
    if (slope, intercept) == (1.0, 0.0):
        return kept, full_range, True
    applied.append("rescale")
    ends = sorted(slope * end + intercept for end in full_range)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept), (ends[0], ends[1]), True


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _rescaling(dataset: Dataset, name: str, default: float, passed_over: list[str]) -> float | None:
    """A factor or summand, the default where it is absent, None where it does not read."""
    value = number(dataset, name, passed_over)
    if value == 0 and default:  # a slope that would leave nothing
        pass_over(name, passed_over)
    if name in passed_over:
        return None
    return default if value is None else value


def _voi(values: np.ndarray, dataset: Dataset, passed_over: list[str]) -> tuple[np.ndarray, Range, str] | None:
    """Values through the file's first table, or window, that reads and leaves something to see."""
    if dataset.get("VOILUTSequence") and (found := _table_applied(values, dataset, "VOILUTSequence", passed_over)):
        if _is_informative(found[0]):
            return *found, "voi-lut"
        pass_over("VOILUTSequence", passed_over)
    window = _window(dataset, passed_over)
    if window is None:
        return None
    through = windowed(values, *window)
    if not _is_informative(through):
        pass_over("WindowCenter", passed_over)
        return None
    return through, (0.0, 1.0), f"voi-{window[2].lower()}"


def _is_informative(values: np.ndarray) -> bool:
    try:
        check_information(values)
    except RefusedImageError:
        return False
    return True


def _table_applied(
    values: np.ndarray, dataset: Dataset, name: str, passed_over: list[str]
) -> tuple[np.ndarray, Range] | None:
    try:
        return _looked_up(values, dataset[name].value[0], dataset)
    except MemoryError:
        raise
    except Exception:  # tags that are not there, not numbers, not as many as they say: whatever reading them raises
        pass_over(name, passed_over)
        return None


def _looked_up(values: np.ndarray, item: Dataset | SimpleNamespace, dataset: Dataset) -> tuple[np.ndarray, Range]:
    """Apply a table (PS3.3 C.11.1.1): values below its first entry take the first, above its last the last."""
    count, first, depth = (int(entry) for entry in item.LUTDescriptor)
    count = count or 1 << 16
    if not 8 <= depth <= 16:
        raise ValueError("entries of a look-up table have 8 to 16 bits")
    if dataset.PixelRepresentation == 1 and first >= 1 << 15:
        first -= 1 << 16
    table = _table(item.LUTData, count, is_little=bool(dataset.original_encoding[1]))
    depth = min(depth, 8 * table.itemsize)
    if table.max() >> depth:
        raise ValueError("entries of a look-up table have more bits than it says")
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    return table[index].astype(np.uint16), (0.0, float((1 << depth) - 1))


def _table(data: bytes | list[int], count: int, *, is_little: bool) -> np.ndarray:
    if isinstance(data, bytes):
        # entries of 8 bits may be packed, two in a word
        width = np.dtype(np.uint8) if len(data) < 2 * count else np.dtype("<u2" if is_little else ">u2")
        table = np.frombuffer(data, width)
    else:
        table = np.atleast_1d(np.asarray(data, np.uint16))
    if len(table) < count:
        raise ValueError("a look-up table is shorter than it says")
    return table[:count]


def _window(dataset: Dataset, passed_over: list[str]) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window that can be applied."""
    centers, widths = (numbers(dataset, name, passed_over) for name in ("WindowCenter", "WindowWidth"))
    function = code(dataset, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        pass_over("VOILUTFunction", passed_over)
        return None
    smallest = 1.0 if function == "LINEAR" else 0.0
    usable = ((center, width) for center, width in zip(centers, widths) if not math.isnan(center) and width > smallest)
    return next(((center, width, function) for center, width in usable), None)


def windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values through a window to float32 in [0, 1] (PS3.3 C.11.2.1.2.1, C.11.2.1.3)."""
    values = values.astype(np.float32)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _inverted(values: np.ndarray, full_range: Range) -> np.ndarray:
    low, high = full_range
    if values.dtype.kind == "u":
        return np.clip(int(low) + int(high) - values.astype(np.int32), int(low), int(high)).astype(values.dtype)
    return np.float32(low + high) - values
