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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.data.images.decode import SUFFIXES, ReadOptions
from ddpm_lmk.data.images.sandbox import Isolation
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import RawDataset, RawSample, check_split_name
from ddpm_lmk.data.sources.csv_file import CsvFile, read_csv
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.walk import Listing, begins_as_dicom
from ddpm_lmk.data.spec import SPECS, DatasetSpec, FileSpacing, NoSpacing, pair_spacing
from ddpm_lmk.errors import ConfigError, DataError

IMAGES_CSV, LANDMARKS_CSV = "images.csv", "landmarks.csv"
SDR_THRESHOLDS_MM = (2.0, 2.5, 3.0, 4.0)  # of the ISBI 2015 challenge, which cephalometric papers report since

_SIZES = ("mm_per_pixel", "orig_width", "orig_height")
_NOTHING = frozenset({"", "-", "?", ".", "nan", "na", "n/a", "#n/a", "null", "none", "unknown"})
_OFTEN, _OFTEN_SHARE = 3, 0.05  # images in which a landmark lies at the very same place, before that is told
_MOST_OF_A_PATIENT, _FEW_IMAGES = 0.5, 8
_MOST_LANDMARKS = 10_000

Marks = dict[tuple[int, str], tuple[float, float] | str]  # by landmark and annotator: a place, or why there is none


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
        labelled = _join(dataset, samples, labels, keep_unlabelled=settings.keep_unlabelled)
        dataset.samples, num_without = _with_spacing_of_files(labelled)
        num_labelled = sum(sample.points is not None for sample in labelled)
        dataset.spec = _spec_of(labels, settings, num_without, num_labelled)
        if not dataset.spec.sdr_thresholds:
            dataset.warnings.append(
                f"errors will be in {dataset.spec.unit}, and no success rate (SDR) is known for them; "
                "give --threshold, once for each, to have it in reports"
            )
    elif settings.spec is not None or settings.annotator != "mean" or settings.unit == "mm":
        raise DataError(f"{label_file} is missing, but labels are asked for (spec, annotator or unit=mm)")
    else:
        dataset.samples = sorted(samples.values(), key=_id_of)
    return dataset if keys is None else _hashed(dataset, keys, root)


def _id_of(sample: RawSample) -> str:
    return sample.id


def _hashed(dataset: RawDataset, keys: KeyedIds, root: Path) -> RawDataset:
    """The same with pseudonymous ids and patients."""
    samples, files = [], []
    for sample in dataset.samples:
        group = None if sample.group is None else keys.of_patient(sample.group)
        samples.append(replace(sample, id=keys.of_path(sample.id), group=group))
        files.append((samples[-1].id, os.path.relpath(str(sample.path), root)))
    refused = [line | {"id": keys.of_path(line["id"])} for line in dataset.refused]
    return replace(dataset, samples=sorted(samples, key=_id_of), refused=refused, listing=Listing(files))


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
        sample_id, patient = _name(row["image_id"]), _name(row.get("patient_id", ""))
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


def _name(text: str) -> str:
    """A name in one spelling: the same letters may be composed or not, as systems like it."""
    return unicodedata.normalize("NFC", text)


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


def _with_spacing_of_files(samples: list[RawSample]) -> tuple[list[RawSample], int]:
    """The samples with the spacing that their DICOM files state, and how many labelled ones stay without.

    Whether errors can be millimetres must be known before anything is decoded. Only headers are read, in a process of
    their own, and only of labelled files whose labels state no spacing. Files that will be refused do not count.
    """
    unknown = [sample for sample in samples if sample.points is not None and sample.mm_per_px is None]
    files = [sample for sample in unknown if isinstance(sample.path, Path) and begins_as_dicom(sample.path)]
    if not files:
        return samples, len(unknown)
    options = asdict(ReadOptions(frame=0, allow_burned_in=True))  # of all that may be taken
    jobs = (
        {"path": str(sample.path), "options": options, "native_size": sample.native_size, "only_spacing": True}
        for sample in files
    )
    stated: dict[str, float] = {}
    num_refused = 0  # whoever decodes them will say why
    with Isolation(1) as isolation:
        for sample, (fields, _) in zip(files, isolation.answers(jobs), strict=True):
            num_refused += "mm_per_px" not in fields
            if fields.get("mm_per_px") is not None:
                stated[sample.id] = fields["mm_per_px"]
    completed = [replace(sample, mm_per_px=stated.get(sample.id, sample.mm_per_px)) for sample in samples]
    return completed, len(unknown) - len(stated) - num_refused


