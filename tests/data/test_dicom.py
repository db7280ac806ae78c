"""DICOM: greys are the standard's, only radiographs are taken, and nothing about a patient gets out."""

import csv
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing, get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
)

from ddpm_lmk.data.images.decode import decode_image
from ddpm_lmk.data.images.dicom import is_dicom
from ddpm_lmk.data.images.image import ReadOptions, RefusedImageError
from tests.data.dicoms import FILM, dataset, malformed, table, to_bytes


def film(*, voi=False, with_header=True, pixels=FILM, **tags):
    return decode_image(to_bytes(dataset(pixels, **tags), with_header=with_header), ReadOptions(voi=voi))


def refused(film, **options):
    with pytest.raises(RefusedImageError) as caught:
        decode_image(to_bytes(film) if isinstance(film, Dataset) else film, ReadOptions(**options))
    return caught.value.code, str(caught.value)


# --- stored values to what is seen: `tests.faults.kinds` has bits, signs, alignments and transfer syntaxes


@pytest.mark.parametrize(
    ("tags", "full_range"),
    [
        ({}, (0, 4095)),
        ({"pixels": FILM.astype(np.int16) - 1600}, (-2048, 2047)),
        ({"PhotometricInterpretation": "monochrome1", "Modality": "cr"}, (0, 4095)),
        ({"HighBit": 15}, (0, 4095)),  # wrong, as the lower bits show
        ({"with_header": False}, (0, 4095)),
    ],
)
def test_stored_values_are_kept_and_their_range_is_that_of_their_bits(tags, full_range):
    found = film(**tags)
    is_negative = "PhotometricInterpretation" in tags
    np.testing.assert_array_equal(found.pixels, 4095 - FILM if is_negative else tags.get("pixels", FILM))
    assert (found.full_range, found.facts["bits"]) == (full_range, 12)


def test_a_file_whose_preamble_is_cut_off_is_read():
    data = to_bytes(dataset())[128:]
    assert is_dicom(data)
    np.testing.assert_array_equal(decode_image(data).pixels, FILM)


