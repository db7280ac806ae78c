"""DICOM films of our own making, with every tag a test may want to change."""

import io

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CR = "1.2.840.10008.5.1.4.1.1.1"
FILM = (np.add.outer(np.arange(60), 5 * np.arange(40)) * 14).astype(np.uint16)  # [60, 40], 0..3556 of 12 bits


def dataset(pixels=FILM, *, bits=12, syntax=ExplicitVRLittleEndian, **tags):
    """A radiograph; `tags` are set last, a value of None removes one."""
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = syntax
    film.SOPClassUID, film.SOPInstanceUID, film.Modality = CR, generate_uid(entropy_srcs=["film"]), "CR"
    film.PatientName, film.PatientID, film.InstitutionName = "Doe^Jane", "MRN-4711", "St. Elsewhere"
    film.Rows, film.Columns = pixels.shape[:2]
    film.SamplesPerPixel = 1
    film.PhotometricInterpretation = "MONOCHROME2"
    film.BitsAllocated = 8 * pixels.dtype.itemsize
    film.BitsStored, film.HighBit = bits, bits - 1
    film.PixelRepresentation = int(pixels.dtype.kind == "i")
    film.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(film, name)
        else:
            setattr(film, name, value)
    film["PixelData"].VR = "OW"
    return film


def malformed(film, **tags):
    """Set tags as they are, without pydicom's checks: bytes, of the dictionary's or of a given representation."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    for name, value in tags.items():
        if isinstance(value, bytes | tuple):
            vr, content = value if isinstance(value, tuple) else (dictionary_VR(name), value)
            content += b" " * (len(content) % 2)
            tag = Tag(tag_for_keyword(name))
            film._dict[tag] = RawDataElement(tag, vr, len(content), content, 0, False, True)
        else:
            setattr(film, name, value)
    return film


def to_bytes(film, *, with_header=True):
    """The file; without header, as some old archives write it."""
    buffer = io.BytesIO()
    if with_header:
        dcmwrite(buffer, film, enforce_file_format=True)
    else:
        del film.file_meta
        dcmwrite(buffer, film, implicit_vr=True, little_endian=True)
    return buffer.getvalue()


def table(entries, *, first=0, depth=16):
    """An item of a look-up table sequence."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, depth]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = [int(entry) for entry in entries]
    item["LUTData"].VR = "US"
    return item
