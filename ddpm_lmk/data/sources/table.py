"""`--kind table`: one's own images and landmarks, in two CSV files beside the images (docs/design.md, section 8).

`images.csv`: `image_id,file,split[,patient_id,mm_per_pixel,orig_width,orig_height]`; `landmarks.csv`, optional:
`image_id,landmark_index,landmark_name,x,y[,annotator]`, in pixels of the original size, which `orig_width` and
`orig_height` state where the file is stored smaller. Other columns are ignored; how the text may be written is decided
in `csv_file`. DICOM files state their spacing themselves; what the column `mm_per_pixel` says goes before it.

An image whose label is not whole is left out by name; a label that contradicts itself stops the packing, with file and
line. A landmark that was not seen has no row, empty cells, or a placeholder: nan, (0, 0), (-1, -1), (-999, -999).
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import RawDataset, RawSample, check_split_name
from ddpm_lmk.data.sources.csv_file import CsvFile, read_csv
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.labelled import (
    LabelSet,
    Marks,
    check_annotator,
    check_pixels,
    hashed,
    id_of,
    label,
    landmark_title,
    one_spelling,
)
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.errors import DataError

IMAGES_CSV, LANDMARKS_CSV = "images.csv", "landmarks.csv"

_SIZES = ("mm_per_pixel", "orig_width", "orig_height")
_NOTHING = frozenset({"", "-", "?", ".", "nan", "na", "n/a", "#n/a", "null", "none", "unknown"})
_MOST_OF_A_PATIENT, _FEW_IMAGES = 0.5, 8
_MOST_LANDMARKS = 10_000


def read_table(root: Path, settings: PackSettings, keys: KeyedIds | None) -> RawDataset:
    """Read both files.

    Of the settings, `split` overrides the column, which may then be absent; `annotator` is `mean` over all readers, or
    one: a value of the column `annotator`, or the NAME of a file `landmarks_NAME.csv`; `spec` names a known set whose
    landmarks, unit, thresholds and spacing rule apply. `keys` hash image_id and patient_id; null: they are kept.

    Raises:
        DataError: a missing column, a doubled id, a label that is doubled or not a number.
        ConfigError: an annotator, spec or spacing pair that is not there.
        LaunchError: a decoding process cannot be started.
    """
    if root.is_file():
        raise DataError(f"{root} is a file; a table is given as the folder that holds {IMAGES_CSV}")
    dataset = RawDataset(DatasetSpec(name=settings.name), [], keys=keys)
    samples = _read_images(root, settings.split, dataset)
    label_file, annotator = root / f"landmarks_{settings.annotator}.csv", "mean"
    if not label_file.is_file():
        label_file, annotator = root / LANDMARKS_CSV, settings.annotator
    if label_file.is_file():
        labels = _read_landmarks(label_file, annotator, dataset)
        rows = {*samples, *(line["id"] for line in dataset.refused)}
        _compare_ids(dataset, rows, {*labels.points, *labels.gaps}, labels.path)
        label(dataset, samples, labels, settings)
    elif settings.spec is not None or settings.annotator != "mean" or settings.unit == "mm":
        raise DataError(f"{label_file} is missing, but labels are asked for (spec, annotator or unit=mm)")
    else:
        dataset.samples = sorted(samples.values(), key=id_of)
    return dataset if keys is None else hashed(dataset, keys, root)


# --- images


def _read_images(root: Path, split: str | None, dataset: RawDataset) -> dict[str, RawSample]:
    path = root / IMAGES_CSV
    if not path.is_file():
        raise DataError(f"{path} is missing; a table is a folder with {IMAGES_CSV} and, for labels, {LANDMARKS_CSV}")
    wanted = ("image_id", "file") if split is not None else ("image_id", "file", "split")
    table = read_csv(path, wanted, numbers=_SIZES, verbatim=("file",))
    dataset.warnings += table.warnings
    samples: dict[str, RawSample] = {}
    ids: set[str] = set()
    patients: Counter[str] = Counter()
    for where, row in table.rows():
        sample_id, patient = one_spelling(row["image_id"]), one_spelling(row.get("patient_id", ""))
        if not sample_id or sample_id in ids:
            raise DataError(
                f"{where}: image_id {sample_id!r} is {'there twice' if sample_id else 'empty'}; ids must differ"
            )
        ids.add(sample_id)
        if not row["file"].strip():
            line = where.rpartition(" line ")[2]
            dataset.refuse(sample_id, "UNREADABLE", f"line {line} of {IMAGES_CSV} names no file")
            continue
        samples[sample_id] = RawSample(
            id=sample_id,
            path=_place(root, row["file"], table.encoding, where),
            split=check_split_name(split if split is not None else row["split"], where),
            native_size=_size(table, row, where),
            mm_per_px=_positive(table, row.get("mm_per_pixel"), where, "mm_per_pixel"),
            group=None if patient.lower() in _NOTHING else patient,
        )
        patients.update([patient] if patient.lower() not in _NOTHING else [])
    if not ids:
        raise DataError(f"{path} has no rows; nothing to pack")
    # One "patient" of most images is a word for an unknown one, and would make all of them leak into one another.
    if patients.total() >= _FEW_IMAGES:
        _, count = patients.most_common(1)[0]
        if count > _MOST_OF_A_PATIENT * patients.total():
            dataset.warnings.append(
                f"{count} of {patients.total()} images have one patient_id; "
                "if it stands for unknown patients, leave the cells empty"
            )
    return samples


def _place(root: Path, file: str, encoding: str, where: str) -> Path:
    """The file that a row names; where there is none of this spelling, one that the table's program respelled."""
    plain = file.strip()
    spellings = dict.fromkeys((file, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))))
    if encoding == "cp1252":  # names on the disk may be as old as the table
        spellings[os.fsdecode(plain.encode("cp1252"))] = None
    spellings |= dict.fromkeys(spelling.replace("\\", "/") for spelling in tuple(spellings))
    for spelling in spellings:
        if spelling.startswith("/") or ".." in spelling.split("/"):
            raise DataError(f"{where}: file {plain!r} leaves the table's folder; write a path below it")
    if len(spellings) == 1:  # nearly always: the disk need not be asked, which takes long for a million rows
        return root / plain
    # os.path: what is no name at all does not exist
    return root / next((spelling for spelling in spellings if os.path.exists(root / spelling)), plain)  # noqa: PTH110