RGB = {"Rows": 60, "Columns": 40, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("bits", [8, 12])
def test_colour_becomes_grey_whichever_way_its_planes_lie(planar, bits):
    grey = (FILM >> (12 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    rgb = np.stack([grey] * 3, axis=0 if planar else 2)
    found = film(pixels=rgb, PlanarConfiguration=planar, bits=bits, **RGB)
    np.testing.assert_array_equal(found.pixels, grey)
    assert found.full_range == (0, 2**bits - 1)
    assert refused(dataset(rgb, bits=bits, **RGB)) == (
        "BROKEN",
        "a DICOM file whose header does not say how its colours lie",
    )


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
        {"PresentationLUTShape": "INVERSE"},
    ],
)
def test_white_is_turned_to_the_top_once(tags):
    found = film(**tags)
    np.testing.assert_array_equal(found.pixels, 4095 - FILM)
    assert found.facts["applied"] == ["inverted"]


def test_rescaling_with_a_negative_slope_inverts_too():
    found = film(RescaleSlope="-2", RescaleIntercept="100")
    np.testing.assert_allclose(found.pixels, 100 - 2.0 * FILM)
    assert found.full_range == (100 - 2 * 4095, 100)


@pytest.mark.parametrize("first", [0, 100])
def test_a_modality_table_is_looked_up(first):
    entries = np.sqrt(np.arange(4096)) * 900
    tags = {"ModalityLUTSequence": [table(entries, first=first)]}
    np.testing.assert_array_equal(film(**tags).pixels, apply_modality_lut(FILM, dataset(**tags)))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_is_that_of_the_standard(function):
    tags = {"WindowCenter": [1500, 9], "WindowWidth": [900, 9], "VOILUTFunction": function}
    found = film(voi=True, **tags)
    np.testing.assert_allclose(found.pixels, apply_windowing(FILM, dataset(**tags)) / 4095, atol=1e-6)
    assert (found.is_windowed, found.full_range) == (True, (0, 1))
    np.testing.assert_array_equal(film(**tags).pixels, FILM)


def test_a_voi_table_goes_before_a_window_and_after_the_rescaling():
    entries = np.linspace(0, 1, 2048) ** 2 * 1023
    tags = {"VOILUTSequence": [table(entries, depth=10)], "WindowCenter": 9, "WindowWidth": 9}
    found = film(voi=True, RescaleSlope="0.5", RescaleIntercept="0", **tags)
    wanted = np.trunc(entries)[np.rint(FILM * 0.5).astype(int)]
    np.testing.assert_array_equal(found.pixels, wanted)
    assert found.full_range == (0, 1023)
    assert found.facts["applied"] == ["rescale", "voi-lut"]


def palette(entries, **others):
    """Tags of a palette; `others`: entries of a colour that has its own."""
    tags = {"PhotometricInterpretation": "PALETTE COLOR", "bits": 8}
    for colour in ("Red", "Green", "Blue"):
        values = others.get(colour, entries)
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [len(values) % 65536, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = np.asarray(values, "<u2").tobytes()
    return tags


def test_a_palette_of_greys_is_applied():
    numbers = (FILM >> 4).astype(np.uint8)
    entries = np.linspace(65535, 0, 256).astype(np.uint16)  # an inverted one: the numbers are the negative
    made = dataset(numbers, **palette(entries))
    found = decode_image(to_bytes(made))
    np.testing.assert_array_equal(found.pixels, apply_color_lut(numbers, made)[..., 0])
    assert (found.full_range, found.facts["applied"]) == ((0, 65535), ["palette"])


@pytest.mark.parametrize("colours", [{"Blue": np.arange(256)}, None], ids=["colours", "no table"])
def test_a_palette_of_colours_or_none_is_refused(colours):
    tags = palette(np.arange(256)[::-1], **(colours or {}))
    if colours is None:
        del tags["GreenPaletteColorLookupTableData"]
    code, reason = refused(dataset((FILM >> 4).astype(np.uint8), **tags))
    assert (code, "palette" in reason) == ("MODE", True)


def jpeg(rows, columns, **tags):
    buffer = io.BytesIO()
    Image.fromarray(np.resize(FILM >> 4, (rows, columns)).astype(np.uint8)).save(buffer, "JPEG")
    grey = (FILM >> 4).astype(np.uint8)
    made = dataset(grey, bits=8, syntax=JPEGBaseline8Bit, **tags)
    made.PixelData = encapsulate([buffer.getvalue()])
    made["PixelData"].is_undefined_length = True
    made["PixelData"].VR = "OB"
    return made


def test_a_compressed_picture_of_another_size_than_the_header_says_is_refused():
    decode_image(to_bytes(jpeg(60, 40)))
    assert refused(jpeg(120, 80))[0] == "BROKEN"


# --- legal variation, and attributes that do not read beside good pixels


@pytest.mark.parametrize(
    ("center", "width"),
    [
        (b"2047,5", b"4096"),
        (b"n/a", b"n/a"),
        (b"", b""),
        (b"0", b"0"),
        (b"2047.5", b""),
        (b"1e400", b"4096"),
        (b"-1\\-2", b"-4\\-4"),
        (b"60000", b"10"),  # leaves nothing to see
    ],
)
def test_a_window_that_does_not_apply_is_passed_over(center, width):
    made = malformed(dataset(), WindowCenter=center, WindowWidth=width)
    found = decode_image(to_bytes(made), ReadOptions(voi=True))
    np.testing.assert_array_equal(found.pixels, FILM)
    assert (found.is_windowed, found.full_range) == (False, (0, 4095))


@pytest.mark.parametrize(
    ("center", "width"),
    [
        (b"1500", b"900\\50"),
        (b"1500\\9", b"900"),
        (b"\\1500", b"\\900"),
        (b"x\\1500", b"5\\900"),
        (b"1500.0\\n/a ", b"900\\n/a"),
        (b"7\\1500", b"0\\900"),
    ],
)
def test_the_first_window_that_reads_is_applied_whatever_stands_beside_it(center, width):
    made = malformed(dataset(), WindowCenter=center, WindowWidth=width)
    found = decode_image(to_bytes(made), ReadOptions(voi=True))
    np.testing.assert_allclose(found.pixels, np.clip((FILM - 1499.5) / 899 + 0.5, 0, 1), atol=1e-6)
    assert found.is_windowed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RescaleSlope", b"1,0"),
        ("RescaleSlope", b"0"),
        ("RescaleIntercept", b"n/a"),
        ("ModalityLUTSequence", ("LO", b"none")),
        ("VOILUTFunction", b"UNHEARD_OF"),
        ("VOILUTSequence", ("LO", b"none")),
        ("PixelSpacing", b"0,2\\0,2"),
        ("PixelAspectRatio", b"a\\b"),
        ("EstimatedRadiographicMagnificationFactor", b"1,25"),
        ("NumberOfFrames", b"one"),
        ("NumberOfFrames", b"0"),
    ],
)
def test_an_optional_attribute_that_does_not_read_is_passed_over_by_name(name, value):
    tags = {"ImagerPixelSpacing": [0.2, 0.2], name: value}
    found = decode_image(to_bytes(malformed(dataset(), **tags)), ReadOptions(voi=True))
    np.testing.assert_array_equal(found.pixels, FILM)
    if value != b"UNHEARD_OF":  # without a window its function does not matter
        assert found.facts["passed_over"] == [name]


