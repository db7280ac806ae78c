"""DICOM radiographs to grey pixels: which files are taken, and what of them is read.

Only the tags of `_READ` are parsed at all. Names, dates, overlays and private tags are never looked at; of the patient
there is the id alone, which `sources.ids` turns into a keyed hash before anything is written. Messages carry no value
of a file's text fields. The grey scale pipeline is in `dicom_grey`, millimetres are in `dicom_spacing`.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_lmk.data.images.dicom_attributes import Attributes
from ddpm_lmk.data.images.dicom_grey import GREY_TAGS, PALETTE_TAGS, displayed, grey_of_palette
from ddpm_lmk.data.images.dicom_spacing import SPACING_TAGS, spacing
from ddpm_lmk.data.images.image import (
    DecodedImage,
    ReadOptions,
    RefusedImageError,
    check_frame,
    check_shape,
    luma,
)
from ddpm_lmk.data.sources.ids import is_nobody
from ddpm_lmk.errors import LaunchError

if TYPE_CHECKING:
    from pydicom import Dataset

_REQUIRED = {  # without these there are no pixels (PS3.3 C.7.6.3)
    **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation"), int),
    "PhotometricInterpretation": str,
}
_OPTIONAL = (
    *("SOPClassUID", "Modality", "NumberOfFrames", "PlanarConfiguration", "HighBit", "BurnedInAnnotation"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", *GREY_TAGS, *SPACING_TAGS, *PALETTE_TAGS),
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
}
# The first element of a file without header: of group 0002 or 0008, little endian.
_FIRST_ELEMENTS = (0x00, 0x01, 0x05, 0x08, 0x10, 0x12, 0x14, 0x16, 0x18, 0x20)
_FIRST_TAGS = {bytes([group, 0, element, 0]) for group in (2, 8) for element in _FIRST_ELEMENTS}


def is_dicom(data: bytes) -> bool:
    """By content: `DICM` after the preamble or without one, or a first tag of group 0002 or 0008 where it is absent."""
    return data[128:132] == b"DICM" or data[:4] == b"DICM" or data[:4] in _FIRST_TAGS


def require_pydicom() -> None:
    """Raise LaunchError, naming the extra, where pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ModuleNotFoundError as error:
        raise LaunchError(
            "DICOM files are read with pydicom, which is not here: pip install 'ddpm-lmk[dicom]'"
        ) from error


def read_dicom(data: bytes, options: ReadOptions) -> DecodedImage:
    """Decode one radiograph.

    Raises:
        RefusedImageError: no radiograph, text burned in, several frames, a missing decoder, or a broken file.
    """
    with _radiograph(data, options) as attributes:
        return _decode(attributes, options)


def read_spacing(data: bytes, options: ReadOptions) -> tuple[float | None, tuple[int, int]]:
    """Millimetres per pixel of one radiograph, None where unknown, and its width and height; raises as `read_dicom`."""
    with _radiograph(data, options) as attributes:
        return spacing(attributes)[0], (attributes.dataset.Columns, attributes.dataset.Rows)


def read_header(data: bytes, names: Sequence[str]) -> Attributes:
    """The attributes `names` of a file whose pixels read; `dataset` lacks those that are absent or malformed.

    Raises:
        RefusedImageError: a broken file.
    """
    with _refusing():
        attributes = Attributes(_parse(data, names))
        attributes.remove_malformed(names)
        return attributes


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what pydicom and highdicom log and warn of: it quotes values of files."""
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever reading a file raises becomes a RefusedImageError."""
    with quiet():
        try:
            import pydicom

            pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
            yield
        except (RefusedImageError, MemoryError):
            raise
        except ModuleNotFoundError:
            raise RefusedImageError("NO_DECODER", f"a DICOM file; reading it {_DICOM_EXTRA}") from None
        except Exception as error:  # ten types are known, StopIteration among them
            # `from None`: the chain would hold values of the file
            raise RefusedImageError("BROKEN", f"a DICOM file that does not read ({type(error).__name__})") from None


@contextmanager
def _radiograph(data: bytes, options: ReadOptions) -> Iterator[Attributes]:
    """The attributes of a checked file. Whatever reading them raises becomes a RefusedImageError."""
    with _refusing():
        attributes = Attributes(_parse(data, _READ))
        attributes.remove_malformed([*_OPTIONAL, _PATIENT])
        _check(attributes, options)
        yield attributes


def _parse(data: bytes, names: Sequence[str | int]) -> Dataset:
    from pydicom import dcmread
    from pydicom.tag import Tag
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if data[:4] == b"DICM":
        data = bytes(128) + data
    _refuse_deflated_bomb(data)
    dataset = dcmread(io.BytesIO(data), force=True, specific_tags=[Tag(name) for name in names])
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


