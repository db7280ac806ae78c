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
from pydicom.pixels import apply_modality_lut, apply_windowing, get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ddpm_lmk.data.decode import ReadOptions, RefusedImageError, film_from_bytes
from ddpm_lmk.data.dicom import is_dicom
from ddpm_lmk.data.pack import pack
from ddpm_lmk.data.shards import Manifest
from ddpm_lmk.errors import ConfigError
from tests.data.dicoms import FILM, dataset, table, to_bytes

PRIVATE = (b"Doe", b"4711", b"Elsewhere")


def film(*, voi=False, with_header=True, pixels=FILM, **tags):
    return film_from_bytes(to_bytes(dataset(pixels, **tags), with_header=with_header), ReadOptions(voi=voi))


def refused(film, **options):
    with pytest.raises(RefusedImageError) as caught:
        film_from_bytes(to_bytes(film) if isinstance(film, Dataset) else film, ReadOptions(**options))
    return caught.value.code, str(caught.value)


# --- stored values to what is seen


def test_stored_values_are_kept_and_their_range_is_that_of_their_bits():
    found = film()
    np.testing.assert_array_equal(found.pixels, FILM)
    assert (found.pixels.dtype, found.full_range, found.facts["bits"]) == (np.uint16, (0, 4095), 12)


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


def test_signed_values_keep_their_order():
    pixels = FILM.astype(np.int16) - 1600
    found = film(pixels=pixels)
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.full_range == (-2048, 2047)


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


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}])
def test_without_a_usable_window_nothing_is_windowed(tags):
    assert not film(voi=True, **tags).is_windowed


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_becomes_grey_whichever_way_its_planes_lie(planar):
    grey = (FILM >> 4).astype(np.uint8)
    rgb = np.stack([grey] * 3, axis=0 if planar else 2)
    tags = {"Rows": 60, "Columns": 40, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "bits": 8}
    found = film(pixels=rgb, PlanarConfiguration=planar, **tags)
    np.testing.assert_array_equal(found.pixels, grey)


def test_a_file_without_preamble_or_header_is_read():
    data = to_bytes(dataset(), with_header=False)
    assert is_dicom(data)
    np.testing.assert_array_equal(film_from_bytes(data).pixels, FILM)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_byte_orders_and_deflated_files_are_read(syntax):
    pixels = FILM.byteswap() if syntax == ExplicitVRBigEndian else FILM
    np.testing.assert_array_equal(film(pixels=pixels, syntax=syntax).pixels, FILM)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_keeps_every_value(syntax):
    pytest.importorskip("openjpeg")
    compressed = dataset()
    compressed.compress(syntax)
    np.testing.assert_array_equal(film_from_bytes(to_bytes(compressed)).pixels, FILM)


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
    film_from_bytes(to_bytes(jpeg(60, 40)))
    assert refused(jpeg(120, 80))[0] == "BROKEN"


# --- spacing


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.1, 0.1]}, 0.2),
        ({"ImagerPixelSpacing": [0.1, 0.1]}, 0.1),
        ({"PixelSpacing": [0, 0]}, None),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.1, 0.1]}, 0.1),
        ({"PixelSpacing": [0.2, 0.1]}, None),
        ({}, None),
    ],
)
def test_millimetres_are_the_files_or_unknown(tags, wanted):
    assert film(**tags).mm_per_px == wanted


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
    np.testing.assert_array_equal(film_from_bytes(to_bytes(made), ReadOptions(frame=1)).pixels, FILM[::-1])
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


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless])
def test_a_missing_decoder_is_named_with_its_extra(syntax):
    if get_decoder(syntax).is_available:
        pytest.skip("a decoder for it is installed")
    made = dataset(syntax=syntax)
    made.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    made["PixelData"].is_undefined_length = True
    made["PixelData"].VR = "OB"
    code, reason = refused(made)
    assert code == "NO_DECODER"
    assert "ddpm-lmk[dicom-gpl]" in reason
    assert "GPL-3.0" in reason


# --- packing a tree of them


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "Doe_Jane"
    (root / "study-4711").mkdir(parents=True)
    for number in range(6):
        pixels = np.roll(FILM, 3 * number, 1)
        made = dataset(pixels, PatientID=f"MRN-4711-{number // 2}", PixelSpacing=[0.15, 0.15])
        (root / "study-4711" / f"IM{number}").write_bytes(to_bytes(made))
    (root / "study-4711" / "Doe.txt").write_text("no film")
    return root


def test_a_tree_is_packed_with_hashed_names_and_patients(tree, tmp_path):
    summary = pack(tree, "dicom", tmp_path / "out", size=32, workers=1, id_map=tmp_path / "map.csv")
    assert (summary.packed, dict(summary.reasons)) == (6, {"NOT_DICOM": 1})
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(6)]
    assert sorted(np.unique([record.group for record in records], return_counts=True)[1]) == [2, 2, 2]
    assert {record.mm_per_px for record in records} == {0.15}
    assert all(len(record.id) == 16 and int(record.id, 16) >= 0 for record in records)
    with open(tmp_path / "map.csv", newline="") as file:
        names = {row["id"]: row["path"] for row in csv.DictReader(file)}
    assert {names[record.id] for record in records} == {f"study-4711/IM{number}" for number in range(6)}
    for path in (tmp_path / "out.key", tmp_path / "map.csv"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_list_names_files_of_many_folders(tree, tmp_path):
    (tmp_path / "list.txt").write_text(f"# some\n{tree}/study-4711/IM0\nDoe_Jane/study-4711/IM5\n")
    assert pack(tmp_path / "list.txt", "dicom", tmp_path / "out", size=32, workers=1).packed == 2


def test_nothing_private_is_in_the_pack(tree, tmp_path, capfd):
    (tree / "study-4711" / "Jane_Doe_broken").write_bytes(to_bytes(dataset())[:900])
    pack(tree, "dicom", tmp_path / "out", size=32, workers=1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    said = "".join(capfd.readouterr()).encode()
    assert [word for word in PRIVATE if word in written + said] == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["hashed_ids"] is True


def test_one_key_gives_one_name_and_others_may_not_read_it(tree, tmp_path):
    for name in ("a", "b"):
        pack(tree, "dicom", tmp_path / name, name="own", size=32, workers=1, id_key=tmp_path / "key")
    assert Manifest.open(tmp_path / "a").fingerprint == Manifest.open(tmp_path / "b").fingerprint
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        pack(tree, "dicom", tmp_path / "c", name="own", size=32, workers=1, id_key=tmp_path / "key")


def test_patients_are_not_split_between_training_and_validation(tree, tmp_path):
    pack(tree, "dicom", tmp_path / "out", size=32, workers=1, val_fraction=0.5)
    manifest = Manifest.open(tmp_path / "out")
    records = [manifest.read_record(row) for row in range(6)]
    assert len({(record.group, record.split) for record in records}) == 3


# --- real files


def has_decoder(name):
    syntaxes = {"JPEG Lossless": JPEGLosslessSV1, "JPEG-LS": JPEGLSLossless}
    return all(get_decoder(syntax).is_available for start, syntax in syntaxes.items() if name.startswith(start))


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
        found = film_from_bytes(data)
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