@pytest.mark.parametrize("name", ["HighBit", "PlanarConfiguration", "PresentationLUTShape", "PatientID"])
@pytest.mark.parametrize("value", [b"", b"\xff\xfe\xfd\xfc", ("LO", b"none")])
def test_nothing_optional_costs_a_film(name, value):
    np.testing.assert_array_equal(decode_image(to_bytes(malformed(dataset(), **{name: value}))).pixels, FILM)


def test_a_window_does_not_apply_to_values_whose_rescaling_does_not_read():
    made = malformed(dataset(WindowCenter=1500, WindowWidth=900), RescaleIntercept=b"-1024,0")
    found = decode_image(to_bytes(made), ReadOptions(voi=True))
    np.testing.assert_array_equal(found.pixels, FILM)
    assert not found.is_windowed


@pytest.mark.parametrize("entries", [[7, 8, 9], [5000] * 4096])
@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_table_that_is_shorter_or_deeper_than_it_says_is_passed_over(name, entries):
    item = table(entries, depth=12)
    item.LUTDescriptor = [4096, 0, 12]
    found = film(voi=True, **{name: [item]})
    np.testing.assert_array_equal(found.pixels, FILM)
    assert found.facts["passed_over"] == [name]


SECONDARY = "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(
    "tags",
    [
        *({"SOPClassUID": SECONDARY + end, "Modality": "DX", "NumberOfFrames": 1} for end in ("", ".2", ".3", ".4")),
        *({"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.1.{end}", "Modality": "DX"} for end in ("1", "1.1")),
        *({"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.1.{end}", "Modality": "MG"} for end in ("2", "2.1")),
        *({"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.1.{end}", "Modality": "IO"} for end in ("3", "3.1")),
        {"SOPClassUID": "1.2.392.200036.9125.1.1.2", "Modality": "CR"},  # a private class of a cassette reader
        {"SOPClassUID": None, "with_header": False},
        {"Modality": None},
        {"Modality": ""},
        {"Modality": "PX "},
        {"NumberOfFrames": ""},
        {"HighBit": None},
    ],
)
def test_every_class_of_radiographs_is_taken(tags):
    np.testing.assert_array_equal(film(**tags).pixels, FILM)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"SOPClassUID": SECONDARY, "Modality": "OT"}, "modality OT; wanted CR, DX, IO, MG, PX, RG"),
        ({"SOPClassUID": SECONDARY, "Modality": ""}, "neither class nor modality says radiograph; wanted CR, DX"),
        ({"SOPClassUID": "1.2.3", "Modality": None}, "neither class nor modality says radiograph; wanted CR, DX"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.1", "Modality": "CR"},
            "modality CR, but stored as X-Ray Angiographic Image Storage, which is no radiograph",
        ),
    ],
)
def test_the_refusal_of_what_is_no_radiograph_names_class_or_modality_whichever_it_is(tags, words):
    code, reason = refused(dataset(**tags))
    assert (code, words in reason) == ("NOT_A_RADIOGRAPH", True), reason


