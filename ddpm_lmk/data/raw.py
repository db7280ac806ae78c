"""Readers: where the images, labels and splits of a source are, as `RawSample`s in ascending order of id.

Readers look at names and label files, and at image headers where labels need a size; pixels are decoded later, in
parallel. The public sets are in `raw_public`, tables in `table`; folders, DICOM trees and phantoms are here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ddpm_lmk.data.decode import SUFFIXES
from ddpm_lmk.data.dicom import require_pydicom
from ddpm_lmk.data.ids import KeyedIds
from ddpm_lmk.data.listing import Listing, list_files
from ddpm_lmk.data.spec import SPECS, DatasetSpec, unlabelled
from ddpm_lmk.data.tars import DamagedTarError, members
from ddpm_lmk.errors import ConfigError, DataError

Kind = Literal["folder", "dicom", "table", "phantom", "chest", "cephalometric", "hand"]
Convention = Literal["paper", "published"]

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True)
class PhantomSource:
    """A picture that is drawn instead of read."""

    kind: Literal["chest", "skull", "hand"]
    seed: int
    index: int
    size: int


@dataclass(frozen=True)
class TarMember:
    """A picture inside a tar, which is read there and never extracted."""

    tar: Path
    offset: int
    size: int


@dataclass(frozen=True)
class RawSample:
    """One image of a source and what its labels say."""

    id: str
    path: Path | PhantomSource | TarMember
    split: str
    points: np.ndarray | None = None  # [N, 2] native px
    native_size: tuple[int, int] | None = None  # width, height, where the file is stored smaller than it was annotated
    mm_per_px: float | None = None
    group: str | None = None

    def digest(self) -> bytes:
        """Of everything known before the file is read: an interrupted packing continues only if it is the same."""
        points = None if self.points is None else self.points.tolist()
        said = (self.id, str(self.path), self.split, points, self.native_size, self.mm_per_px, self.group)
        return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).digest()


class Samples(Protocol):
    """Samples in ascending order of id, which need not all exist at once."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[RawSample]:
        """All of them, in order; more than once."""


@dataclass
class RawDataset:
    """What a reader found: the samples, sorted by id, and what it left out or wants said.

    Attributes:
        splits: names of splits; empty: those of the samples.
        listing: the files behind the samples, where ids are hashes and somebody may want to know.
        keys: hashes paths and patients, where they are private.
    """

    spec: DatasetSpec
    samples: Samples
    refused: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    splits: tuple[str, ...] = ()
    listing: Listing | None = None
    keys: KeyedIds | None = None

    def refuse(self, sample_id: str, code: str, reason: str) -> None:
        """Leave an image out."""
        self.refused.append({"id": sample_id, "code": code, "reason": reason})

    def split_names(self) -> tuple[str, ...]:
        """The splits, in the order in which they are written."""
        return self.splits or ordered_splits({sample.split for sample in self.samples})


_FIRST_SPLITS = ("train", "val", "test")


def ordered_splits(names: set[str]) -> tuple[str, ...]:
    """The usual three first, then the others by name."""
    return tuple(name for name in _FIRST_SPLITS if name in names) + tuple(sorted(names.difference(_FIRST_SPLITS)))


def parse_decimal(text: str, where: str) -> float:
    """A finite decimal number in plain ASCII: no `nan`, no `1_0`, no full-width digits. DataError names `where`."""
    if _DECIMAL.fullmatch(text.strip(" \t")) is None or not np.isfinite(value := float(text)):
        raise DataError(f"{where}: {text!r} is not a number; write digits and a point, e.g. 812.5")
    return value


def check_split_name(name: str, where: str) -> str:
    """Split names are short and plain, since they are typed on command lines and become folder names."""
    if _SPLIT_NAME.fullmatch(name) is None:
        raise DataError(f"{where}: split {name!r}; wanted letters, digits, dots, dashes, e.g. train")
    return name