# --- labels


@dataclass
class _Labels:
    """What a label file says.

    Attributes:
        points: `[N, 2]` native px of every image whose label is whole.
        gaps: of every other image, the landmark that it lacks, and why.
    """

    path: Path
    names: tuple[str, ...]
    points: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: dict[str, tuple[int, str]] = field(default_factory=dict)


def _join(
    dataset: RawDataset, samples: dict[str, RawSample], labels: _Labels, *, keep_unlabelled: bool
) -> list[RawSample]:
    """Give every image its label; those without are refused, or kept."""
    rows = {*samples, *(line["id"] for line in dataset.refused)}
    _compare_ids(dataset, rows, {*labels.points, *labels.gaps}, labels.path)
    joined, gaps = [], Counter[int]()
    for sample_id in sorted(samples):
        if sample_id in labels.points:
            joined.append(replace(samples[sample_id], points=labels.points[sample_id]))
            continue
        index, reason = labels.gaps.get(sample_id, (-1, f"no row in {labels.path.name}"))
        gaps.update((index,) if index >= 0 else ())
        if keep_unlabelled:
            joined.append(samples[sample_id])
        else:
            dataset.refuse(sample_id, "NO_LABEL" if index < 0 else "INCOMPLETE_LABEL", reason)
    if gaps:
        which = ", ".join(f"{labels.names[index]} in {count}" for index, count in sorted(gaps.items()))
        what = "kept without label" if keep_unlabelled else "left out"
        dataset.warnings.append(f"{gaps.total()} images are {what} because a landmark is missing or not seen: {which}")
    points = {sample.id: sample.points for sample in joined if sample.points is not None}
    dataset.warnings += _repeated_points(labels.names, points)
    return joined


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


def _repeated_points(names: Sequence[str], points: dict[str, np.ndarray]) -> list[str]:
    """Warnings: positions that repeat to the last digit are placeholders more often than landmarks."""
    lines = []
    twice: dict[tuple[int, int], list[str]] = {}  # pairs of landmarks at one place, and the images
    places: list[Counter[tuple[float, float]]] = [Counter() for _ in names]
    for sample_id, positions in points.items():
        first: dict[tuple[float, float], int] = {}
        for index, (x, y) in enumerate(positions.tolist()):
            places[index][x, y] += 1
            before = first.setdefault((x, y), index)
            if before != index:
                twice.setdefault((before, index), []).append(sample_id)
    for name, counts in zip(names, places):
        ((x, y), count), *_ = counts.most_common(1) or [((0.0, 0.0), 0)]
        if count >= max(_OFTEN, _OFTEN_SHARE * len(points)):
            lines.append(
                f"landmark {name} lies at the same place ({x:g}, {y:g}) in {count} of {len(points)} images; "
                "where that stands for not seen, leave the cells empty"
            )
    for (one, other), ids in twice.items():
        lines.append(
            f"landmarks {names[one]} and {names[other]} lie at the same place in {len(ids)} images, "
            f"first {ids[0]!r}; check that neither is a placeholder"
        )
    return lines


def _read_landmarks(path: Path, annotator: str, dataset: RawDataset) -> _Labels:
    """Of one annotator, or the mean over all of them."""
    table = read_csv(path, ("image_id", "landmark_index", "x", "y"), numbers=("x", "y"))
    dataset.warnings += table.warnings
    marks: dict[str, Marks] = {}
    names: dict[int, str] = {}
    for where, row in table.rows():
        reader, image = row.get("annotator") or "", _name(row["image_id"])
        index = _index(table, row["landmark_index"], where)
        title = _title(row.get("landmark_name") or f"p{index}", where)
        if names.setdefault(index, title) != title:
            raise DataError(f"{where}: landmark {index} is called {title!r} here and {names[index]!r} before")
        of_image = marks.setdefault(image, {})
        if (index, reader) in of_image:
            raise DataError(f"{where}: landmark {index} of image {image!r} is there twice; remove one of the rows")
        of_image[index, reader] = _mark(table, row, where)
    _check_names(path, names)
    points = [mark for of_image in marks.values() for mark in of_image.values() if not isinstance(mark, str)]
    if points and all(0 <= value <= 1 for point in points for value in point):  # all in the corner pixel
        raise DataError(f"{path}: all x and y lie from 0 to 1, which look like shares; wanted pixels: multiply them")
    annotators = {reader for of_image in marks.values() for _, reader in of_image}
    if annotator != "mean" and annotator not in annotators:
        raise ConfigError(f"annotator={annotator!r}, but {path.name} has {', '.join(sorted(annotators))}; or mean")
    labels = _Labels(path, tuple(names[index] for index in sorted(names)))
    for image, of_image in marks.items():
        # With one annotator, images that this one did not label fall out.
        readers = {reader for _, reader in of_image if annotator in ("mean", reader)}
        _add_mean(labels, image, of_image, sorted(readers))
    return labels


