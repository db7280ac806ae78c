"""Readers of images without labels: any tree or list of pictures, tars of them, DICOM trees."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.images.dicom import require_pydicom
from ddpm_lmk.data.pack_settings import PackSettings
from ddpm_lmk.data.sources.base import RawDataset, RawSample, TarMember, check_split_name, folder_split
from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.tar import DamagedTarError, members
from ddpm_lmk.data.sources.walk import Listing, describe_others, list_files, walk
from ddpm_lmk.data.spec import unlabelled
from ddpm_lmk.errors import DataError


def read_folder(source: Path, settings: PackSettings, keys: KeyedIds | None) -> RawDataset:
    """Any tree of images, a list of them, or tars, without labels. The id is the path in there without its suffix.

    Tars are given as one, or as a folder of them, each of which is then a folder of its own for the ids. A share
    `val_fraction` goes to split `val`, chosen by a hash of the id.
    """
    id_of = keys.of_path if keys else _without_suffix
    tars = _tars_of(source)
    if tars:
        return _read_tars(source, tars, id_of, settings, keys)
    others: Counter[str] = Counter()
    dataset = _listed(source, list_files(source, SUFFIXES, id_of, others), settings, keys)
    if others:
        dataset.warnings.append(
            f"{others.total()} files with other suffixes were not looked at ({describe_others(others)})"
        )
    return dataset


def read_dicom_tree(source: Path, settings: PackSettings, keys: KeyedIds | None) -> RawDataset:
    """Any tree of DICOM files, whatever their names, or a list of them. Ids and patients are keyed hashes.

    The validation share is chosen by patient where the files name one.
    """
    assert keys is not None, "DICOM trees are packed with hashed ids only"
    require_pydicom()
    return _listed(source, list_files(source, None, keys.of_path, Counter()), settings, keys)


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122 - strings: there may be millions


def _listed(
    source: Path, listing: Listing, settings: PackSettings, keys: KeyedIds | None, *, in_tars: bool = False
) -> RawDataset:
    share, split = settings.val_fraction, check_split_name(settings.split or "train", "--split")
    samples = _ListedSamples(_root_of(source), listing, split, share, settings.seed, in_tars)
    # Named here, because finding them in the samples would take a pass over millions.
    splits = (split,) if share == 0 else ("val",) if share == 1 else (split, "val")
    return RawDataset(unlabelled(settings.name), samples, splits=splits, listing=listing, keys=keys)


def _root_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


@dataclass(frozen=True)
class _ListedSamples:
    """Samples made when they are asked for: a million files are no million objects."""

    root: Path
    listing: Listing
    split: str
    val_fraction: float
    seed: int
    in_tars: bool

    def __len__(self) -> int:
        return len(self.listing)

    def __iter__(self) -> Iterator[RawSample]:
        for sample_id, path in self.listing:
            place = _tar_member(self.root, path) if self.in_tars else self.root / path
            yield RawSample(sample_id, place, folder_split(sample_id, self.split, self.val_fraction, self.seed))


def _tars_of(source: Path) -> list[str]:
    """Names of the tars to read: the source itself, or those in it. Raises DataError where pictures lie beside them."""
    if source.is_file():
        return [source.name] if source.suffix == ".tar" else []
    if not source.is_dir():
        return []
    tars = sorted(path.name for path in source.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    # Their ids could meet: `a/1.png` beside `a.tar` that holds `1.png`.
    if tars and (picture := next(walk(source, SUFFIXES, Counter()), None)) is not None:
        raise DataError(f"{source} holds tars ({tars[0]}) and pictures ({picture}); pack them in two calls")
    return tars


def _read_tars(
    source: Path, tars: list[str], id_of: Callable[[str], str], settings: PackSettings, keys: KeyedIds | None
) -> RawDataset:
    """Members are read where they lie; what has no business in a tar is refused, JSON members are passed over."""
    refused: list[tuple[str, str]] = []
    root = _root_of(source)

    def names(tar: str) -> Iterator[tuple[str, str]]:
        below = f"{_without_suffix(tar)}/" if source.is_dir() else ""
        try:
            for member, fault in members(root / tar):
                is_image = os.path.splitext(member.name)[1].lower() in SUFFIXES  # noqa: PTH122
                if fault is not None:  # listed, whatever its suffix: a foreign member says something about the tar
                    refused.append((id_of(below + member.name), fault))
                elif is_image:
                    # The name stays in the place: `--id-map` tells by it which picture has which id.
                    yield id_of(below + member.name), f"{member.offset_data}:{member.size}:{tar}/{member.name}"
        except DamagedTarError as error:
            raise DataError(f"{root / tar}: {error}; restore it: what follows would be lost") from error

    listing = Listing(sample for tar in tars for sample in names(tar))
    if not len(listing):
        raise DataError(f"{source} holds no image; looked for {' '.join(sorted(SUFFIXES))}")
    dataset = _listed(source, listing, settings, keys, in_tars=True)
    for sample_id, fault in refused:
        dataset.refuse(sample_id, "TAR_MEMBER", fault)
    return dataset


def _tar_member(root: Path, place: str) -> TarMember:
    offset, size, name = place.split(":", 2)
    return TarMember(root / name.partition("/")[0], int(offset), int(size))
