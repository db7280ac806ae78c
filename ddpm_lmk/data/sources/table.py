"""`--kind table`: images and landmarks of one's own, in two CSV files beside the images (design, section 8).

`images.csv`: `image_id,file,split[,patient_id,mm_per_pixel,orig_width,orig_height]`; `landmarks.csv`, optional:
`image_id,landmark_index,landmark_name,x,y[,annotator]`, in pixels of the original size, which `orig_width` and
`orig_height` state where the file is stored smaller. Other columns are ignored; how the text may be written is
`csvfile`'s. DICOM files state their spacing themselves; what the column `mm_per_pixel` says goes before it.

An image whose label is not whole is left out by name; a label that contradicts itself stops the packing, with file and
line. A landmark that was not seen has no row, empty cells, or a placeholder: nan, (0, 0), (-1, -1), (-999, -999).
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.shards.decoding import with_spacing_of_files
from ddpm_lmk.data.sources.base import RawDataset, RawSample, check_split_name
from ddpm_lmk.data.sources.csv_file import CsvFile, read_csv
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.walk import Listing
from ddpm_lmk.data.spec import SPECS, DatasetSpec, FileSpacing, NoSpacing, PairSpacing
from ddpm_lmk.errors import ConfigError, DataError

IMAGES_CSV, LANDMARKS_CSV = "images.csv", "landmarks.csv"
SDR_THRESHOLDS_MM = (2.0, 2.5, 3.0, 4.0)  # of the ISBI 2015 challenge, which cephalometric papers report since

_SIZES = ("mm_per_pixel", "orig_width", "orig_height")
_NOTHING = frozenset({"", "-", "?", ".", "nan", "na", "n/a", "#n/a", "null", "none", "unknown"})
_OFTEN, _OFTEN_SHARE = 3, 0.05  # images in which a landmark lies at the very same place, before that is told
_MOST_OF_A_PATIENT, _FEW_IMAGES = 0.5, 8

Points = dict[int, dict[str, tuple[float, float]]]  # by landmark and annotator


def read_table(
    root: Path,
    *,
    name: str,
    split: str | None,
    annotator: str,
    spec: str | None,
    unit: str | None,
    thresholds: tuple[float, ...],
    spacing_pair: tuple[int, int] | None,
    keep_unlabelled: bool,
    keys: KeyedIds | None = None,
) -> RawDataset:
    """Read both files.

    Args:
        split: overrides the column `split`, which may then be absent.
        annotator: `mean` over all readers, or the name of one: a value of the column `annotator`, or the NAME of a file
            `landmarks_NAME.csv`.
        spec: name of a known set whose landmarks, unit, thresholds and spacing rule apply; null: made from the table.
        keep_unlabelled: in a table with landmarks, keep images without any, instead of listing them as refused.
        keys: hashes image_id and patient_id; null: they are kept as they are.

    Raises:
        DataError: a missing column, a doubled id, a label that is doubled or not a number.
    """
    if root.is_file():
        raise DataError(f"{root} is a file; a table is given as the folder that holds {IMAGES_CSV}")
    found = RawDataset(DatasetSpec(name=name), [], keys=keys)
    samples = _images(root, split, found)
    label_file = root / f"landmarks_{annotator}.csv"
    label_file = label_file if label_file.is_file() else root / LANDMARKS_CSV
    if label_file.is_file():
        chosen = "mean" if label_file.name != LANDMARKS_CSV else annotator
        labels = _landmarks(label_file, chosen, found)
        _join(found, samples, labels, keep_unlabelled=keep_unlabelled)
        found.samples, missing = with_spacing_of_files(list(found.samples))
        if spec is None:
            found.spec = _own_spec(name, labels.names, found.samples, missing, unit, thresholds, spacing_pair)
        else:
            found.spec = _known_spec(spec, labels.names, label_file, unit, thresholds, spacing_pair)
        if not found.spec.sdr_thresholds:
            found.warnings.append(
                f"errors will be in {found.spec.unit}, and no success rate (SDR) is known for them; "
                "give --threshold, once for each, to have it in reports"
            )
    elif spec is not None or annotator != "mean" or unit == "mm":
        raise DataError(f"{label_file} is missing, but labels are asked for (spec, annotator or unit=mm)")
    else:
        found.samples = sorted(samples.values(), key=_id_of)
    return found if keys is None else _hashed(found, keys, root)


def _id_of(sample: RawSample) -> str:
    return sample.id


def _hashed(found: RawDataset, keys: KeyedIds, root: Path) -> RawDataset:
    """The same with ids and patients that say nothing."""
    samples = [
        replace(
            sample,
            id=keys.of_path(sample.id),
            group=None if sample.group is None else keys.of_patient(sample.group),
        )
        for sample in found.samples
    ]
    files = {keys.of_path(s.id): os.path.relpath(str(s.path), root) for s in found.samples}
    refused = [line | {"id": keys.of_path(line["id"])} for line in found.refused]
    listing = Listing(files.items())
    return replace(found, samples=sorted(samples, key=_id_of), refused=refused, listing=listing)


# --- images


def _images(root: Path, split: str | None, found: RawDataset) -> dict[str, RawSample]:
    path = root / IMAGES_CSV
    if not path.is_file():
        raise DataError(f"{path} is missing; a table is a folder with {IMAGES_CSV} and, for labels, {LANDMARKS_CSV}")
    wanted = ("image_id", "file") if split is not None else ("image_id", "file", "split")
    table = read_csv(path, wanted, numbers=_SIZES, verbatim=("file",))
    found.warnings += table.warnings
    samples: dict[str, RawSample] = {}
    seen: set[str] = set()
    patients: Counter[str] = Counter()
    for where, row in table.rows():
        sample_id, patient = _name(row["image_id"]), _name(row.get("patient_id", ""))
        if not sample_id or sample_id in seen:
            raise DataError(
                f"{where}: image_id {sample_id!r} is {'there twice' if sample_id else 'empty'}; ids must differ"
            )
        seen.add(sample_id)
        if not row["file"].strip():
            found.refuse(sample_id, "UNREADABLE", f"line {where.rpartition(' line ')[2]} of {IMAGES_CSV} names no file")
            continue
        sample = RawSample(
            id=sample_id,
            path=_place(root, row["file"], table.encoding, where),
            split=check_split_name(split if split is not None else row["split"], where),
            native_size=_size(table, row, where),
            mm_per_px=_positive(table, row.get("mm_per_pixel"), where, "mm_per_pixel"),
            group=None if patient.lower() in _NOTHING else patient,
        )
        samples[sample_id] = sample
        patients.update(() if sample.group is None else (sample.group,))
    if not seen:
        raise DataError(f"{path} has no rows; nothing to pack")
    if patients and patients.total() >= _FEW_IMAGES:
        patient, count = patients.most_common(1)[0]
        if count > _MOST_OF_A_PATIENT * patients.total():
            found.warnings.append(
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
    sides = [_positive(table, row.get(key), where, key) for key in ("orig_width", "orig_height")]
    if sides == [None, None]:
        return None
    if any(side is None or side != int(side) for side in sides):
        raise DataError(f"{where}: orig_width and orig_height must both be whole numbers of pixels, or both be empty")
    width, height = (int(side) for side in sides if side is not None)
    return width, height


def _positive(table: CsvFile, text: str | None, where: str, column: str) -> float | None:
    if not text:
        return None
    value = table.number(text, f"{where}, {column}")
    if value <= 0:
        raise DataError(f"{where}: {column}={text}, wanted more than 0; leave it empty where it is unknown")
    return value


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


def _join(found: RawDataset, samples: dict[str, RawSample], labels: _Labels, *, keep_unlabelled: bool) -> None:
    """Give every image its label; those without are refused, or kept."""
    rows = {*samples, *(line["id"] for line in found.refused)}
    labelled = {*labels.points, *labels.gaps}
    _compare_ids(found, rows, labelled, labels.path)
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
            found.refuse(sample_id, "NO_LABEL" if index < 0 else "INCOMPLETE_LABEL", reason)
    if gaps:
        which = ", ".join(f"{labels.names[index]} in {count}" for index, count in sorted(gaps.items()))
        what = "kept without label" if keep_unlabelled else "left out"
        found.warnings.append(f"{gaps.total()} images are {what} because a landmark is missing or not seen: {which}")
    found.samples = joined
    _warn_of_repeated_points(found, labels.names, [(s.id, s.points) for s in joined if s.points is not None])


def _compare_ids(found: RawDataset, images: set[str], labelled: set[str], path: Path) -> None:
    """Say which ids of one file are not in the other, and with what they were probably meant to match.

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
        found.warnings.append(f"{len(alike)} ids of {path.name} and {IMAGES_CSV} do not match{example}; {cure}")
    if strangers:
        found.warnings.append(f"{len(strangers)} ids of {path.name} are not in {IMAGES_CSV}, first {strangers[0]!r}")


