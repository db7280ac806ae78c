"""A WebDataset of others: which tars its name means, and the samples in one of them, by the package's conventions.

The package `webdataset` reads tars as streams, each sample once and in an order that cannot be resumed; it decodes with
`pickle` what is called `.pyd` and runs what begins with `pipe:`. What is needed here, places in the tars, it does not
tell. So its conventions are written down again, and tests hold them equal to the package: names in braces and `::`,
keys that end at the first dot, samples of members that follow one another.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ddpm_lmk.data.images.decode import SUFFIXES
from ddpm_lmk.data.sources.base import RawSample, TarMember, check_split_name, folder_split
from ddpm_lmk.data.sources.ids import KeyedIds, is_nobody
from ddpm_lmk.data.sources.tar import DamagedTarError, members
from ddpm_lmk.errors import ConfigError, DataError

MOST_TARS = 100_000
_LONGEST_TEXT = 1 << 20  # bytes of a member that names a split or a patient
_IMAGES = SUFFIXES | {".dcm"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?([0-9]+))?")
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # members about the tar, which belong to no sample

Refuse = Callable[[str, str, str], None]  # id, code, reason


@dataclass(frozen=True)
class Roles:
    """Which members of a sample are used, and for what.

    Attributes:
        image: extensions, the first that a sample has is its image; empty: the only image it has.
        split: extension of the member that names the split, with `:KEY` for a value of a JSON object; None: none does.
        patient: as `split`, for the patient.
    """

    image: tuple[str, ...] = ()
    split: str | None = None
    patient: str | None = None


def expand_names(text: str) -> list[str]:
    """The names that `a-{000..012}.tar`, `{a,b}.tar` and `a.tar::b.tar` mean, as the package `braceexpand` has them.

    Raises:
        ConfigError: braces in braces or alone, a range of letters, `pipe:`, or more names than a dataset has tars.
    """
    names: list[str] = []
    for pattern in text.split("::"):
        if pattern.startswith("pipe:"):
            raise ConfigError(f"{pattern!r} would run a program; name the file or its URL instead")
        pieces = enumerate(_pieces(pattern))
        for parts in itertools.product(*(_alternatives(piece) if n % 2 else [piece] for n, piece in pieces)):
            names.append("".join(parts))
            if len(names) > MOST_TARS:
                raise ConfigError(f"{text!r} means more than {MOST_TARS} tars; index them as several datasets")
    return names


def _pieces(pattern: str) -> list[str]:
    """Text, content of braces, text, and so on."""
    pieces = _BRACES.split(pattern)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise ConfigError(f"{pattern!r} has braces in braces, or a single one; wanted {{000..012}} or {{a,b}}")
    return pieces


def _alternatives(content: str) -> Sequence[str]:
    if (numbers := _NUMBERS.fullmatch(content)) is not None:
        first, last, step = numbers[1], numbers[2], int(numbers[3] or 1) or 1
        is_padded = any(re.match("-?0.", end) for end in (first, last))
        width = max(len(first), len(last)) if is_padded else 0
        way = 1 if int(first) < int(last) else -1
        values = range(int(first), int(last) + way, way * step)
        if len(values) > MOST_TARS:
            raise ConfigError(f"{{{content}}} means {len(values)} tars; index them as several datasets")
        return [f"{value:0{width}d}" for value in values]
    if ".." in content and "," not in content:
        raise ConfigError(f"{{{content}}} is no range of numbers; wanted {{000..012}}")
    return content.split(",") if "," in content else [f"{{{content}}}"]


def key_of(name: str) -> tuple[str, str] | None:
    """Key and extension of a member: parted at the first dot of the file name; None: it belongs to no sample."""
    found = _KEY.fullmatch(name)
    return None if found is None or _META.match(name) else (found[1], found[2].lower())


@dataclass(frozen=True)
class TarReader:
    """Reads what the samples of a tar are, none decoded.

    Attributes:
        split: of every sample, where `roles` names no member for it; a share `val_fraction` of them goes to `val`,
            chosen by a hash of the patient where one is known, else of the id.
        keys: hashes ids and patients; None: they stay as they are.
    """

    roles: Roles
    split: str
    val_fraction: float
    seed: int
    keys: KeyedIds | None

    def samples(self, path: Path, called: str, refuse: Refuse) -> Iterator[RawSample]:
        """The samples of a tar in its order; their ids are `called`, a slash and the key.

        Args:
            refuse: told of what is left out.

        Raises:
            DataError: the tar is damaged or compressed. ConfigError: nothing says which of several images is meant.
        """
        seen: set[str] = set()
        with open(path, "rb") as file:
            for key, found in itertools.groupby(self._members(path, called, refuse), lambda member: member[0]):
                parts: dict[str, tarfile.TarInfo] = {}
                id_, twice = self._id(f"{called}/{key}"), "its key comes twice" if key in seen else None
                seen.add(key)
                for _, extension, member in found:
                    if extension in parts:
                        twice = f"it has two members .{extension}"
                    parts[extension] = member
                if twice is not None:  # readers differ in which of them they take
                    refuse(id_, "TAR_MEMBER", twice)
                    continue
                try:
                    yield self._sample(id_, parts, path, file)
                except _UnfitError as error:
                    refuse(id_, error.code, str(error))

    def _id(self, path: str) -> str:
        return self.keys.of_path(path) if self.keys else path

    def _members(self, path: Path, called: str, refuse: Refuse) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        try:
            for member, fault in members(path, suffixes=None):
                named = key_of(member.name)
                if fault is not None and not member.isdir():  # listed: a foreign member says something about the tar
                    refuse(self._id(f"{called}/{member.name}"), "TAR_MEMBER", fault)
                elif fault is None and named is not None:
                    yield *named, member
        except DamagedTarError as error:
            raise DataError(
                f"{called}.tar: {error}; restore it, decompress it (images are read out of its middle), or leave it out"
            ) from error

    def _sample(self, id_: str, parts: dict[str, tarfile.TarInfo], path: Path, file: BinaryIO) -> RawSample:
        image, roles = self._image(id_, parts), self.roles
        group, split = None, self.split
        if roles.patient is not None:
            patient = _text(parts, roles.patient, file, optional=True)
            if patient is not None and not is_nobody(patient):
                group = self.keys.of_patient(patient) if self.keys else patient
        if roles.split is not None:
            name = _text(parts, roles.split, file)
            assert name is not None
            try:
                split = check_split_name(name, f".{roles.split}")
            except DataError as error:
                raise _UnfitError("NO_SPLIT", str(error)) from None
        elif self.val_fraction:
            split = folder_split(group or id_, self.split, self.val_fraction, self.seed)
        return RawSample(id_, TarMember(path, image.offset_data, image.size), split, group=group)

    def _image(self, id_: str, parts: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
        images = [name for name in parts if f".{name.rpartition('.')[2]}" in _IMAGES]
        if self.roles.image:
            images = [name for name in self.roles.image if name in parts][:1]
        if len(images) > 1:
            raise ConfigError(
                f"sample {id_!r} has {len(images)} images ({', '.join(images)}); say which: --image {images[0]}"
            )
        if not images:
            wanted = " or ".join(f".{name}" for name in self.roles.image) or "image"
            raise _UnfitError("NO_IMAGE", f"no member {wanted}; it has {', '.join(sorted(parts))[:80]}")
        return parts[images[0]]


class _UnfitError(Exception):
    """Why a sample is left out."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _text(parts: dict[str, tarfile.TarInfo], role: str, file: BinaryIO, *, optional: bool = False) -> str | None:
    """What the member of a role says; None where it may say nothing."""
    extension, _, key = role.partition(":")
    member = parts.get(extension)
    value: object = None
    if member is not None and member.size <= _LONGEST_TEXT:
        file.seek(member.offset_data)
        try:
            value = file.read(member.size).decode("utf-8-sig").strip()
            if key:
                value = json.loads(value)
                value = value.get(key) if isinstance(value, dict) else None
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
        return str(value)
    if optional:
        return None
    raise _UnfitError("NO_SPLIT", f"nothing in .{role} names its split")
