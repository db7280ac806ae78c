"""The three public sets of the paper, in the folders and label formats they come in (docs/method.md, section 4).

Two conventions of splits: `paper` is what the released code does, `published` what the papers state. Labels become
native pixels; nothing is rounded.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_lmk.data.images.decode import SUFFIXES, RefusedImageError, native_size
from ddpm_lmk.data.pack_settings import Convention
from ddpm_lmk.data.sources.base import RawDataset, RawSample, parse_decimal
from ddpm_lmk.data.sources.walk import list_files
from ddpm_lmk.data.spec import SPECS, DatasetSpec, pair_spacing
from ddpm_lmk.errors import ConfigError, DataError

# Left out by the released code (docs/method.md, section 3); the papers count them in.
CHEST_EXCLUDED = frozenset(f"CHNCXR_{number:04d}_0" for number in (59, 178, 228, 267, 276, 285, 295, 303, 310))
_CEPH_LANDMARKS, _HAND_LANDMARKS, _CHEST_LANDMARKS = 19, 37, 6
_CEPH_SPLITS: dict[str, tuple[tuple[int, str], ...]] = {  # by the last number of each
    "paper": ((130, "train"), (150, "val"), (400, "test")),
    "published": ((150, "train"), (300, "test1"), (400, "test2")),
}


def read_chest(root: Path, *, convention: Convention) -> RawDataset:
    """Shenzhen: `pngs/CHNCXR_####_0.png`, `labels/CHNCXR_####_0.txt` (a count, then x and y as shares of the sides).

    Splits by position among the sorted label files, 195 / 34 / the rest: 41 without the nine excluded (`paper`), 50
    with them (`published`).
    """
    images = _by_stem(root / "pngs" if (root / "pngs").is_dir() else root)
    labels = {path.stem: path for path in sorted((root / "labels").glob("*.txt")) if not path.name.startswith(".")}
    if not labels:
        raise DataError(f"{root / 'labels'} holds no .txt label files; is this the folder with pngs/ and labels/?")
    excluded = CHEST_EXCLUDED if convention == "paper" else frozenset()
    splits = _by_position([stem for stem in labels if stem not in excluded], (195, 34))
    dataset = RawDataset(SPECS["chest"], samples := [])
    for stem in sorted(images):
        if stem in excluded:
            dataset.refuse(stem, "EXCLUDED", "excluded by the released code; convention=published keeps it")
        elif stem not in labels:
            dataset.refuse(stem, "NO_LABEL", "no label file")
        else:
            ratios = _chest_ratios(labels[stem])
            try:
                size = native_size(images[stem])
            except RefusedImageError as error:
                dataset.refuse(stem, error.code, str(error))
                continue
            points = ratios * np.array(size, dtype=np.float64)  # shares of the sides: not size - 1
            samples.append(RawSample(stem, images[stem], splits[stem], points, size, group=stem))
    _warn_when_partial(dataset, len(splits), "labelled images")
    return dataset


def _chest_ratios(path: Path) -> np.ndarray:
    lines = _lines(path)
    if not lines or lines[0].strip() != str(_CHEST_LANDMARKS) or len(lines) != 1 + _CHEST_LANDMARKS:
        raise DataError(f"{path}: wanted a line `{_CHEST_LANDMARKS}` and as many lines `x y`, found {len(lines)} lines")
    return _pairs(path, lines[1:], None, first_line=2)


def read_cephalometric(root: Path, *, convention: Convention, annotator: str) -> RawDataset:
    """ISBI 2015: images `001` to `400` (jpg, bmp or png, in any subfolder), labels in `400_junior/` and `400_senior/`.

    Each label file has 19 lines `x,y` in native pixels, then class digits, which are ignored. `annotator` is `mean`,
    `junior` or `senior`. Splits by number: 130 / 20 / 250 (`paper`), or 150 train, test1 to 300, test2 (`published`).
    """
    if annotator not in ("mean", "junior", "senior"):
        raise ConfigError(f"annotator={annotator!r}; wanted mean, junior or senior")
    readers = ("junior", "senior") if annotator == "mean" else (annotator,)
    folders = [_find_folder(root, f"400_{reader}") for reader in readers]
    images = {stem: path for stem, path in _by_stem(root).items() if re.fullmatch("[0-9]{3}", stem)}
    dataset = RawDataset(SPECS["cephalometric"], samples := [])
    for stem, path in sorted(images.items()):
        files = [folder / f"{stem}.txt" for folder in folders]
        missing = [file.parent.name for file in files if not file.is_file()]
        split = next((name for last, name in _CEPH_SPLITS[convention] if 1 <= int(stem) <= last), None)
        if missing or split is None:
            reason = f"no label file in {missing[0]}" if missing else "not one of 001 to 400"
            dataset.refuse(stem, "NO_LABEL" if missing else "EXCLUDED", reason)
            continue
        points = np.mean([_ceph_points(file) for file in files], axis=0)  # the challenge's ground truth
        samples.append(RawSample(stem, path, split, points, group=stem))
    _warn_when_partial(dataset, 400, "cephalograms")
    return dataset


def _ceph_points(path: Path) -> np.ndarray:
    lines = _lines(path)
    if len(lines) < _CEPH_LANDMARKS or (len(lines) > _CEPH_LANDMARKS and "," in lines[_CEPH_LANDMARKS]):
        raise DataError(
            f"{path}: wanted {_CEPH_LANDMARKS} lines `x,y` and then class digits; the number of points differs"
        )
    return _pairs(path, lines[:_CEPH_LANDMARKS], ",", first_line=1)


def read_hand(root: Path, *, spacing_pair: tuple[int, int] | None) -> RawDataset:
    """Digital hand atlas: `jpg/ID.jpg`, `labels/all.csv` (no header: id, then 37 times x and y in native pixels).

    Splits by position among images that have a row, sorted as text: 550 / 59 / the rest, in both conventions.
    `spacing_pair` names the two landmarks that lie 50 mm apart; null: the annotators' own pair (see `spec`).
    """
    images = _by_stem(root / "jpg" if (root / "jpg").is_dir() else root)
    rows = _hand_rows(root / "labels" / "all.csv")
    spec = SPECS["hand"]
    if spacing_pair is not None:
        spec = DatasetSpec.model_validate(dict(spec) | {"spacing": pair_spacing(spacing_pair)})
    labelled = [stem for stem in sorted(images) if stem in rows]
    splits = _by_position(labelled, (550, 59))
    dataset = RawDataset(spec, [RawSample(s, images[s], splits[s], rows[s], group=s) for s in labelled])
    for stem in sorted(images.keys() - rows.keys()):
        dataset.refuse(stem, "NO_LABEL", "no row in all.csv")
    _warn_when_partial(dataset, len(rows), "rows of all.csv")
    return dataset


def _hand_rows(path: Path) -> dict[str, np.ndarray]:
    rows: dict[str, np.ndarray] = {}
    if not path.is_file():
        raise DataError(f"{path} is missing; wanted a folder with jpg/ and labels/all.csv")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if len(row) != 1 + 2 * _HAND_LANDMARKS:
                raise DataError(f"{where}: {len(row)} fields, {1 + 2 * _HAND_LANDMARKS} wanted (id and 37 points)")
            if row[0] in rows:
                raise DataError(f"{where}: image {row[0]!r} comes twice; remove one of the rows")
            rows[row[0]] = np.array([parse_decimal(text, where) for text in row[1:]]).reshape(-1, 2)
    return rows


def _by_stem(root: Path) -> dict[str, Path]:
    """The image files below a folder by their names without suffix. Raises DataError when there is none."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    images: dict[str, Path] = {}
    for _, name in list_files(root, SUFFIXES, str, Counter()):
        path = root / name
        if images.setdefault(path.stem, path) is not path:
            raise DataError(f"{path.stem} is there twice: {images[path.stem]} and {path}; keep one")
    return images


def _by_position(names: Sequence[str], counts: tuple[int, int]) -> dict[str, str]:
    """Sorted names: the first are train, the next val, the rest test."""
    train, val = counts
    return {n: "train" if i < train else "val" if i < train + val else "test" for i, n in enumerate(sorted(names))}


def _find_folder(root: Path, name: str) -> Path:
    folders = [path for path in sorted(root.rglob(name)) if path.is_dir()]
    if len(folders) != 1:
        raise DataError(f"{len(folders)} folders named {name} below {root}, one wanted")
    return folders[0]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not plain text; wanted digits only") from error


def _pairs(path: Path, lines: list[str], separator: str | None, *, first_line: int) -> np.ndarray:
    points = []
    for number, line in enumerate(lines, first_line):
        fields = line.strip().split(separator)
        if len(fields) != 2:
            raise DataError(f"{path} line {number}: {line!r} is not a pair of coordinates")
        points.append([parse_decimal(text, f"{path} line {number}") for text in fields])
    return np.array(points)


def _warn_when_partial(dataset: RawDataset, whole: int, what: str) -> None:
    if len(dataset.samples) < whole:
        dataset.warnings.append(
            f"{len(dataset.samples)} of {whole} {what} are here; splits and scores are not those of the full set"
        )
