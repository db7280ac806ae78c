"""DICOM radiographs to films: which files are taken, and what of them is read.

Only the tags of `_READ` are parsed at all. Names, dates, overlays and private tags are never looked at; of the
patient there is the id alone, which `ids` turns into a keyed hash before anything is written. Messages carry no value
of a file's text fields. Beside good pixels, an optional attribute that does not read is passed over and named in the
facts. The grey scale pipeline is in `dicom_grey`, millimetres are in `dicom_spacing`.

The grey scale pipeline of DICOM: stored values -> Modality -> VOI -> presentation (PS3.3 C.11, PS3.4 N.2).

Values stay integers where nothing but an inversion is to be done; otherwise they become float32. The list `applied` of
the facts records each stage, `passed_over` each attribute of a stage that does not read; with a Modality stage that is
left out go the windows that count in its units. Files and tags are `dicom`'s.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ddpm_lmk.data.images.decode import (
    Film,
    ReadOptions,
    RefusedImageError,
    check_frame,
    check_information,
    check_shape,
    luma,
)
from ddpm_lmk.data.images.dicom_spacing import (
    SPACING_TAGS,
    code,
    number,
    numbers,
    pass_over,
    pass_over_malformed,
    spacing,
)
from ddpm_lmk.data.sources.ids import is_nobody
from ddpm_lmk.errors import LaunchError

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


T = TypeVar("T")

_REQUIRED = {  # without these there are no pixels (PS3.3 C.7.6.3)
    **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation"), int),
    "PhotometricInterpretation": str,
}
_OPTIONAL = (
    *("SOPClassUID", "Modality", "NumberOfFrames", "PlanarConfiguration", "HighBit", "BurnedInAnnotation"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape", *SPACING_TAGS),
    *(f"{colour}PaletteColorLookupTable{part}" for colour in COLOURS for part in ("Descriptor", "Data")),
)
_OVERLAY_BITS = tuple(0x60000102 + 0x20000 * overlay for overlay in range(16))  # where in the pixels an overlay lies
_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_PATIENT = "PatientID"  # hashed, never written
_READ: tuple[str | int, ...] = (*_REQUIRED, *_OPTIONAL, _PATIENT, *_OVERLAY_BITS, "PixelData")

MODALITIES = frozenset({"CR", "DX", "MG", "IO", "PX", "RG"})
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_RADIOGRAPHS = frozenset(_STORAGE + end for end in ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1"))
_STANDARD = "1.2.840.10008."
_SECONDARY_CAPTURE = tuple(_STORAGE + "7" + end for end in ("", ".2", ".3", ".4"))  # single frame; grey, grey, colour
_DICOMDIR = "1.2.840.10008.1.3.10"

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MAX_INFLATED = 64 << 20
_META_BEGIN = 132  # after the preamble and `DICM`
_GPL = (
    "needs a decoder that is not installed: pip install 'ddpm-lmk[dicom-gpl]' (pylibjpeg-libjpeg, under GPL-3.0), or "
    "convert the file, e.g. with gdcmconv --raw"
)
_DICOM_EXTRA = "needs a decoder that is not installed: pip install 'ddpm-lmk[dicom]'"
_EXTRA_FOR = {
    "1.2.840.10008.1.2.4.51": "may have 12 bits, which no decoder here reads: convert it, e.g. with gdcmconv --raw",
    "1.2.840.10008.1.2.4.57": _GPL,  # JPEG Lossless
    "1.2.840.10008.1.2.4.70": _GPL,
    "1.2.840.10008.1.2.4.80": _GPL,  # JPEG-LS
    "1.2.840.10008.1.2.4.81": _GPL,
}


def is_dicom(data: bytes) -> bool:
    """By content: `DICM` after the preamble or without one, or a first tag of group 0002 or 0008 where it is absent."""
    return data[128:132] == b"DICM" or data[:4] == b"DICM" or data[:4] in _FIRST_TAGS


_FIRST_ELEMENTS = (0x00, 0x01, 0x05, 0x08, 0x10, 0x12, 0x14, 0x16, 0x18, 0x20)
_FIRST_TAGS = {bytes([group, 0, element, 0]) for group in (2, 8) for element in _FIRST_ELEMENTS}


def require_pydicom() -> None:
    """Raise LaunchError, naming the extra, where pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise LaunchError(
            "DICOM files are read with pydicom, which is not here: pip install 'ddpm-lmk[dicom]'"
        ) from error