def _size(table: CsvFile, row: dict[str, str], where: str) -> tuple[int, int] | None:
    width, height = (_positive(table, row.get(key), where, key) for key in ("orig_width", "orig_height"))
    if width is None and height is None:
        return None
    if width is None or height is None or width != int(width) or height != int(height):
        raise DataError(f"{where}: orig_width and orig_height must both be whole numbers of pixels, or both be empty")
    return int(width), int(height)


def _positive(table: CsvFile, text: str | None, where: str, column: str) -> float | None:
    if not text:
        return None
    value = table.number(text, f"{where}, {column}")
    if value <= 0:
        raise DataError(f"{where}: {column}={text}, wanted more than 0; leave it empty where it is unknown")
    return value


# --- labels


def _compare_ids(dataset: RawDataset, images: set[str], labelled: set[str], path: Path) -> None:
    """Warn of ids of one file that are not in the other, and name what they were probably meant to match.

    Raises:
        DataError: not a single one is.
    """
    strangers = sorted(labelled - images)
    without = {_simplified(name): name for name in sorted(images - labelled)}
    alike = [(name, without[key]) for name in strangers if (key := _simplified(name)) in without]
    example = f", e.g. {alike[0][0]!r} and {alike[0][1]!r}" if alike else ""
    cure = "write both alike (spreadsheets take leading zeros away)" if alike else "write both alike"
    if strangers and not labelled & images:
        example = example or f", e.g. {strangers[0]!r} and {min(images)!r}"
        raise DataError(f"no image_id of {path} is in {IMAGES_CSV}: they do not match{example}; {cure}")
    if alike:
        dataset.warnings.append(f"{len(alike)} ids of {path.name} and {IMAGES_CSV} do not match{example}; {cure}")
    if strangers:
        dataset.warnings.append(f"{len(strangers)} ids of {path.name} are not in {IMAGES_CSV}, first {strangers[0]!r}")


