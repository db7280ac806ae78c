"""`--kind table`: images and landmarks of one's own, in two CSV files beside the images (design, section 8).

`images.csv`: `image_id,file,split[,patient_id,mm_per_pixel,orig_width,orig_height]`; `landmarks.csv`, optional:
`image_id,landmark_index,landmark_name,x,y[,annotator]`, in pixels of the original size, which `orig_width` and
`orig_height` state where the file is stored smaller. Other columns are ignored. Every refusal names file and line.
DICOM files state their spacing themselves; what the column `mm_per_pixel` says goes before it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from ddpm_lmk.data.decoding import with_spacing_of_files
from ddpm_lmk.data.raw import RawDataset, RawSample, check_split_name, parse_decimal
from ddpm_lmk.data.spec import SPECS, DatasetSpec, FileSpacing, NoSpacing, PairSpacing
from ddpm_lmk.errors import ConfigError, DataError

IMAGES_CSV, LANDMARKS_CSV = "images.csv", "landmarks.csv"


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
) -> RawDataset:
    """Read both files.

    Args:
        split: overrides the column `split`, which may then be absent.
        annotator: `mean` over all readers, or the name of one: a value of the column `annotator`, or the NAME of a file
            `landmarks_NAME.csv`.
        spec: name of a known set whose landmarks, unit, thresholds and spacing rule apply; null: made from the table.
        keep_unlabelled: in a table with landmarks, keep images without any, instead of listing them as refused.

    Raises:
        DataError: a missing column, a doubled id, a label that is incomplete, doubled or not a number.
    """
    samples = _images(root, split)
    label_file = root / f"landmarks_{annotator}.csv"
    label_file = label_file if label_file.is_file() else root / LANDMARKS_CSV
    if not label_file.is_file():
        if spec is not None or annotator != "mean" or unit == "mm":
            raise DataError(f"{label_file} is missing, but labels are asked for (spec, annotator or unit=mm)")
        return RawDataset(DatasetSpec(name=name), sorted(samples.values(), key=lambda sample: sample.id))
    chosen = "mean" if label_file.name != LANDMARKS_CSV else annotator
    names, labels = _landmarks(label_file, chosen)
    found = RawDataset(DatasetSpec(name=name), labelled := [])
    for sample_id in sorted(samples):
        if sample_id in labels:
            labelled.append(_with_points(samples[sample_id], labels[sample_id]))
        elif keep_unlabelled:
            labelled.append(samples[sample_id])
        else:
            found.refuse(sample_id, "NO_LABEL", f"no row in {label_file.name}")
    for sample_id in sorted(set(labels) - set(samples)):
        found.refuse(sample_id, "NO_IMAGE", f"labels without a row in {IMAGES_CSV}")
    found.samples, missing = with_spacing_of_files(labelled)
    if spec is None:
        found.spec = _own_spec(name, names, labelled, missing, unit, thresholds, spacing_pair)
    else:
        found.spec = _known_spec(spec, names, label_file, unit, thresholds, spacing_pair)
    return found


def _images(root: Path, split: str | None) -> dict[str, RawSample]:
    path = root / IMAGES_CSV
    wanted = ("image_id", "file") if split is not None else ("image_id", "file", "split")
    samples: dict[str, RawSample] = {}
    for where, row in _rows(path, wanted):
        sample_id, file = row["image_id"], PurePosixPath(row["file"])
        if not sample_id or sample_id in samples:
            raise DataError(
                f"{where}: image_id {sample_id!r} is {'there twice' if sample_id else 'empty'}; ids must differ"
            )
        if file.is_absolute() or ".." in file.parts:
            raise DataError(f"{where}: file {row['file']!r} leaves the table's folder; write a path below it")
        samples[sample_id] = RawSample(
            id=sample_id,
            path=root / file,
            split=check_split_name(split if split is not None else row["split"], where),
            native_size=_size(row, where),
            mm_per_px=_positive(row.get("mm_per_pixel"), where, "mm_per_pixel"),
            group=row.get("patient_id") or None,
        )
    if not samples:
        raise DataError(f"{path} has no rows; nothing to pack")
    return samples


def _size(row: dict[str, str], where: str) -> tuple[int, int] | None:
    sides = [_positive(row.get(key), where, key) for key in ("orig_width", "orig_height")]
    if sides == [None, None]:
        return None
    if any(side is None or side != int(side) for side in sides):
        raise DataError(f"{where}: orig_width and orig_height must both be whole numbers of pixels, or both be empty")
    width, height = (int(side) for side in sides if side is not None)
    return width, height


def _positive(text: str | None, where: str, column: str) -> float | None:
    if not text:
        return None
    value = parse_decimal(text, f"{where}, {column}")
    if value <= 0:
        raise DataError(f"{where}: {column}={text}, wanted more than 0; leave it empty where it is unknown")
    return value


def _landmarks(path: Path, annotator: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Landmark names, and `[N, 2]` native px per image: of one annotator, or the mean over all of them."""
    marks: dict[str, dict[int, dict[str, tuple[float, float]]]] = {}
    names: dict[int, str] = {}
    annotators: set[str] = set()
    for where, row in _rows(path, ("image_id", "landmark_index", "x", "y")):
        reader = row.get("annotator") or ""
        annotators.add(reader)
        index = _index(row["landmark_index"], where)
        title = row.get("landmark_name") or f"p{index}"
        if names.setdefault(index, title) != title:
            raise DataError(f"{where}: landmark {index} is called {title!r} here and {names[index]!r} before")
        readers = marks.setdefault(row["image_id"], {}).setdefault(index, {})
        if reader in readers:
            raise DataError(
                f"{where}: landmark {index} of image {row['image_id']!r} is there twice; remove one of the rows"
            )
        readers[reader] = (parse_decimal(row["x"], where), parse_decimal(row["y"], where))
    if not names or sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: landmark_index must run from 0 without a gap, found {sorted(names)}")
    if annotator != "mean":
        if annotator not in annotators:
            raise ConfigError(f"annotator={annotator!r}, but {path.name} has {', '.join(sorted(annotators))}; or mean")
        marks = _of_one(marks, annotator)
    return tuple(names[index] for index in sorted(names)), _means(path, marks, len(names))