@pytest.mark.parametrize("name", ["SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_a_header_without_what_pixels_need_is_refused_by_name(name):
    made = dataset()
    delattr(made, name)
    assert refused(made) == ("BROKEN", f"a DICOM file whose header lacks {name}")


# --- bits


def test_values_that_need_more_bits_than_are_said_to_be_stored_are_refused():
    for bits, turned in ((10, {}), (10, {"PhotometricInterpretation": "MONOCHROME1"}), (8, {})):
        code, reason = refused(dataset(bits=bits, **turned))
        assert (code, f"more than the {bits} bits" in reason) == ("MODE", True)


def test_bits_above_the_values_that_hold_an_overlay_or_never_change_are_dropped():
    np.testing.assert_array_equal(film(pixels=FILM | 0xA000).pixels, FILM)
    overlay = np.zeros_like(FILM)
    overlay[5:20] = 0x8000
    assert refused(dataset(FILM | overlay))[0] == "MODE"
    made = dataset(FILM | overlay)
    made.add_new(0x60000102, "US", 15)
    np.testing.assert_array_equal(decode_image(to_bytes(made)).pixels, FILM)


def test_signed_values_of_twelve_bits_keep_their_sign_however_it_is_carried_up():
    signed = FILM.astype(np.int16) - 2000
    for stored in (signed, (signed & 0xFFF).astype(np.int16)):
        np.testing.assert_array_equal(film(pixels=stored).pixels, signed)


# --- what is no film


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "NOT_A_RADIOGRAPH"),
        ({"Modality": "MRN 4711", "SOPClassUID": "1.2.3"}, "NOT_A_RADIOGRAPH"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "DICOMDIR"),
        ({"PixelData": None}, "NOT_AN_IMAGE"),
        ({"BurnedInAnnotation": "YES"}, "BURNED_IN"),
        ({"NumberOfFrames": 3}, "FRAMES"),
        ({"Rows": 20000, "Columns": 20000}, "TOO_LARGE"),
        ({"Rows": 61}, "BROKEN"),
        ({"Columns": 39}, "BROKEN"),
        ({"BitsAllocated": 32}, "MODE"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "MODE"),
    ],
)
def test_what_is_no_film_is_refused_without_quoting_it(tags, code):
    made = dataset()
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    found, reason = refused(made)
    assert found == code
    assert "4711" not in reason


def test_a_frame_may_be_asked_for():
    frames = np.stack([FILM, FILM[::-1]])
    made = dataset(frames, Rows=60, Columns=40, NumberOfFrames=2)
    np.testing.assert_array_equal(decode_image(to_bytes(made), ReadOptions(frame=1)).pixels, FILM[::-1])
    assert refused(made, frame=2)[0] == "FRAMES"


def test_cut_files_are_refused_wherever_they_end():
    data = to_bytes(dataset())
    for end in (140, 300, 500, len(data) // 2, len(data) - 2):
        assert refused(data[:end])[0] in ("BROKEN", "NOT_AN_IMAGE", "NOT_A_RADIOGRAPH")


def test_a_deflated_bomb_is_refused_before_it_expands():
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([*(deflater.compress(bytes(1 << 20)) for _ in range(65)), deflater.flush()])
    head = to_bytes(dataset(syntax=DeflatedExplicitVRLittleEndian))
    begin = 144 + int.from_bytes(head[140:144], "little")
    assert refused(head[:begin] + bomb)[0] == "BOMB"


def test_a_missing_decoder_is_named_with_its_extra():
    if get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("a decoder for it is installed")
    made = dataset(syntax=JPEGLosslessSV1)
    made.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    made["PixelData"].is_undefined_length = True
    made["PixelData"].VR = "OB"
    code, reason = refused(made)
    assert code == "NO_DECODER"
    assert "ddpm-lmk[dicom-gpl]" in reason
    assert "GPL-3.0" in reason


# --- real files


def has_decoder(name):
    return not name.startswith("JPEG Lossless") or get_decoder(JPEGLosslessSV1).is_available


def test_every_real_file_is_as_its_index_says(real_data):
    folder = real_data("dicom")
    with open(folder / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        if row["transfer_syntax"].startswith("JPEG Extended") or not has_decoder(row["transfer_syntax"]):
            code, reason = refused(data)
            assert (code in ("NO_DECODER", "BROKEN"), "gdcmconv" in reason) == (True, True), row["file"]
            continue
        found = decode_image(data)
        bits = int(row["bits"].split("/")[0])
        is_inverted = row["photometric"] == "MONOCHROME1"
        assert found.pixels.shape == (int(row["rows"]), int(row["cols"])), row["file"]
        assert ("inverted" in found.facts["applied"]) is is_inverted, row["file"]
        kind, _, values = row["decoded"].partition(" ")
        low, high = (int(value) for value in values.split(".."))
        if "ModalityLUTSequence" in dcmread(io.BytesIO(data), force=True, stop_before_pixels=True):
            continue
        wanted = (2**bits - 1 - high, 2**bits - 1 - low) if is_inverted else (low, high)
        lossy = 1 if row["transfer_syntax"].startswith("JPEG") and "Lossless" not in row["transfer_syntax"] else 0
        np.testing.assert_allclose((found.pixels.min(), found.pixels.max()), wanted, atol=lossy, err_msg=row["file"])
        assert found.pixels.dtype == kind
        spacing = json.loads(row["pixel_spacing"] or "[0, 0]")[0]
        assert found.mm_per_px == (spacing or None), row["file"]