def _simplified(name: str) -> str:
    """An id without what programs add or take: folders, suffixes of pictures, case, leading zeros, blanks."""
    name = name.lower().replace("\\", "/").rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    if dot and (f".{suffix}" in SUFFIXES or suffix in ("dcm", "dicom", "0")):  # 12.0: a number of a spreadsheet
        name = stem
    return "".join(name.split()).lstrip("0") or "0"


def _warn_of_repeated_points(
    found: RawDataset, names: Sequence[str], labelled: Sequence[tuple[str, np.ndarray]]
) -> None:
    """Positions that repeat to the last digit are placeholders more often than landmarks."""
    for index, name in enumerate(names):
        places = Counter((float(x), float(y)) for _, points in labelled for x, y in points[index : index + 1])
        (x, y), count = places.most_common(1)[0] if places else ((0.0, 0.0), 0)
        if count >= max(_OFTEN, _OFTEN_SHARE * len(labelled)):
            found.warnings.append(
                f"landmark {name} lies at the same place ({x:g}, {y:g}) in {count} of {len(labelled)} images; "
                "where that stands for not seen, leave the cells empty"
            )
    twice: dict[tuple[int, int], list[str]] = {}
    for sample_id, points in labelled:
        first: dict[tuple[float, float], int] = {}
        for index, (x, y) in enumerate(points.tolist()):
            before = first.setdefault((x, y), index)
            if before != index:
                twice.setdefault((before, index), []).append(sample_id)
    for (one, other), where in twice.items():
        found.warnings.append(
            f"landmarks {names[one]} and {names[other]} lie at the same place in {len(where)} images, "
            f"first {where[0]!r}; check that neither is a placeholder"
        )


