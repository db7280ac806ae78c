"""What a reader makes of a source: where its images are, their labels and splits, as `RawSample`s in order of id.

Readers look at names and label files, and at image headers where labels need a size; pixels are decoded later, in
parallel. The public sets are in `public`, folders, tars and DICOM trees in `folder`, tables in `table`; phantoms are
here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ddpm_lmk.data.sources.ids import KeyedIds
from ddpm_lmk.data.sources.walk import Listing
from ddpm_lmk.data.spec import SPECS, DatasetSpec
from ddpm_lmk.errors import ConfigError, DataError

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_FIRST_SPLITS = ("train", "val", "test")


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
        """Of everything known before the file is read: an interrupted packing continues only if it is the same.

        Of the file that is size and time of change; its content would cost as much to read as to pack again.
        """
        points = None if self.points is None else self.points.tolist()
        # surrogatepass: names that are no UTF-8 on the disk hold lone surrogates
        facts = (
            self.id,
            str(self.path),
            self.split,
            points,
            self.native_size,
            self.mm_per_px,
            self.group,
            self._file(),
        )
        return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).digest()

    def _file(self) -> tuple[int, int] | None:
        if isinstance(self.path, PhantomSource):
            return None
        try:
            stat = (self.path.tar if isinstance(self.path, TarMember) else self.path).stat()
        except (OSError, ValueError):  # gone, or no name at all: whoever decodes it will say so
            return None
        return stat.st_size, stat.st_mtime_ns


class Samples(Protocol):
    """Samples in ascending order of id, which need not all exist at once."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[RawSample]:
        """All of them, in order; more than once."""


@dataclass
class RawDataset:
    """What a reader found: the samples, sorted by id, and what it left out or warns of.

    Attributes:
        splits: names of splits; empty: those of the samples.
        listing: the files behind the samples, where ids are hashes and somebody may want to know.
        keys: hashes paths and patients, where they are private.
        unkept_patients: files that name a patient who is not kept, because there is no key to hash the id.
    """

    spec: DatasetSpec
    samples: Samples
    refused: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    splits: tuple[str, ...] = ()
    listing: Listing | None = None
    keys: KeyedIds | None = None
    unkept_patients: int = 0

    def refuse(self, sample_id: str, code: str, reason: str) -> None:
        """Leave an image out."""
        self.refused.append({"id": sample_id, "code": code, "reason": reason})

    def split_names(self) -> tuple[str, ...]:
        """The splits, in the order in which they are written: the usual three first, then the others by name."""
        names = set(self.splits) or {sample.split for sample in self.samples}
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


def folder_split(key: str, split: str, val_fraction: float, seed: int) -> str:
    """`val` for a share of all keys, else `split`, by key and seed alone: images that are added move no others."""
    digest = hashlib.sha256(b"%d:" % seed + os.fsencode(key)).digest()
    # Python compares an integer with a float exactly: rounding decides nothing.
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else split


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