def _index(table: CsvFile, text: str, where: str) -> int:
    value = table.number(text, f"{where}, landmark_index")
    if value != int(value) or not 0 <= value < _MOST_LANDMARKS:
        raise DataError(f"{where}: landmark_index={text}, wanted a whole number from 0")
    return int(value)


def _title(name: str, where: str) -> str:
    title = " ".join(_name(name).split())
    if any(unicodedata.category(letter) == "Cc" for letter in title):  # it will be printed on terminals
        raise DataError(f"{where}: landmark_name {title!r} has control characters; give it plain letters")
    return title


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


def _add_mean(labels: _Labels, image: str, marks: Marks, readers: list[str]) -> None:
    """The mean over the annotators of an image, of whom each gives all landmarks; or the first gap.

    A mean over other readers for each landmark would move the shape, so a gap of one reader costs the image.
    """
    places = np.zeros((len(readers), len(labels.names), 2))
    for index, name in enumerate(labels.names):
        for number, reader in enumerate(readers):
            mark = marks.get((index, reader), f"has no row in {labels.path.name}")
            if isinstance(mark, str):
                labels.gaps[image] = index, f"landmark {name} {mark}" + (f" of {reader}" if reader else "")
                return
            places[number, index] = mark
    if readers:
        labels.points[image] = places.mean(0)


# --- what the set is


def _spec_of(labels: _Labels, settings: PackSettings, num_without: int, num_labelled: int) -> DatasetSpec:
    """The spec of a known set with what the settings change, or one made from the table.

    Millimetres only where none of the labelled images is without its spacing: it is never guessed.
    """
    changes: dict[str, object] = {}
    if settings.spacing_pair is not None:
        changes["spacing"] = pair_spacing(settings.spacing_pair)
    if settings.unit:
        changes["unit"] = settings.unit
    if settings.thresholds:
        changes["sdr_thresholds"] = settings.thresholds
    if settings.spec is not None:
        return _checked_spec(dict(_known_spec(settings.spec, labels)) | changes)
    spacing = changes.setdefault("spacing", NoSpacing() if num_without else FileSpacing())
    if settings.unit == "mm" and isinstance(spacing, NoSpacing):
        raise DataError(
            f"unit=mm, but {num_without} of {num_labelled} labelled images have no mm_per_pixel, nor are they DICOM "
            "files that state it; fill it in or use px"
        )
    unit = changes.setdefault("unit", "px" if isinstance(spacing, NoSpacing) else "mm")
    changes.setdefault("sdr_thresholds", SDR_THRESHOLDS_MM if unit == "mm" else ())
    return _checked_spec({"name": settings.name, "landmark_names": labels.names} | changes)


def _known_spec(key: str, labels: _Labels) -> DatasetSpec:
    if key not in SPECS:
        raise ConfigError(f"spec={key!r} is not known; wanted one of {', '.join(SPECS)}")
    spec, names = SPECS[key], labels.names
    if len(names) != spec.num_landmarks:
        raise DataError(f"{labels.path} has {len(names)} landmarks, spec {key} has {spec.num_landmarks}")
    # Other names are fine, in another language; the same names elsewhere would be scored as other landmarks.
    if names != spec.landmark_names and set(names) == set(spec.landmark_names):
        raise DataError(f"{labels.path} has the landmarks of spec {key} in another order; renumber landmark_index")
    return spec


def _checked_spec(values: dict[str, object]) -> DatasetSpec:
    try:
        return DatasetSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"shards pack: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