def _landmarks(path: Path, annotator: str, found: RawDataset) -> _Labels:
    """Of one annotator, or the mean over all of them."""
    table = read_csv(path, ("image_id", "landmark_index", "x", "y"), numbers=("x", "y"))
    found.warnings += table.warnings
    marks: dict[str, Points] = {}
    gaps: dict[str, dict[tuple[int, str], str]] = {}
    names: dict[int, str] = {}
    annotators: set[str] = set()
    for where, row in table.rows():
        reader, image = row.get("annotator") or "", _name(row["image_id"])
        annotators.add(reader)
        index = _index(table, row["landmark_index"], where)
        title = _title(row.get("landmark_name") or f"p{index}", where)
        if names.setdefault(index, title) != title:
            raise DataError(f"{where}: landmark {index} is called {title!r} here and {names[index]!r} before")
        readers, unseen = marks.setdefault(image, {}).setdefault(index, {}), gaps.setdefault(image, {})
        if reader in readers or (index, reader) in unseen:
            raise DataError(f"{where}: landmark {index} of image {image!r} is there twice; remove one of the rows")
        point = _point(table, row, where)
        if isinstance(point, str):
            unseen[index, reader] = point
        else:
            readers[reader] = point
    _check_names(path, names)
    _refuse_shares(path, marks)
    if annotator != "mean" and annotator not in annotators:
        raise ConfigError(f"annotator={annotator!r}, but {path.name} has {', '.join(sorted(annotators))}; or mean")
    labels = _Labels(path, tuple(names[index] for index in sorted(names)))
    for image, points in marks.items():
        _add_mean(labels, image, points, gaps[image], None if annotator == "mean" else annotator)
    return labels


def _point(table: CsvFile, row: dict[str, str], where: str) -> tuple[float, float] | str:
    """The position, or in words why there is none."""
    line = where.rpartition(" line ")[2]
    if row["x"].lower() in _NOTHING or row["y"].lower() in _NOTHING:
        return f"has no coordinates (line {line})"
    x, y = table.number(row["x"], where), table.number(row["y"], where)
    if x == y and (x == 0 or x <= -1):
        return f"is at ({x:g}, {y:g}) (line {line}), which tables write for not seen"
    return x, y


