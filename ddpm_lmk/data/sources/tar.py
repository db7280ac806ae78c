"""What may be in a tar: plain files with plain names and known suffixes, whole, each once. Nothing is ever extracted.

Headers are parsed by `tarfile`, which is silent about several kinds of damage: it stops at a broken header as if the
archive ended there, takes a sparse file of petabytes for a plain one, and believes any size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ddpm_lmk.data.images.decode import SUFFIXES

ALLOWED = SUFFIXES | {".npy", ".json"}
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}
_BLOCK = 1 << 16


class DamagedTarError(Exception):
    """The archive as a whole cannot be trusted; the message says what is wrong."""


class TrailingBytesError(DamagedTarError):
    """Every member was read, but something follows the end, perhaps another archive."""


def members(path: Path, suffixes: frozenset[str] | None = ALLOWED) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Every member with what is wrong with it, or None.

    Args:
        suffixes: those that members may have; None: any.

    Raises:
        DamagedTarError: after the last readable member, where the archive does not end as it should.
    """
    names: set[str] = set()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:  # `r:`: a compressed bomb is never unpacked
                for member in tar:
                    yield member, _fault(member, names, size, suffixes)
                    names.add(member.name)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, UnicodeError, OSError) as error:
            raise DamagedTarError(
                f"not a readable tar ({type(error).__name__}); a compressed one is not read"
            ) from error
        _check_end(file, end, size)


def _fault(member: tarfile.TarInfo, names: set[str], size: int, suffixes: frozenset[str] | None) -> str | None:
    # Nothing is extracted, so none of this could do harm here; but what holds it was not made for pictures.
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "its name leads out of the archive"
    if member.type in _KINDS:
        return f"{_KINDS[member.type]}, no plain file"
    if member.issparse() or not member.isreg():
        return "sparse or of an unknown kind, no plain file"
    if member.offset_data + member.size > size or member.size < 0:
        return f"said to have {member.size} bytes, more than there are"
    if suffixes is not None and path.suffix.lower() not in suffixes:
        return f"suffix {path.suffix or 'none'}, wanted {' '.join(sorted(suffixes))}"
    if member.name in names:  # readers of tars differ in which of the two they take
        return "its name comes twice"
    return None


def _check_end(file: BinaryIO, end: int, size: int) -> None:
    """An archive is whole blocks and ends in two of zeros; anything else was a header that could not be read."""
    file.seek(end)
    rest = file.read(2 * tarfile.BLOCKSIZE)
    if len(rest) < 2 * tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:
        raise DamagedTarError("cut off")
    if rest.strip(b"\0"):
        raise DamagedTarError(f"unreadable from byte {end} on")
    while rest := file.read(_BLOCK):
        if rest.strip(b"\0"):
            raise TrailingBytesError(f"something follows its end at byte {end}")