def read_dicom(data: bytes, options: ReadOptions) -> Film:
    """Decode one radiograph.

    Raises:
        RefusedImageError: no radiograph, text burned in, several frames, a missing decoder, or a broken file.
    """
    return _read(data, options, _film)


def read_spacing(data: bytes, options: ReadOptions) -> tuple[float | None, tuple[int, int]]:
    """Millimetres per pixel of one radiograph, None where unknown, and its width and height; raises as `read_dicom`."""
    return _read(data, options, lambda dataset, _, facts: (_spacing(dataset, facts), (dataset.Columns, dataset.Rows)))


def _read(data: bytes, options: ReadOptions, read: Callable[[Dataset, ReadOptions, dict[str, Any]], T]) -> T:
    """What `read` makes of a parsed and checked file."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote values of the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so do its warnings
        try:
            import pydicom

            pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
            dataset = _parse(data)
            facts: dict[str, Any] = {"format": "DICOM", "applied": [], "passed_over": []}
            pass_over_malformed(dataset, [*_OPTIONAL, _PATIENT], facts["passed_over"])
            _check(dataset, options, facts)
            return read(dataset, options, facts)
        except (RefusedImageError, MemoryError):
            raise
        except ModuleNotFoundError:
            raise RefusedImageError("NO_DECODER", f"a DICOM file; reading it {_DICOM_EXTRA}") from None
        except Exception as error:  # ten types are known, StopIteration among them
            # `from None`: the chain would hold values of the file
            raise RefusedImageError("BROKEN", f"a DICOM file that does not read ({type(error).__name__})") from None


def _parse(data: bytes) -> Dataset:
    from pydicom import dcmread
    from pydicom.tag import Tag
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if data[:4] == b"DICM":
        data = bytes(128) + data
    _refuse_deflated_bomb(data)
    dataset = dcmread(io.BytesIO(data), force=True, specific_tags=[Tag(name) for name in _READ])
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


def _refuse_deflated_bomb(data: bytes) -> None:
    """Inflate with a limit what pydicom would inflate without one."""
    meta = re.match(rb"\x02\x00\x00\x00UL\x04\x00(.{4})", data[_META_BEGIN : _META_BEGIN + 12], re.DOTALL)
    begin = _META_BEGIN + 12 + int.from_bytes(meta[1], "little") if meta else _META_BEGIN + 1024
    if data[128:132] != b"DICM" or _DEFLATED not in data[:begin]:
        return
    if meta is None or begin > len(data):
        raise RefusedImageError("BROKEN", "a deflated DICOM file whose header has no valid length")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(data[begin:], _MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise RefusedImageError("BOMB", f"a deflated DICOM file that expands to more than {_MAX_INFLATED >> 20} MiB")


def _check(dataset: Dataset, options: ReadOptions, facts: dict[str, Any]) -> None:
    """Refuse everything that is not one frame of a radiograph whose pixels a decoder here can read."""
    _check_kind(dataset)
    if code(dataset, "BurnedInAnnotation") == "YES" and not options.allow_burned_in:
        raise RefusedImageError("BURNED_IN", "text is burned into the picture; --allow-burned-in takes it nevertheless")
    missing = [name for name, kind in _REQUIRED.items() if not isinstance(dataset.get(name), kind)]
    if missing:
        raise RefusedImageError("BROKEN", f"a DICOM file whose header lacks {', '.join(missing)}")
    dataset.PhotometricInterpretation = code(dataset, "PhotometricInterpretation")
    check_frame(_frames(dataset, facts["passed_over"]), options.frame)
    check_shape(int(dataset.Columns), int(dataset.Rows))
    if dataset.BitsAllocated not in (8, 16) or not 1 < dataset.BitsStored <= dataset.BitsAllocated:
        raise RefusedImageError("MODE", f"{dataset.BitsStored} of {dataset.BitsAllocated} bits; wanted 8 or 16")
    _check_decoder(dataset)
    if dataset.SamplesPerPixel > 1 and dataset.get("PlanarConfiguration") not in (0, 1):
        if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            raise RefusedImageError("BROKEN", "a DICOM file whose header does not say how its colours lie")
        dataset.PlanarConfiguration = 0  # of compressed colours the codec knows it


def _check_kind(dataset: Dataset) -> None:
    """Take what is a radiograph by its class, or by its modality where the class does not tell.

    Secondary capture is how converted public sets and digitised films are labelled; private classes are older cassette
    readers'.
    """
    storage = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if storage == _DICOMDIR:
        raise RefusedImageError("DICOMDIR", "a DICOMDIR, which is a list of files; give the folder of the files")
    if "PixelData" not in dataset or not dataset.get("Rows") or not dataset.get("Columns"):
        raise RefusedImageError("NOT_AN_IMAGE", "a DICOM file without an image")
    modality, wanted = code(dataset, "Modality"), ", ".join(sorted(MODALITIES))
    if modality and modality not in MODALITIES:
        # a modality is a code of the standard; anything else in that field may be text
        found = modality if re.fullmatch("[A-Z]{2,16}", modality) else "unknown"
        raise RefusedImageError("NOT_A_RADIOGRAPH", f"modality {found}; wanted {wanted}")
    if storage in _RADIOGRAPHS:
        return
    if storage in _SECONDARY_CAPTURE or not storage.startswith(_STANDARD):
        if not modality:
            raise RefusedImageError("NOT_A_RADIOGRAPH", f"neither class nor modality says radiograph; wanted {wanted}")
        return
    raise RefusedImageError("NOT_A_RADIOGRAPH", f"modality {modality or 'unknown'}, but stored as {_name_of(storage)}")


def _name_of(storage: str) -> str:
    from pydicom.uid import UID

    name = UID(storage).name
    return f"{name}, which is no radiograph" if name != storage else "a class that is not known"


def _frames(dataset: Dataset, passed_over: list[str]) -> int:
    """How many frames there are; a number that is none, or 0, is taken out of the decoder's way."""
    found = dataset.get("NumberOfFrames")
    if isinstance(found, int) and found > 0:
        return found
    if found is not None:
        del dataset["NumberOfFrames"]
        pass_over("NumberOfFrames", passed_over)
    return 1


