"""Readers of films without labels: any tree or list of pictures, tars of them, DICOM trees."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.images.dicom import require_pydicom
from ddpm_lmk.data.sources.base import RawDataset, RawSample, TarMember, check_split_name, folder_split, ordered_splits
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.tar import DamagedTarError, members
from ddpm_lmk.data.sources.walk import Listing, describe_others, list_files, walk
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.errors import DataError


def read_folder(
    source: Path, *, name: str, split: str, val_fraction: float, seed: int, keys: KeyedIds | None = None
) -> RawDataset:
    """Any tree of images, a list of them, or tars, without labels. The id is the path in there without its suffix.

    Tars are given as one, or as a folder of them, each of which is then a folder of its own for the ids. A share
    `val_fraction` goes to split `val`, chosen by a hash of the id: added images move no others.
    """
    check_split_name(split, "--split")
    id_of = keys.of_path if keys else _without_suffix
    tars = _tars_of(source)
    if tars:
        found = _read_tars(source, tars, id_of, name, split, val_fraction, seed)
    else:
        others: Counter[str] = Counter()
        found = _listed(source, list_files(source, SUFFIXES, id_of, others), name, split, val_fraction, seed)
        if others:
            found.warnings.append(
                f"{others.total()} files with other suffixes were not looked at ({describe_others(others)})"
            )
    found.keys = keys
    return found


def read_dicom_tree(
    source: Path, *, name: str, split: str, val_fraction: float, seed: int, keys: KeyedIds
) -> RawDataset:
    """Any tree of DICOM files, whatever their names, or a list of them. Ids and patients are keyed hashes.

    The validation share is chosen by patient where the files name one.
    """
    check_split_name(split, "--split")
    require_pydicom()
    listing = list_files(source, None, keys.of_path, Counter())
    found = _listed(source, listing, name, split, val_fraction, seed)
    found.keys = keys
    return found


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122 - strings: there may be millions


def _listed(
    source: Path, listing: Listing, name: str, split: str, val_fraction: float, seed: int, *, in_tars: bool = False
) -> RawDataset:
    root = source if source.is_dir() else source.parent
    splits = {split} if val_fraction == 0 else {"val"} if val_fraction == 1 else {split, "val"}
    samples = _ListedSamples(root, listing, split, val_fraction, seed, in_tars)
    return RawDataset(unlabelled(name), samples, splits=ordered_splits(splits), listing=listing)


@dataclass(frozen=True)
class _ListedSamples:
    """Samples made when they are asked for: a million files are no million objects."""

    root: Path
    listing: Listing
    split: str
    val_fraction: float
    seed: int
    in_tars: bool = False

    def __len__(self) -> int:
        return len(self.listing)

    def __iter__(self) -> Iterator[RawSample]:
        for sample_id, path in self.listing:
            where = _tar_member(self.root, path) if self.in_tars else self.root / path
            yield RawSample(sample_id, where, folder_split(sample_id, self.split, self.val_fraction, self.seed))


def _tars_of(source: Path) -> list[str]:
    """Names of the tars to read: the source itself, or those in it. Raises DataError where pictures lie beside them."""
    if source.is_file():
        return [source.name] if source.suffix == ".tar" else []
    if not source.is_dir():
        return []
    tars = sorted(path.name for path in source.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if tars and (picture := next(walk(source, SUFFIXES, Counter()), None)) is not None:
        raise DataError(f"{source} holds tars ({tars[0]}) and pictures ({picture}); pack them in two calls")
    return tars


def _read_tars(
    source: Path,
    tars: list[str],
    id_of: Callable[[str], str],
    name: str,
    split: str,
    val_fraction: float,
    seed: int,
) -> RawDataset:
    """Members are read where they lie; what has no business in a tar is refused, JSON members are passed over."""
    refused: list[tuple[str, str]] = []
    damage: list[str] = []
    root = source if source.is_dir() else source.parent

    def names(tar: str) -> Iterator[tuple[str, str]]:
        below = f"{_without_suffix(tar)}/" if source.is_dir() else ""
        try:
            for member, fault in members(root / tar):
                is_image = os.path.splitext(member.name)[1].lower() in SUFFIXES  # noqa: PTH122
                if fault is not None:
                    refused.append((id_of(below + member.name), fault))
                elif is_image:
                    yield id_of(below + member.name), f"{member.offset_data}:{member.size}:{tar}/{member.name}"
        except DamagedTarError as error:
            damage.append(f"{root / tar}: {error}")

    listing = Listing(sample for tar in tars for sample in names(tar))
    if damage:
        raise DataError(f"{damage[0]}; restore it: what follows would be lost")
    if not len(listing):
        raise DataError(f"{source} holds no image; looked for {' '.join(sorted(SUFFIXES))}")
    found = _listed(source, listing, name, split, val_fraction, seed, in_tars=True)
    for sample_id, fault in refused:
        found.refuse(sample_id, "TAR_MEMBER", fault)
    return found


def _tar_member(root: Path, place: str) -> TarMember:
    offset, size, name = place.split(":", 2)
    return TarMember(root / name.partition("/")[0], int(offset), int(size))
