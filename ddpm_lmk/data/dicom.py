"""DICOM radiographs to films: which files are taken, and what of them is read.

Only the tags of `_TECHNICAL` are parsed at all. Names, dates, overlays and private tags are never looked at; of the
patient there is the id alone, which `ids` turns into a keyed hash before anything is written. Messages carry no value
of a file's text fields. The grey scale pipeline is in `dicom_grey`.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_lmk.data.decode import Film, ReadOptions, RefusedImageError, check_frame, check_shape, luma
from ddpm_lmk.data.dicom_grey import COLOURS, grey_of_palette, shown
from ddpm_lmk.errors import LaunchError

if TYPE_CHECKING:
    from pydicom import Dataset

_TECHNICAL = (
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration"),
    *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth"),
    *("VOILUTFunction", "PresentationLUTShape", "BurnedInAnnotation"),
    *(f"{colour}PaletteColorLookupTable{part}" for colour in COLOURS for part in ("Descriptor", "Data")),
)
_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_PATIENT = ("PatientID", "IssuerOfPatientID")  # hashed, never written

MODALITIES = frozenset({"CR", "DX", "MG", "IO", "PX", "RG"})
_STORAGE = "1.2.840.10008.5.1.4.1.1."
_RADIOGRAPHS = frozenset(_STORAGE + end for end in ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1"))
_SECONDARY_CAPTURE = _STORAGE + "7"  # how converted public sets label their films; the modality decides
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
    """By content: `DICM` after the preamble, or a first tag of group 0002 or 0008 where there is no preamble."""
    return data[128:132] == b"DICM" or (data[:4] in _FIRST_TAGS)


_FIRST_TAGS = {bytes([group, 0, element, 0]) for group in (2, 8) for element in (0, 1, 5, 8, 16, 18, 20, 22)}


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
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote values of the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so do its warnings
        try:
            import pydicom

            pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
            dataset = _parse(data)
            _check(dataset, options)
            return _film(dataset, options)
        except (RefusedImageError, MemoryError):
            raise
        except ModuleNotFoundError:
            raise RefusedImageError("NO_DECODER", f"a DICOM file; reading it {_DICOM_EXTRA}") from None
        except Exception as error:  # ten types are known, StopIteration among them
            # `from None`: the chain would hold values of the file
            raise RefusedImageError("BROKEN", f"a DICOM file that does not read ({type(error).__name__})") from None


def _parse(data: bytes) -> Dataset:
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    _refuse_deflated_bomb(data)
    dataset = dcmread(io.BytesIO(data), force=True, specific_tags=[*_TECHNICAL, *_PATIENT])
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


def _check(dataset: Dataset, options: ReadOptions) -> None:
    """Refuse everything that is not one frame of a radiograph whose pixels a decoder here can read."""
    storage = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    modality = dataset.get("Modality")
    if storage == _DICOMDIR:
        raise RefusedImageError("DICOMDIR", "a DICOMDIR, which is a list of files; give the folder of the files")
    if "PixelData" not in dataset or not dataset.get("Rows") or not dataset.get("Columns"):
        raise RefusedImageError("NOT_AN_IMAGE", "a DICOM file without an image")
    is_known = storage in _RADIOGRAPHS or (storage in ("", _SECONDARY_CAPTURE) and modality in MODALITIES)
    if not is_known or modality not in (None, "", *MODALITIES):
        # a modality is a code of the standard; anything else in that field may be text
        found = modality if isinstance(modality, str) and re.fullmatch("[A-Z]{2,16}", modality) else "unknown"
        wanted = ", ".join(sorted(MODALITIES))
        raise RefusedImageError("NOT_A_RADIOGRAPH", f"modality {found}, or no radiograph by its class; wanted {wanted}")
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES" and not options.allow_burned_in:
        raise RefusedImageError("BURNED_IN", "text is burned into the picture; --allow-burned-in takes it nevertheless")
    check_frame(int(dataset.get("NumberOfFrames") or 1), options.frame)
    check_shape(int(dataset.Columns), int(dataset.Rows))
    if dataset.BitsAllocated not in (8, 16) or not 1 < dataset.BitsStored <= dataset.BitsAllocated:
        raise RefusedImageError("MODE", f"{dataset.BitsStored} of {dataset.BitsAllocated} bits; wanted 8 or 16")
    _check_decoder(dataset)


def _check_decoder(dataset: Dataset) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RefusedImageError("NO_DECODER", "a transfer syntax that pydicom does not know") from None
    if not decoder.is_available:
        raise RefusedImageError("NO_DECODER", f"{syntax.name} {_EXTRA_FOR.get(syntax, _DICOM_EXTRA)}")
    if not syntax.is_encapsulated:
        _check_length(dataset)


def _check_length(dataset: Dataset) -> None:
    """Rows and columns may lie: uncompressed pixels say how many there are."""
    values = (
        dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1) * int(dataset.get("NumberOfFrames") or 1)
    )
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        values = values // 3 * 2
    wanted = values * dataset.BitsAllocated // 8
    if len(dataset.PixelData) not in (wanted, wanted + 1):
        raise RefusedImageError("BROKEN", f"{len(dataset.PixelData)} bytes of pixels, but the header says {wanted}")


def _film(dataset: Dataset, options: ReadOptions) -> Film:
    pixels = _stored_pixels(dataset, options.frame)
    facts: dict[str, Any] = {"format": "DICOM", "bits": int(dataset.BitsStored), "applied": []}
    if dataset.get("Modality") in MODALITIES:
        facts["modality"] = str(dataset.Modality)
    spacing = _spacing(dataset, facts)
    patient = "\0".join(str(dataset.get(name) or "").strip() for name in _PATIENT).strip("\0") or None
    if pixels.ndim == 3:
        return Film(luma(pixels), facts, mm_per_px=spacing, patient=patient)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        facts["applied"].append("palette")
        values, full_range = grey_of_palette(pixels, dataset)
        return Film(values, facts, full_range, mm_per_px=spacing, patient=patient)
    values, full_range, is_windowed = shown(pixels, dataset, facts["applied"], voi=options.voi)
    return Film(values, facts, full_range, is_windowed, spacing, patient)


def _stored_pixels(dataset: Dataset, frame: int | None) -> np.ndarray:
    """`[H, W]` as stored, or `[H, W, 3]` uint8 in RGB."""
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        pixels = pixel_array(dataset, index=frame or 0, raw=False)
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
    is_colour = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if pixels.shape[:2] != (dataset.Rows, dataset.Columns) or not (pixels.ndim == 2 or is_colour):
        raise RefusedImageError("BROKEN", f"pixels of shape {pixels.shape}, which is not what the header says")
    if pixels.ndim == 2 and dataset.PhotometricInterpretation not in _ONE_SAMPLE:
        raise RefusedImageError("MODE", f"one sample per pixel that is none of {', '.join(_ONE_SAMPLE)}")
    return pixels


def _spacing(dataset: Dataset, facts: dict[str, Any]) -> float | None:
    """Millimetres per pixel: PixelSpacing, which may be calibrated, before ImagerPixelSpacing, at the detector.

    None where there is neither, where it is not a length ([0, 0] is common), or where pixels are not square.
    """
    for tag in ("PixelSpacing", "ImagerPixelSpacing"):
        try:
            rows, columns = (float(value) for value in dataset.get(tag) or (0, 0))
        except (TypeError, ValueError):
            continue
        if not (math.isfinite(rows) and math.isfinite(columns) and min(rows, columns) > 0):
            continue
        if abs(rows - columns) > 0.001 * rows:
            facts["spacing"] = f"{tag} is not square"
            return None
        facts["spacing"] = tag
        return rows
    return None