def _check_decoder(dataset: Dataset) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RefusedImageError(
            "NO_DECODER", "a private or unknown transfer syntax; convert the file, e.g. with gdcmconv --raw"
        ) from None
    if not decoder.is_available:
        raise RefusedImageError("NO_DECODER", f"{syntax.name} {_EXTRA_FOR.get(syntax, _DICOM_EXTRA)}")
    if not syntax.is_encapsulated:
        _check_length(dataset)


def _check_length(dataset: Dataset) -> None:
    """Rows and columns may lie: uncompressed pixels say how many there are."""
    values = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * int(dataset.get("NumberOfFrames") or 1)
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        values = values // 3 * 2
    wanted = values * dataset.BitsAllocated // 8
    if len(dataset.PixelData) not in (wanted, wanted + 1):
        raise RefusedImageError("BROKEN", f"{len(dataset.PixelData)} bytes of pixels, but the header says {wanted}")


def _film(dataset: Dataset, options: ReadOptions, facts: dict[str, Any]) -> Film:
    pixels = _stored_pixels(dataset, options.frame)
    facts["bits"] = int(dataset.BitsStored)
    if (modality := code(dataset, "Modality")) in MODALITIES:
        facts["modality"] = modality
    mm_per_px = _spacing(dataset, facts)
    told = str(dataset.get(_PATIENT) or "").strip()
    patient = None if is_nobody(told) else told
    if pixels.ndim == 3:
        return Film(luma(pixels), facts, (0.0, float((1 << facts["bits"]) - 1)), mm_per_px=mm_per_px, patient=patient)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        facts["applied"].append("palette")
        values, full_range = grey_of_palette(pixels, dataset)
        return Film(values, facts, full_range, mm_per_px=mm_per_px, patient=patient)
    values, full_range, is_windowed = shown(pixels, dataset, facts, voi=options.voi)
    return Film(values, facts, full_range, is_windowed, mm_per_px, patient)


