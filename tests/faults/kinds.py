"""Input of every kind that people have, whole but unusual: its value comes out right, or it is refused in words.

Where `fuzz` damages files, this varies what is legal or usual: containers, colour types and bit depths of pictures,
pixel encodings of DICOM, tags of spacing in every combination, encodings of tables, words for "not seen", and ids of
patients over packs of every pair of kinds. Each input is made together with the value that it stands for, by code that
knows nothing of the readers; a wrong value is a fault, however good it looks, and so is an error of several lines.
`make fuzz` runs all of it; the suite runs a sample that a seed chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_lmk.cli.app import run
from ddpm_lmk.data.images.decode import ReadOptions, RefusedImageError, film_from_bytes
from ddpm_lmk.data.images.dicom import read_spacing
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.data.shards.pack import PackSummary, pack
from ddpm_lmk.errors import ConfigError, DataError
from ddpm_lmk.system.machine import hardware, versions
from tests.data.dicoms import dataset, malformed, to_bytes
from tests.data.pictures import HEIGHT, UNREAD, WIDTH, picture_cases, smooth

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "kinds.json"
RIGHT, REFUSED, WARNED = "right", "refused", "right, with a warning"
SAMPLE = {"pictures": 250, "dicom": 150, "spacing": 400, "tables": 4, "sentinels": 4, "patients": 2}


class WrongError(AssertionError):
    """A value came out wrong, or a message is none."""


@dataclass(frozen=True)
class Trial:
    """One input; `check` works in an empty folder and says how it ended, or raises WrongError."""

    name: str
    check: Callable[[Path], str]


def campaign(folder: Path, *, seed: int = 0, sample: dict[str, int] | None = None) -> dict[str, Counter[str]]:
    """Try every family of inputs, or a sample of each; returns how many ended how; WrongError has all faults."""
    outcomes: dict[str, Counter[str]] = {}
    faults: list[str] = []
    for family, make in FAMILIES.items():
        trials = make(seed)
        if sample is not None:
            rng = random.Random(f"{seed}:{family}")
            trials = rng.sample(trials, min(sample[family], len(trials)))
        outcomes[family] = Counter()
        for number, trial in enumerate(trials):
            work = folder / f"{family}-{number}"
            work.mkdir()
            try:
                outcomes[family][trial.check(work)] += 1
            except WrongError as fault:
                faults.append(f"{family}, {trial.name}: {fault}")
    if faults:
        raise WrongError("\n".join([f"{len(faults)} faults", *faults[:50]]))
    return outcomes


def _require_one_line(error: Exception) -> str:
    text = str(error)
    if not text.strip() or "\n" in text:
        raise WrongError(f"a refusal that is not one line: {text!r}")
    return text


# --- pixels


def pictures(seed: int) -> list[Trial]:
    """Every container, colour type and bit depth of `tests.data.pictures`."""

    def trial(case: Any) -> Trial:
        def check(_: Path) -> str:
            may_be_refused = case.grey is None or UNREAD.search(case.name) is not None
            return _check_greys(case.data, case.grey, case.tolerance, may_be_refused=may_be_refused)

        return Trial(case.name, check)

    return [trial(case) for case in picture_cases(seed)]


def _check_greys(data: bytes, grey: np.ndarray | None, tolerance: float, *, may_be_refused: bool) -> str:
    try:
        found = film_from_bytes(data).pixels
    except RefusedImageError as error:
        _require_one_line(error)
        if not may_be_refused:
            raise WrongError(f"refused: {error}") from None
        return REFUSED
    if grey is None:
        raise WrongError("taken, though nobody can know its greys")
    if found.shape != grey.shape:
        raise WrongError(f"{found.shape}, wanted {grey.shape}")
    off = float(np.abs(found.astype(np.float64) - grey).max())
    if off > tolerance:
        raise WrongError(f"off by {off:g}")
    return RIGHT


_SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big endian": "1.2.840.10008.1.2.2",
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}


def dicom(seed: int) -> list[Trial]:
    """Bits stored, alignment, sign, polarity, what is above the value, and transfer syntax, in every combination."""
    facts = itertools.product(
        _SYNTAXES, (8, 10, 12, 14, 16), (False, True), ("MONOCHROME1", "MONOCHROME2", "RGB"), ("low", "high"), (0, 1, 2)
    )
    return [
        Trial(" ".join(map(str, fact)), lambda _, fact=fact: _dicom_trial(seed, *fact))  # type: ignore[misc]
        for fact in facts
        if _is_possible(*fact)
    ]


def _is_possible(syntax: str, bits: int, is_signed: bool, photometric: str, place: str, above: int) -> bool:
    is_compressed = syntax in ("RLE", "JPEG 2000")
    if photometric == "RGB":
        return not (is_signed or above or place == "high" or (is_compressed and bits != 8))
    if bits in (8, 16):
        return above == 0 and place == "low"
    return not (above and (is_signed or place == "high")) and not (is_compressed and (above or place == "high"))


def _dicom_trial(seed: int, syntax: str, bits: int, is_signed: bool, photometric: str, place: str, above: int) -> str:
    """`above`: 0 nothing, 1 the same bit everywhere above the values, 2 bits that differ, which may only be refused."""
    value = smooth(seed, bits).astype(np.int64) - (1 << (bits - 1) if is_signed else 0)
    allocated = 8 if bits == 8 else 16
    stored = value << (allocated - bits if place == "high" else 0)
    if above:
        stored = stored + (np.arange(WIDTH) % 2 if above == 2 else 1) * (1 << bits)
    pixels = stored.astype(f"{'i' if is_signed else 'u'}{allocated // 8}")
    tags: dict[str, Any] = {"PhotometricInterpretation": photometric}
    if photometric == "RGB":
        pixels = np.stack([pixels] * 3, axis=2)
        tags |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    if place == "high":
        tags["HighBit"] = allocated - 1
    made = dataset(pixels, bits=bits, **tags)
    if syntax in ("RLE", "JPEG 2000"):
        made.compress(_SYNTAXES[syntax], generate_instance_uid=False)
    else:
        if syntax == "big endian" and allocated == 16:
            made.PixelData = pixels.byteswap().tobytes()
        made.file_meta.TransferSyntaxUID = _SYNTAXES[syntax]
        made["PixelData"].VR = "OB" if allocated == 8 else "OW"  # bytes of words would be swapped
    low = int(value.min()) if is_signed else 0
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (low, (1 << bits) - 1)
    seen = ends[0] + ends[1] - value if photometric == "MONOCHROME1" else value
    return _check_greys(to_bytes(made), None if above == 2 else seen, 0.0, may_be_refused=above == 2)


# --- spacing


_ABSENT = None
_SPACINGS: dict[str, tuple[Any, ...]] = {
    "PixelSpacing": (_ABSENT, [0, 0], [0.16, 0.16], [0.2, 0.2], [1, 1], [0.16, 0.1], b"0,16\\0,16", b"0.16"),
    "ImagerPixelSpacing": (_ABSENT, [0.2, 0.2], [0.2, 0.15], [0, 0], b"n/a"),
    "NominalScannedPixelSpacing": (_ABSENT, [0.2, 0.2], [0.1, 0.1]),
    "PixelSpacingCalibrationType": (_ABSENT, "GEOMETRY", "FIDUCIAL", "OTHER"),
    "EstimatedRadiographicMagnificationFactor": (_ABSENT, 0, 1.25, 0.5, 70, b"1,25"),
    "distances": (_ABSENT, (1500, 1200), (1500, 0), (1200, 1500), (1500, 1000)),
    "PixelAspectRatio": (_ABSENT, [1, 1], [1, 2]),
}


def spacing(_: int) -> list[Trial]:
    """Every combination of the tags that say, or seem to say, how large a pixel is."""
    trials = []
    for values in itertools.product(*_SPACINGS.values()):
        tags = {name: value for name, value in zip(_SPACINGS, values) if value is not _ABSENT}
        trials.append(Trial(str(tags), lambda _, tags=tags: _spacing_trial(tags)))  # type: ignore[misc]
    return trials


_PICTURE = to_bytes(dataset(smooth(0, 12)))


def _spacing_trial(tags: dict[str, Any]) -> str:
    given = {name: value for name, value in tags.items() if name != "distances"}
    if "distances" in tags:
        given |= dict(zip(("DistanceSourceToDetector", "DistanceSourceToPatient"), tags["distances"]))
    found, _ = read_spacing(to_bytes(malformed(dataset(smooth(0, 12)), **given)), ReadOptions())
    wanted = _millimetres(tags)
    if (found is None) != (wanted is None) or (wanted is not None and abs(found - wanted) > 1e-9):  # type: ignore[operator]
        raise WrongError(f"{found} mm, wanted {wanted}")
    return "unknown" if wanted is None else RIGHT


def _millimetres(tags: dict[str, Any]) -> float | None:
    """The size of a pixel in the patient by PS3.3 10.7.1, from values whose meaning is known here.

    The film behind them: 0.2 mm at the detector, magnified 1.25 times, so 0.16 mm in the patient.
    """
    spacings = {name: tags.get(f"{name}Spacing") for name in ("Pixel", "ImagerPixel", "NominalScannedPixel")}
    read = {name: pair for name, pair in spacings.items() if isinstance(pair, list) and min(pair) > 0}
    patient = read.get("Pixel")
    receptors = [pair for name, pair in read.items() if name != "Pixel"]
    is_calibrated = tags.get("PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL")
    factor = tags.get("EstimatedRadiographicMagnificationFactor")
    factor = None if factor in (None, 0, b"1,25") else factor
    detector, source = tags.get("distances") or (0, 0)
    ratio = detector / source if source else None
    result: tuple[float, float] | None
    if patient and (is_calibrated or not receptors):
        result = (patient[0], patient[1])
    elif patient and all(pair[0] != patient[0] for pair in receptors):
        is_possible = all(patient[0] < pair[0] <= 5 * patient[0] for pair in receptors)
        result = (patient[0], patient[1]) if is_possible else None
    elif not receptors or (len(receptors) == 2 and receptors[0] != receptors[1]):
        result = None
    else:
        first = patient or receptors[0]
        stated = [value for value in (factor, ratio) if value is not None]
        if factor == 1.25:  # an impossible ratio beside it does not matter, another possible one does
            magnification = None if ratio == 1.5 else 1.25
        elif not stated:
            magnification = 1.0
        else:
            magnification = ratio if factor is None and ratio is not None and ratio > 1 else None
        result = None if magnification is None else (first[0] / magnification, first[1] / magnification)
    is_square = result is not None and result[0] == result[1] and tags.get("PixelAspectRatio") != [1, 2]
    return result[0] if result is not None and is_square else None


# --- tables


_TRUTH = np.array([[6.5, 11.25], [20.0, 30.5], [25.75, 8.0]])
_TITLES = ("Sella", "Nasenrücken", "Größe ñ")


def _films(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        Image.fromarray(smooth(number, 8)).save(folder / name)


def _outcome(source: Path, out: Path, **settings: Any) -> PackSummary | None:
    """What packing a table comes to; None where it is refused, in one line."""
    try:
        return pack(source, out, PackSettings(kind="table", size=32, **settings), workers=1)
    except (DataError, ConfigError) as error:
        _require_one_line(error)
        return None


def _records(out: Path) -> dict[str, Any]:
    manifest = Manifest.open(out)
    found = {record.id: record for record in map(manifest.read_record, range(len(manifest)))}
    manifest.close()
    return found


_BOMS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
_KNOWABLE = ("utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "cp1252")  # which of the others it is nobody can tell
_ENCODINGS = (*_KNOWABLE, "latin-1", "mac-roman", "cp1250")


def tables(_: int) -> list[Trial]:
    """Encodings, separators, line ends, quotes and decimal marks as spreadsheets of the world write them."""
    kinds = itertools.product(_ENCODINGS, ",;\t|", ("\n", "\r\n", "\r"), (False, True), ".,")
    return [
        Trial(repr(kind), lambda folder, kind=kind: _table_trial(folder, *kind))  # type: ignore[misc]
        for kind in kinds
        if not (kind[1] == "," and kind[4] == "," and not kind[3])  # an unquoted decimal comma between commas
    ]


def _table_trial(folder: Path, encoding: str, separator: str, line_end: str, is_quoted: bool, decimal_mark: str) -> str:
    ids = ["Müller 1", "002", "ça"]
    titles = _TITLES if encoding != "cp1250" else ("Sella", "Nasenrücken", "Größe ő")
    images = [["image_id", "file", "split"], *([name, f"{number}.png", "train"] for number, name in enumerate(ids))]
    marks = [["image_id", "landmark_index", "landmark_name", "x", "y"]]
    for name in ids:
        for index, point in enumerate(_TRUTH):
            x, y = (str(value).replace(".", decimal_mark) for value in point)
            marks.append([name, str(index), titles[index], x, y])
    _films(folder, [f"{number}.png" for number in range(len(ids))])
    for name, rows in (("images.csv", images), ("landmarks.csv", marks)):
        cells = ([f'"{cell}"' if is_quoted else cell for cell in row] for row in rows)
        text = line_end.join(separator.join(row) for row in cells) + line_end
        (folder / name).write_bytes(_BOMS.get(encoding, b"") + text.encode(encoding))
    if _outcome(folder, folder / "out") is None:
        return REFUSED
    records, spec = _records(folder / "out"), json.loads((folder / "out" / "manifest.json").read_text())["spec"]
    if len(records) != len(ids) or not all(np.allclose(record.points, _TRUTH) for record in records.values()):
        raise WrongError(f"points {[record.points.tolist() for record in records.values()]}")
    texts = [*records, *spec["landmark_names"]]
    if any(re.search("[\ud800-\udfff\ufffd\0]", text) for text in texts):
        raise WrongError(f"texts that are none: {texts!r}")
    if encoding in (*_KNOWABLE, "latin-1") and (set(records) != set(ids) or tuple(spec["landmark_names"]) != titles):
        raise WrongError(f"texts {texts}, wanted {ids} and {titles}")
    return RIGHT


_WORDS = (
    *(("0", "0"), ("0.0", "0.0"), ("-1", "-1"), ("-1.0", "-1.0"), ("-999", "-999"), ("-9999", "-9999")),
    *(("", ""), ("nan", "nan"), ("NaN", "NaN"), ("NA", "NA"), ("null", "null"), ("-", "-"), ("?", "?")),
    *(("99999", "99999"), ("1e9", "1e9"), ("inf", "inf"), ("", "20"), ("nan", "20")),
)


def sentinels(_: int) -> list[Trial]:
    """What people write for a landmark that is not seen: never a label, unless a warning names it."""
    kinds = itertools.product(_WORDS, ("three films", "every film", "a whole film"), (False, True), (False, True))
    return [Trial(repr(kind), lambda folder, kind=kind: _sentinel_trial(folder, *kind)) for kind in kinds]  # type: ignore[misc]


def _sentinel_trial(folder: Path, word: tuple[str, str], where: str, is_clipped: bool, has_size: bool) -> str:
    count = 7
    images = [f"image_id,file,split{',orig_width,orig_height' if has_size else ''}"]
    marks = ["image_id,landmark_index,landmark_name,x,y"]
    for number in range(count):
        images.append(f"{number},{number}.png,train{f',{WIDTH},{HEIGHT}' if has_size else ''}")
        for index, point in enumerate(_TRUTH):
            unseen = {
                "three films": index == 1 and number in (1, 3, 6),
                "every film": index == 1,
                "a whole film": number == 1,
            }[where]
            x, y = word if unseen else point
            marks.append(f"{number},{index},Lm{index},{x},{y}")
    _films(folder, [f"{number}.png" for number in range(count)])
    (folder / "images.csv").write_text("\n".join(images) + "\n")
    (folder / "landmarks.csv").write_text("\n".join(marks) + "\n")
    summary = _outcome(folder, folder / "out", clip_landmarks=is_clipped)
    if summary is None:
        return REFUSED
    named = set()
    for record in _records(folder / "out").values():
        if record.points is None:
            continue
        off = np.abs(record.points - _TRUTH).max(axis=1)
        named |= {index for index in range(len(_TRUTH)) if off[index] > 1e-6}  # not a number is no label
    warnings = " ".join(summary.warnings)
    for index in named:
        if f"Lm{index}" not in warnings:
            raise WrongError(f"{word} became a label of Lm{index} and no warning says so: {summary.warnings}")
    return WARNED if named else RIGHT


# --- patients


_PATIENTS = {
    "8 digits": [str(10000032 + number) for number in range(8)],
    "leading zeros": [f"{number:06d}" for number in range(8)],
    "short": [f"P{number}" for number in range(8)],
    "16 and more": [f"patient-{number:012d}" for number in range(8)],
}
_PACK_KINDS = ("table", "keyed table", "dicom", "folder")  # a folder knows no patients, which is to be said


def patients(_: int) -> list[Trial]:
    """A pool of 16 films of 8 patients, and a set in whose test split 4 of these are: 8 films go, or it is said."""
    kinds = itertools.product(_PATIENTS, _PACK_KINDS, _PACK_KINDS, (False, True))
    return [
        Trial(repr(kind), lambda folder, kind=kind: _patients_trial(folder, *kind))  # type: ignore[misc]
        for kind in kinds
        if kind[1:3] != ("folder", "folder")  # where nobody knows a patient there is nothing to say
    ]


def _patients_trial(folder: Path, ids: str, pool: str, protected: str, is_one_key: bool) -> str:
    names = _PATIENTS[ids]
    made = {
        "pool": (pool, [names[number // 2] for number in range(16)], 100),
        "set": (protected, names[:4], 900),
    }
    for name, (kind, persons, first) in made.items():
        _patients_pack(folder, name, kind, persons, first, folder / ("key" if is_one_key else f"{name}.key"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = run(["shards", "compare", str(folder / "pool.pack"), "--protect", str(folder / "set.pack")])
    said = " ".join(text.getvalue().split())
    if code not in (0, 3):
        raise WrongError(f"exit {code}: {said}")
    if re.search(r"\b8 images would be left out", said):
        return RIGHT
    if re.search(r"patient[^.]*(not compared|cannot|only within)", said, re.IGNORECASE):
        return "said that they are not compared"
    raise WrongError(f"neither 8 films left out nor a word about patients: {said[:300]}")


def _patients_pack(folder: Path, name: str, kind: str, persons: list[str], first: int, key: Path) -> None:
    source = folder / name
    source.mkdir()
    if kind == "dicom":
        for number, person in enumerate(persons):
            made = dataset(smooth(first + number, 12), PatientID=person)
            (source / f"{number}.dcm").write_bytes(to_bytes(made))
    else:
        rows = ["image_id,file,split,patient_id"]
        for number, person in enumerate(persons):
            Image.fromarray(smooth(first + number, 8)).save(source / f"{number}.png")
            rows.append(f"{name}{number},{number}.png,{'train' if name == 'pool' else 'test'},{person}")
        if kind != "folder":
            (source / "images.csv").write_text("\n".join(rows) + "\n")
    settings: dict[str, Any] = {}
    id_key = key if kind in ("dicom", "keyed table") else None
    if kind in ("dicom", "folder") and name == "set":
        settings["split"] = "test"
    known: Any = kind.rsplit(maxsplit=1)[-1]
    pack(
        source,
        folder / f"{name}.pack",
        PackSettings(kind=known, name=name, size=32, **settings),
        workers=1,
        id_key=id_key,
    )


FAMILIES: dict[str, Callable[[int], list[Trial]]] = {
    "pictures": pictures,
    "dicom": dicom,
    "spacing": spacing,
    "tables": tables,
    "sentinels": sentinels,
    "patients": patients,
}


def main() -> None:
    """Run all of it, and write how many inputs ended how."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", action="store_true", help="as many as the suite tries, to look at: writes nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = campaign(Path(folder), seed=options.seed, sample=SAMPLE if options.sample else None)
    result = {
        "benchmark": "kinds",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "wall_s": round(time.monotonic() - began, 1),
        "inputs": sum(found.total() for found in outcomes.values()),
        "outcomes": {family: dict(found.most_common()) for family, found in outcomes.items()},
        "hardware": hardware(),
        "versions": versions("pillow", "pydicom", "pylibjpeg-openjpeg", "opencv-python-headless", "numpy"),
    }
    if not options.sample:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(result['outcomes'], indent=1)}\n")


if __name__ == "__main__":
    main()