def _title(name: str, where: str) -> str:
    title = " ".join(_name(name).split())
    if any(unicodedata.category(letter) == "Cc" for letter in title):
        raise DataError(f"{where}: landmark_name {title!r} has control characters; give it plain letters")
    return title


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


def _refuse_shares(path: Path, marks: dict[str, Points]) -> None:
    """Coordinates from 0 to 1 would put every landmark into the corner pixel."""
    points = [p for image in marks.values() for readers in image.values() for p in readers.values()]
    if points and all(0 <= value <= 1 for point in points for value in point):
        raise DataError(f"{path}: all x and y lie from 0 to 1, which look like shares; wanted pixels: multiply them")


def _add_mean(
    labels: _Labels, image: str, points: Points, unseen: dict[tuple[int, str], str], annotator: str | None
) -> None:
    """The mean over the annotators of an image, of whom each gives all landmarks; or the first gap."""
    readers = {reader for found in points.values() for reader in found} | {reader for _, reader in unseen}
    if annotator is not None:
        readers &= {annotator}  # images this annotator did not label fall out
    for index, name in enumerate(labels.names):
        for reader in sorted(readers):
            if reader not in points.get(index, {}):
                why = unseen.get((index, reader), f"has no row in {labels.path.name}")
                labels.gaps[image] = index, f"landmark {name} {why}" + (f" of {reader}" if reader else "")
                return
    if readers:
        means = [np.mean([points[i][r] for r in sorted(readers)], axis=0) for i in range(len(labels.names))]
        labels.points[image] = np.array(means)


def _index(table: CsvFile, text: str, where: str) -> int:
    value = table.number(text, f"{where}, landmark_index")
    if value != int(value) or not 0 <= value < 10_000:
        raise DataError(f"{where}: landmark_index={text}, wanted a whole number from 0")
    return int(value)


# --- what the set is


def _own_spec(
    name: str,
    names: tuple[str, ...],
    samples: Iterable[RawSample],
    missing: int,
    unit: str | None,
    thresholds: tuple[float, ...],
    spacing_pair: tuple[int, int] | None,
) -> DatasetSpec:
    """Millimetres only where no labelled image is `missing` its spacing: it is never guessed."""
    if spacing_pair is not None:
        spacing: NoSpacing | FileSpacing | PairSpacing = PairSpacing(i=spacing_pair[0], j=spacing_pair[1], mm=50.0)
    else:
        spacing = NoSpacing() if missing else FileSpacing()
    if unit == "mm" and isinstance(spacing, NoSpacing):
        raise DataError(
            f"unit=mm, but {missing} of {sum(sample.points is not None for sample in samples)} labelled images have no "
            "mm_per_pixel, nor are they DICOM files that state it; fill it in or use px"
        )
    chosen = unit or ("px" if isinstance(spacing, NoSpacing) else "mm")
    thresholds = thresholds or (SDR_THRESHOLDS_MM if chosen == "mm" else ())
    return _checked_spec(
        {"name": name, "landmark_names": names, "unit": chosen, "sdr_thresholds": thresholds, "spacing": spacing}
    )


def _checked_spec(values: dict[str, object]) -> DatasetSpec:
    try:
        return DatasetSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"shards pack: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _known_spec(
    key: str,
    names: tuple[str, ...],
    path: Path,
    unit: str | None,
    thresholds: tuple[float, ...],
    spacing_pair: tuple[int, int] | None,
) -> DatasetSpec:
    if key not in SPECS:
        raise ConfigError(f"spec={key!r} is not known; wanted one of {', '.join(SPECS)}")
    spec = SPECS[key]
    if len(names) != spec.num_landmarks:
        raise DataError(f"{path} has {len(names)} landmarks, spec {key} has {spec.num_landmarks}")
    if names != spec.landmark_names and set(names) == set(spec.landmark_names):
        raise DataError(f"{path} has the landmarks of spec {key} in another order; renumber landmark_index")
    changes: dict[str, object] = {"unit": unit} if unit else {}
    if thresholds:
        changes["sdr_thresholds"] = thresholds
    if spacing_pair is not None:
        changes["spacing"] = PairSpacing(i=spacing_pair[0], j=spacing_pair[1], mm=50.0)
    return _checked_spec({**dict(spec), **changes})