def _of_one(
    marks: dict[str, dict[int, dict[str, tuple[float, float]]]], annotator: str
) -> dict[str, dict[int, dict[str, tuple[float, float]]]]:
    """Keep one annotator's rows; images this annotator did not label fall out."""
    kept = {
        image: {index: {annotator: readers[annotator]} for index, readers in points.items() if annotator in readers}
        for image, points in marks.items()
    }
    return {image: points for image, points in kept.items() if points}


def _means(
    path: Path, marks: dict[str, dict[int, dict[str, tuple[float, float]]]], count: int
) -> dict[str, np.ndarray]:
    means: dict[str, np.ndarray] = {}
    for image, points in marks.items():
        readers = {reader for found in points.values() for reader in found}
        gap = next((i for i in range(count) if set(points.get(i, ())) != readers), None)
        if gap is not None:
            raise DataError(
                f"{path}: image {image!r} lacks landmark {gap}; each annotator must give all {count}, or none"
            )
        means[image] = np.array([np.mean([points[i][r] for r in sorted(readers)], axis=0) for i in range(count)])
    return means


def _index(text: str, where: str) -> int:
    value = parse_decimal(text, f"{where}, landmark_index")
    if value != int(value) or not 0 <= value < 10_000:
        raise DataError(f"{where}: landmark_index={text}, wanted a whole number from 0")
    return int(value)


def _with_points(sample: RawSample, points: np.ndarray) -> RawSample:
    return RawSample(sample.id, sample.path, sample.split, points, sample.native_size, sample.mm_per_px, sample.group)


def _own_spec(
    name: str,
    names: tuple[str, ...],
    samples: list[RawSample],
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
    return DatasetSpec.model_validate(
        {"name": name, "landmark_names": names, "unit": chosen, "sdr_thresholds": thresholds, "spacing": spacing}
    )


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
    return DatasetSpec.model_validate({**dict(spec), **changes})


def _rows(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as dictionaries, each with `file line n`; checks that the wanted columns are there and rows are whole."""
    if not path.is_file():
        raise DataError(f"{path} is missing; a table is a folder with {IMAGES_CSV} and, for labels, {LANDMARKS_CSV}")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        header = [column.strip() for column in next(_whole(reader, path), [])]
        missing = [column for column in wanted if column not in header]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(header) or 'nothing'}")
        for row in _whole(reader, path):
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{path} line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
            yield f"{path} line {reader.line_num}", dict(zip(header, row))


def _whole(reader: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})") from error