def _simplified(name: str) -> str:
    """An id without what programs add or take: folders, suffixes of pictures, case, leading zeros, blanks."""
    name = name.lower().replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    if dot and (f".{suffix}" in SUFFIXES or suffix in ("dcm", "dicom", "0")):  # 12.0: a number of a spreadsheet
        name = stem
    return "".join(name.split()).lstrip("0") or "0"


def _read_landmarks(path: Path, annotator: str, dataset: RawDataset) -> LabelSet:
    """Of one annotator, or the mean over all of them."""
    table = read_csv(path, ("image_id", "landmark_index", "x", "y"), numbers=("x", "y"))
    dataset.warnings += table.warnings
    marks: dict[str, Marks] = {}
    names: dict[int, str] = {}
    for where, row in table.rows():
        reader, image = row.get("annotator") or "", one_spelling(row["image_id"])
        index = _index(table, row["landmark_index"], where)
        title = landmark_title(row.get("landmark_name") or f"p{index}", where)
        if names.setdefault(index, title) != title:
            raise DataError(f"{where}: landmark {index} is called {title!r} here and {names[index]!r} before")
        of_image = marks.setdefault(image, {})
        if (index, reader) in of_image:
            raise DataError(f"{where}: landmark {index} of image {image!r} is there twice; remove one of the rows")
        of_image[index, reader] = _mark(table, row, where)
    _check_names(path, names)
    points = [mark for of_image in marks.values() for mark in of_image.values() if not isinstance(mark, str)]
    check_pixels(path, points)
    annotators = {reader for of_image in marks.values() for _, reader in of_image}
    check_annotator(path, annotator, annotators)
    labels = LabelSet(path, tuple(names[index] for index in sorted(names)))
    for image, of_image in marks.items():
        labels.add(image, of_image, annotator)
    return labels


def _index(table: CsvFile, text: str, where: str) -> int:
    value = table.number(text, f"{where}, landmark_index")
    if value != int(value) or not 0 <= value < _MOST_LANDMARKS:
        raise DataError(f"{where}: landmark_index={text}, wanted a whole number from 0")
    return int(value)


def _mark(table: CsvFile, row: dict[str, str], where: str) -> tuple[float, float] | str:
    """The position, or in words why there is none."""
    line = where.rpartition(" line ")[2]
    if row["x"].lower() in _NOTHING or row["y"].lower() in _NOTHING:
        return f"has no coordinates (line {line})"
    x, y = table.number(row["x"], where), table.number(row["y"], where)
    if x == y and (x == 0 or x <= -1):  # one coordinate of 0 alone may be a landmark on the edge
        return f"is at ({x:g}, {y:g}) (line {line}), which tables write for not seen"
    return x, y


def _check_names(path: Path, names: dict[int, str]) -> None:
    """Landmarks are numbered from 0 without a gap, and each has a name of its own."""
    if names and sorted(names) == list(range(1, len(names) + 1)):
        raise DataError(f"{path}: landmark_index runs from 1 to {len(names)}, wanted from 0; subtract 1 in every row")
    if not names or sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: landmark_index must run from 0 without a gap, found {sorted(names)}")
    first: dict[str, int] = {}
    for index, name in sorted(names.items()):
        if first.setdefault(name, index) != index:
            raise DataError(
                f"{path}: landmarks {first[name]} and {index} are both called {name!r}; "
                f"give each a name of its own, e.g. '{name} left' and '{name} right'"
            )