def image_files(root: Path) -> list[str]:
    """Relative paths of the image files of a public set, sorted. Raises DataError when there is none."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    return [path for _, path in list_files(root, SUFFIXES, lambda path: path, Counter())]


def read_folder(
    source: Path, *, name: str, split: str, val_fraction: float, seed: int, keys: KeyedIds | None = None
) -> RawDataset:
    """Any tree of images, a list of them, or a tar, without labels. The id is the path in there without its suffix.

    A share `val_fraction` goes to split `val`, chosen by a hash of the id: added images move no others.
    """
    check_split_name(split, "--split")
    if source.suffix == ".tar" and source.is_file():
        return _read_tar(source, keys.of_path if keys else _without_suffix, name, split, val_fraction, seed, keys)
    others: Counter[str] = Counter()
    listing = list_files(source, SUFFIXES, keys.of_path if keys else _without_suffix, others)
    found = _listed(source, listing, name, split, val_fraction, seed)
    found.keys = keys
    if others:
        suffixes = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
        found.warnings.append(f"{others.total()} files with other suffixes were not looked at ({suffixes})")
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


def folder_split(key: str, split: str, val_fraction: float, seed: int) -> str:
    """`val` for a share of all keys, else `split`: a function of the key and the seed alone."""
    digest = hashlib.sha256(b"%d:" % seed + os.fsencode(key)).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else split


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122 - strings: there may be millions


def _listed(source: Path, listing: Listing, name: str, split: str, val_fraction: float, seed: int) -> RawDataset:
    root = source if source.is_dir() else source.parent
    splits = {split} if val_fraction == 0 else {"val"} if val_fraction == 1 else {split, "val"}
    samples = _ListedSamples(root, listing, split, val_fraction, seed)
    return RawDataset(unlabelled(name), samples, splits=ordered_splits(splits), listing=listing)


@dataclass(frozen=True)
class _ListedSamples:
    """Samples made when they are asked for: a million files are no million objects."""

    root: Path
    listing: Listing
    split: str
    val_fraction: float
    seed: int
    is_tar: bool = False

    def __len__(self) -> int:
        return len(self.listing)

    def __iter__(self) -> Iterator[RawSample]:
        for sample_id, path in self.listing:
            where = _tar_member(self.root, path) if self.is_tar else self.root / path
            yield RawSample(sample_id, where, folder_split(sample_id, self.split, self.val_fraction, self.seed))


def _read_tar(
    source: Path,
    id_of: Callable[[str], str],
    name: str,
    split: str,
    val_fraction: float,
    seed: int,
    keys: KeyedIds | None,
) -> RawDataset:
    """Members are read where they lie; what has no business in a tar is refused, JSON members are passed over."""
    refused: list[tuple[str, str]] = []
    damage: list[str] = []

    def names() -> Iterator[tuple[str, str]]:
        try:
            for member, fault in members(source):
                is_image = os.path.splitext(member.name)[1].lower() in SUFFIXES  # noqa: PTH122
                if fault is not None:
                    refused.append((id_of(member.name), fault))
                elif is_image:
                    yield id_of(member.name), f"{member.offset_data}:{member.size}:{member.name}"
        except DamagedTarError as error:
            damage.append(str(error))

    listing = Listing(names())
    if damage:
        raise DataError(f"{source}: {damage[0]}; restore it: what follows would be lost")
    if not len(listing):
        raise DataError(f"{source} holds no image; looked for {' '.join(sorted(SUFFIXES))}")
    samples = _ListedSamples(source, listing, split, val_fraction, seed, is_tar=True)
    splits = {split} if val_fraction == 0 else {"val"} if val_fraction == 1 else {split, "val"}
    found = RawDataset(unlabelled(name), samples, splits=ordered_splits(splits), listing=listing, keys=keys)
    for sample_id, fault in refused:
        found.refuse(sample_id, "TAR_MEMBER", fault)
    return found


def _tar_member(tar: Path, place: str) -> TarMember:
    offset, size, _ = place.split(":", 2)
    return TarMember(tar, int(offset), int(size))


def read_phantom(kind: str, *, counts: dict[str, int], seed: int, size: int) -> RawDataset:
    """Phantoms `chest`, `skull` or `hand`: `counts` images per split, numbered through in the order given."""
    if f"phantom-{kind}" not in SPECS:
        raise ConfigError(f"phantom kind {kind!r}; wanted chest, skull or hand")
    samples: list[RawSample] = []
    for split, count in counts.items():
        check_split_name(split, "--count")
        for index in range(len(samples), len(samples) + count):
            source = PhantomSource(kind, seed, index, size)  # type: ignore[arg-type]
            samples.append(RawSample(f"{kind}-{index:06d}", source, split))
    return RawDataset(SPECS[f"phantom-{kind}"], samples)