def _check(attributes: Attributes, options: ReadOptions) -> None:
    """Refuse everything that is not one frame of a radiograph whose pixels a decoder here can read."""
    dataset = attributes.dataset
    _check_kind(attributes)
    if attributes.code("BurnedInAnnotation") == "YES" and not options.allow_burned_in:
        raise RefusedImageError("BURNED_IN", "text is burned into the picture; --allow-burned-in takes it nevertheless")
    missing = [name for name, kind in _REQUIRED.items() if not isinstance(dataset.get(name), kind)]
    if missing:
        raise RefusedImageError("BROKEN", f"a DICOM file whose header lacks {', '.join(missing)}")
    dataset.PhotometricInterpretation = attributes.code("PhotometricInterpretation")
    check_frame(_frames(attributes), options.frame)
    check_shape(int(dataset.Columns), int(dataset.Rows))
    if dataset.BitsAllocated not in (8, 16) or not 1 < dataset.BitsStored <= dataset.BitsAllocated:
        raise RefusedImageError("MODE", f"{dataset.BitsStored} of {dataset.BitsAllocated} bits; wanted 8 or 16")
    _check_decoder(dataset)
    if dataset.SamplesPerPixel > 1 and dataset.get("PlanarConfiguration") not in (0, 1):
        if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            raise RefusedImageError("BROKEN", "a DICOM file whose header does not say how its colours lie")
        dataset.PlanarConfiguration = 0  # of compressed colours the codec knows it


def _check_kind(attributes: Attributes) -> None:
    """Take what is a radiograph by its class, or by its modality where the class does not tell."""
    dataset = attributes.dataset
    storage = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if storage == _DICOMDIR:
        raise RefusedImageError("DICOMDIR", "a DICOMDIR, which is a list of files; give the folder of the files")
    if "PixelData" not in dataset or not dataset.get("Rows") or not dataset.get("Columns"):
        raise RefusedImageError("NOT_AN_IMAGE", "a DICOM file without an image")
    modality, wanted = attributes.code("Modality"), ", ".join(sorted(MODALITIES))
    if modality and modality not in MODALITIES:
        # a modality is a code of the standard; anything else in that field may be text
        shown = modality if re.fullmatch("[A-Z]{2,16}", modality) else "unknown"
        raise RefusedImageError("NOT_A_RADIOGRAPH", f"modality {shown}; wanted {wanted}")
    if storage in _RADIOGRAPHS:
        return
    # Secondary capture is how converted public sets and digitised films are labelled; private classes are those of
    # older cassette readers.
    if storage not in _SECONDARY_CAPTURE and storage.startswith(_STANDARD):
        raise RefusedImageError(
            "NOT_A_RADIOGRAPH", f"modality {modality or 'unknown'}, but stored as {_name_of(storage)}"
        )
    if not modality:
        raise RefusedImageError("NOT_A_RADIOGRAPH", f"neither class nor modality says radiograph; wanted {wanted}")


def _name_of(storage: str) -> str:
    from pydicom.uid import UID

    name = UID(storage).name
    return f"{name}, which is no radiograph" if name != storage else "a class that is not known"


def _frames(attributes: Attributes) -> int:
    """How many frames there are; a number that is none, or 0, is taken out of the decoder's way."""
    frames = attributes.get("NumberOfFrames")
    if isinstance(frames, int) and frames > 0:
        return frames
    if frames is not None:
        del attributes.dataset["NumberOfFrames"]
        attributes.pass_over("NumberOfFrames")
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
        values = values // 3 * 2  # two pixels share their colours
    wanted = values * dataset.BitsAllocated // 8
    if len(dataset.PixelData) not in (wanted, wanted + 1):  # a value of an odd length is padded
        raise RefusedImageError("BROKEN", f"{len(dataset.PixelData)} bytes of pixels, but the header says {wanted}")


def _decode(attributes: Attributes, options: ReadOptions) -> DecodedImage:
    dataset, applied = attributes.dataset, list[str]()
    pixels = _stored_pixels(dataset, options.frame)
    facts: dict[str, Any] = {"format": "DICOM", "applied": applied, "passed_over": attributes.passed_over}
    facts["bits"] = int(dataset.BitsStored)
    if (modality := attributes.code("Modality")) in MODALITIES:
        facts["modality"] = modality
    mm_per_px, source = spacing(attributes)
    if source is not None:
        facts["spacing"] = source
    patient = str(attributes.get(_PATIENT) or "").strip()
    is_windowed = False
    if pixels.ndim == 3:
        values, full_range = luma(pixels), (0.0, float((1 << facts["bits"]) - 1))
    elif dataset.PhotometricInterpretation == "PALETTE COLOR":
        applied.append("palette")
        values, full_range = grey_of_palette(pixels, dataset)
    else:
        values, full_range, is_windowed = displayed(pixels, attributes, applied, voi=options.voi)
    return DecodedImage(values, facts, full_range, is_windowed, mm_per_px, None if is_nobody(patient) else patient)


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
