"""Readers: where the images, labels and splits of a source are, as `RawSample`s in ascending order of id.

Readers look at names and label files, and at image headers where labels need a size; pixels are decoded later, in
parallel. The public sets are in `raw_public`, tables in `table`; folders and phantoms are here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ddpm_lmk.data.decode import SUFFIXES
from ddpm_lmk.data.spec import SPECS, DatasetSpec, unlabelled
from ddpm_lmk.errors import ConfigError, DataError

Kind = Literal["folder", "table", "phantom", "chest", "cephalometric", "hand"]
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
class RawSample:
    """One image of a source and what its labels say."""

    id: str
    path: Path | PhantomSource
    split: str
    points: np.ndarray | None = None  # [N, 2] native px
    native_size: tuple[int, int] | None = None  # width, height, where the file is stored smaller than it was annotated
    mm_per_px: float | None = None
    group: str | None = None


@dataclass
class RawDataset:
    """What a reader found: the samples, sorted by id, and what it left out or wants said."""

    spec: DatasetSpec
    samples: Sequence[RawSample]
    refused: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
    """Relative paths of all image files below `root`, sorted; hidden files and folders are skipped, links not followed.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        base = os.path.relpath(folder, root)
        found += [
            os.path.normpath(os.path.join(base, name))  # noqa: PTH118 - strings: there may be a million
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
        ]
    if not found:
        raise DataError(f"no image below {root}; looked for {' '.join(sorted(SUFFIXES))}")
    return sorted(found)


def read_folder(root: Path, *, name: str, split: str, val_fraction: float, seed: int) -> RawDataset:
    """Any tree of images, without labels. The id is the path below `root` without its suffix.

    A share `val_fraction` goes to split `val`, chosen by a hash of the id: added images move no others.
    """
    check_split_name(split, "--split")
    files = sorted((os.path.splitext(path)[0], path) for path in image_files(root))  # noqa: PTH122
    return RawDataset(unlabelled(name), _FolderSamples(root, files, split, val_fraction, seed))


class _FolderSamples(Sequence[RawSample]):
    """Samples made when they are asked for: a million files are two million strings, not a million objects more."""

    def __init__(self, root: Path, files: list[tuple[str, str]], split: str, val_fraction: float, seed: int) -> None:
        self._root, self._files, self._split = root, files, split
        self._val_fraction, self._seed = val_fraction, seed

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        sample_id, path = self._files[index]
        digest = hashlib.sha256(b"%d:" % self._seed + os.fsencode(sample_id)).digest()
        is_val = int.from_bytes(digest[:8], "big") < self._val_fraction * 2**64
        return RawSample(sample_id, self._root / path, "val" if is_val else self._split)

    def __iter__(self) -> Iterator[RawSample]:
        return (self[index] for index in range(len(self)))


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
