"""The grey scale pipeline of DICOM: stored values -> Modality -> VOI -> presentation (PS3.3 C.11, PS3.4 N.2).

Values stay integers where nothing but an inversion is to be done; otherwise they become float32. The `applied` list
records each stage. Files and tags are `dicom`'s.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ddpm_lmk.data.decode import RefusedImageError

if TYPE_CHECKING:
    from pydicom import Dataset

Range = tuple[float, float]
COLOURS = ("Red", "Green", "Blue")
_PARTS = ("Descriptor", "Data")


def shown(pixels: np.ndarray, dataset: Dataset, applied: list[str], *, voi: bool) -> tuple[np.ndarray, Range, bool]:
    """What a viewer would show of stored `[H, W]`, black at the low end.

    Returns:
        The values, what is black and what is white, and whether the file's own grey window was applied.
    """
    values, full_range = _modality(pixels, dataset, applied)
    is_windowed = False
    if voi and dataset.get("VOILUTSequence"):
        values, full_range = _looked_up(values, dataset.VOILUTSequence[0], dataset)
        applied.append("voi-lut")
        is_windowed = True
    elif voi and (window := _window(dataset)) is not None:
        values, full_range = windowed(values, *window), (0.0, 1.0)
        applied.append(f"voi-{window[2].lower()}")
        is_windowed = True
    # The shape INVERSE belongs to MONOCHROME1 (PS3.3 C.8.11.3.1.2): together they are one inversion, not two.
    if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        values = _inverted(values, full_range)
        applied.append("inverted")
    return values, full_range, is_windowed


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


def _modality(pixels: np.ndarray, dataset: Dataset, applied: list[str]) -> tuple[np.ndarray, Range]:
    values, low = pixels, 0
    if dataset.PixelRepresentation == 1:
        low = -(1 << (dataset.BitsStored - 1))
    full_range = (float(low), float(low + (1 << dataset.BitsStored) - 1))
    slope, intercept = (float(dataset.get(name) or default) for name, default in _RESCALE)
    if dataset.get("ModalityLUTSequence"):
        applied.append("modality-lut")
        return _looked_up(values, dataset.ModalityLUTSequence[0], dataset)
    if (slope, intercept) != (1.0, 0.0):
        applied.append("rescale")
        low_end, high_end = (slope * end + intercept for end in full_range)
        return values.astype(np.float32) * np.float32(slope) + np.float32(intercept), _ascending(low_end, high_end)
    if low < 0:
        return values.astype(np.float32), full_range
    return values, full_range


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _ascending(first: float, second: float) -> Range:
    return min(first, second), max(first, second)


def _looked_up(values: np.ndarray, item: Dataset | SimpleNamespace, dataset: Dataset) -> tuple[np.ndarray, Range]:
    """Apply a table (PS3.3 C.11.1.1): values below its first entry take the first, above its last the last."""
    count, first, depth = (int(number) for number in item.LUTDescriptor)
    count = count or 1 << 16
    if dataset.PixelRepresentation == 1 and first >= 1 << 15:
        first -= 1 << 16
    table = _table(item.LUTData, count, is_little=bool(dataset.original_encoding[1]))
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


def _window(dataset: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window that can be applied."""
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return None
    center, width = (float(np.atleast_1d(np.asarray(value, np.float64))[0]) for value in (center, width))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    smallest = 1.0 if function == "LINEAR" else 0.0
    is_usable = function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") and np.isfinite([center, width]).all()
    return (center, width, function) if is_usable and width > smallest else None


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