def _spacing(dataset: Dataset, facts: dict[str, Any]) -> float | None:
    mm_per_px, said = spacing(dataset, facts["passed_over"])
    if said is not None:
        facts["spacing"] = said
    return mm_per_px


def _stored_pixels(dataset: Dataset, frame: int | None) -> np.ndarray:
    """`[H, W]` as stored, or `[H, W, 3]` in RGB."""
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        pixels = pixel_array(dataset, index=frame or 0, raw=False, correct_unused_bits=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever the plugins raise
        if not syntax.is_encapsulated:
            raise
        hint = _EXTRA_FOR.get(syntax)
        more = f"; if it is not damaged, it {hint}" if hint else ""
        raise RefusedImageError(
            "BROKEN", f"{syntax.name} pixels do not decode ({type(error).__name__}){more}"
        ) from None
    is_colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.shape[:2] != (dataset.Rows, dataset.Columns) or not (pixels.ndim == 2 or is_colour):
        raise RefusedImageError("BROKEN", f"pixels of shape {pixels.shape}, which is not what the header says")
    if is_colour and pixels.dtype.kind != "u":
        raise RefusedImageError("MODE", "signed colours")
    if pixels.ndim == 2 and dataset.PhotometricInterpretation not in _ONE_SAMPLE:
        raise RefusedImageError("MODE", f"one sample per pixel that is none of {', '.join(_ONE_SAMPLE)}")
    return _used_bits(pixels, dataset)


def _used_bits(pixels: np.ndarray, dataset: Dataset) -> np.ndarray:
    """The bits that BitsStored and HighBit say are the value's (PS3.5 8.1.1); what they hide must be no picture.

    Raises:
        RefusedImageError: bits outside of them vary from pixel to pixel and are no overlay: the header is wrong, and
            masked values would wrap round.
    """
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if stored == allocated:
        return pixels
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    bits = pixels.view(f"u{pixels.dtype.itemsize}")
    lowest = _lowest_bit(bits, dataset)
    above, below = bits >> (lowest + stored), bits & ((1 << lowest) - 1)
    value = bits << (allocated - lowest - stored)
    value = value.view(pixels.dtype) >> (allocated - stored)  # arithmetic: the sign is carried up
    is_extended = pixels.dtype.kind == "i" and not lowest and np.array_equal(value, pixels)
    has_overlay = any(tag in dataset for tag in _OVERLAY_BITS)
    if not (is_extended or has_overlay) and (np.ptp(above) or np.ptp(below)):
        raise RefusedImageError(
            "MODE", f"values use more than the {stored} bits that the header says are stored; correct BitsStored"
        )
    return value


def _lowest_bit(bits: np.ndarray, dataset: Dataset) -> int:
    """0, or where values begin that are aligned to another HighBit, as files before 2008 may have it."""
    high, stored = dataset.get("HighBit"), int(dataset.BitsStored)
    if not isinstance(high, int) or not stored <= high < dataset.BitsAllocated:
        return 0
    lowest = high + 1 - stored
    is_wrong = np.ptp(bits & ((1 << lowest) - 1)) > 0 and bits.max() >> stored == 0
    return 0 if is_wrong else lowest
