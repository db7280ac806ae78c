"""Pseudonymous sample ids: keyed hashes of paths and patients (HMAC-SHA256, 16 hex digits).

The same key gives the same ids, so that a patient is the same in two datasets made with one key; without the key a name
cannot be found again by trying. The key, and the optional list of which id is which file, are for the owner's eyes and
stay out of the shards.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TextIO

from ddpm_lmk.errors import ConfigError, ResourceError, RunConflictError
from ddpm_lmk.system import files

_DIGITS = 16  # 64 bits: among ten million files two meet once in about 400,000 sets, which is an error then
# What stands for a patient who was taken out, as tools that make files anonymous write it; never one person.
_NOBODY = re.compile(r"|x+|unknown|none|null|na|n/a|nan|anon(ym(ous|i[sz]ed))?|de-?identified|removed|deleted|no ?id")
_FOR_OTHERS = 0o077


class KeyedIds:
    """Hashes of paths and of patients, under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def key_id(self) -> str:
        """Which key this is, so that two datasets can tell whether their hashes compare; nobody finds it by it."""
        return self._hash(b"key")

    def of_path(self, path: str) -> str:
        """The id of a file, by its path below the source."""
        return self._hash(b"path\0" + os.fsencode(path))  # with a word, so that no path is hashed like a patient

    def of_patient(self, patient: str) -> str:
        """The group of a patient, by what the file calls the patient."""
        return self._hash(b"patient\0" + same_patient(patient).encode("utf-8", "surrogateescape"))

    def _hash(self, text: bytes) -> str:
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()[:_DIGITS]


def same_patient(patient: str) -> str:
    """What the spellings of one patient's id have in common, whichever kind of source it comes from.

    Spreadsheets take leading zeros away or append `.0`, and case and blanks get lost. An issuer is no part of an id:
    DICOM files state one and tables do not.
    """
    plain = patient.strip().casefold()
    number = re.fullmatch(r"0*([0-9]+)(?:\.0+)?", plain)
    return number[1] if number else plain


def is_nobody(patient: str) -> bool:
    """Does this id of a patient stand for nobody in particular, as in files made anonymous?"""
    return _NOBODY.fullmatch(patient.strip().casefold()) is not None


def open_key(path: Path) -> KeyedIds:
    """Ids under the key of a file; raises as `secret_key`."""
    return KeyedIds(secret_key(path))


def secret_key(path: Path) -> bytes:
    """Read a key file, or make one that only its owner can read.

    Raises:
        ConfigError: others may read it, or it is no key file.
        ResourceError: it cannot be written or read.
    """
    try:
        # No link is followed: in a folder of others it could lead to a key that somebody else knows.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        key = secrets.token_bytes(32)
        _write_private(path, lambda file: file.write(key.hex() + "\n"))
        return key
    except OSError as error:
        raise ResourceError(f"cannot read the key file {path}: {error.strerror}; name another one") from error
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        text = file.read(1024)
    if mode & _FOR_OTHERS:
        raise ConfigError(f"the key file {path} may be read by others (mode {mode & 0o777:o}); chmod 600 it")
    if re.fullmatch(rb"[0-9a-f]{64}\s*", text) is None:
        raise ConfigError(f"{path} is not a key file: wanted 64 hexadecimal digits; let `shards pack` make one")
    return bytes.fromhex(text.decode().strip())


def write_map(path: Path, names: Iterable[tuple[str, str]]) -> None:
    """Write which id is which file, for the owner only.

    Raises:
        RunConflictError: the file is there already.
        ResourceError: it cannot be written.
    """
    if path.exists():
        raise RunConflictError(f"{path} is there already; name another --id-map")
    lines = chain([("id", "path")], names)  # not a list: there may be millions
    _write_private(path, lambda file: csv.writer(file, lineterminator="\n").writerows(lines))


def _write_private(path: Path, write: Callable[[TextIO], object]) -> None:
    """Write a file of mode 0600 in one move that never replaces a file: a key that is lost orphans all of its ids."""
    with files.open_whole(path, may_replace=False) as file:
        os.fchmod(file.fileno(), 0o600)  # also where outputs are shared with the group
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        write(text)
        text.detach()  # flushes, and leaves the file open for the move
