"""Which files there are, in order of id: walked, sorted and kept on the disk, never in memory.

A tree may hold millions of files, so names are sorted in pieces that are merged (an external sort). Symbolic links to
folders are followed, but into what is walked already; hidden files and folders are skipped, and so is what archives of
macOS leave behind.
"""

from __future__ import annotations

import heapq
import io
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ddpm_lmk.data.images.dicom import is_dicom
from ddpm_lmk.errors import DataError

Name = tuple[str, str]  # id, path
_SORTED_AT_ONCE = 50_000
_BLOCK = 1 << 16
_SKIPPED = (".", "__MACOSX")

# The files that people give where a folder or a list is wanted, by their first bytes.
_COMPRESSED = "is compressed, and pictures are read where they lie; unpack it and give the folder"
_ONE_PICTURE = "is one picture, not a list; give its folder, or a text file with a path on each line"
_FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    *((magic, _COMPRESSED) for magic in (b"\x1f\x8b", b"PK\x03\x04", b"PK\x05\x06", b"BZh", b"\xfd7zXZ\0")),
    *((magic, _COMPRESSED) for magic in (b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")),
    *((magic, _ONE_PICTURE) for magic in (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")),
)
ARCHIVES = frozenset({".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar"})


def walk(root: Path, suffixes: frozenset[str] | None, others: Counter[str]) -> Iterator[str]:
    """Paths of files below `root`, relative to it, in no order.

    Args:
        suffixes: lower-case suffixes that are taken; None: all files.
        others: counts the files of other suffixes, by suffix.

    Raises:
        DataError: a folder cannot be listed: an unreadable one must not look like an empty one.
    """
    top: tuple[str, ...] = (os.path.realpath(root),)
    waiting = [("", top)]  # a folder, and the real folders whose trees are walked on the way to it
    while waiting:
        below, trees = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as entries:  # noqa: PTH118 - strings: there may be millions
                for entry in entries:
                    if entry.name.startswith(_SKIPPED):
                        continue
                    path = f"{below}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((f"{path}/", trees))
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                        real = os.path.realpath(entry.path)
                        if not any(_overlap(real, tree) for tree in trees):
                            waiting.append((f"{path}/", (*trees, real)))
                    elif suffixes is None or (suffix := os.path.splitext(path)[1].lower()) in suffixes:  # noqa: PTH122
                        yield path
                    else:
                        others[suffix or "none"] += 1
        except OSError as error:
            raise DataError(
                f"a folder below {root} cannot be listed ({error.strerror}); mend it and pack again"
            ) from None


def _overlap(one: str, other: str) -> bool:
    """Does one of two real folders lie in the other, or are they the same? So a link may lead in a circle."""
    return os.path.commonpath((one, other)) in (one, other)


def read_list(path: Path) -> Iterator[str]:
    """Paths in a text file, one a line, relative to its folder or absolute; empty lines and `#` lines are skipped.

    Raises:
        DataError: an archive, a picture, or no text at all.
    """
    with open(path, "rb") as file:
        _refuse_no_list(path, file.peek())  # opened once: a pipe, as of `<(find ...)`, does not begin anew
        with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                name = line.rstrip("\r\n")
                if name.strip() and not name.startswith("#"):
                    yield name


def _refuse_no_list(path: Path, head: bytes) -> None:
    for magic, what in _FIRST_BYTES:
        if head.startswith(magic):
            raise DataError(f"{path} {what}")
    if b"\0" in head and is_dicom(head):  # in a list the mark is a name
        raise DataError(
            f"{path} is one DICOM file, not a list; give its folder, or a text file with a path on each line"
        )
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar; kind folder reads it if its name ends in .tar, else unpack it")
    if b"\0" in head:
        raise DataError(f"{path} is not text; wanted a folder, or a UTF-8 text file with a path on each line")


class Listing:
    """Names in ascending order of id, on the disk; can be gone through more than once."""

    def __init__(self, names: Iterable[Name]) -> None:
        names = iter(names)
        pieces: list[BinaryIO] = []
        while piece := sorted(islice(names, _SORTED_AT_ONCE)):
            pieces.append(_written(piece))
        self._count = 0
        self._file = _written(heapq.merge(*(_read(piece) for piece in pieces)))
        weakref.finalize(self, self._file.close)
        for file in pieces:
            file.close()
        self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Name]:
        yield from _read(self._file)  # not `return`: the listing, and so its file, lives as long as this

    def _check(self) -> None:
        """Count the names; raise DataError where an id comes twice."""
        last, twice, first = None, 0, ""
        for name, _ in self:
            self._count += 1
            if name == last:
                twice += 1
                first = first or name
            last = name
        if twice:
            raise DataError(f"{twice} ids come twice, first {first!r}; ids must differ: rename one of the files")


def list_files(
    source: Path, suffixes: frozenset[str] | None, id_of: Callable[[str], str], others: Counter[str]
) -> Listing:
    """List a folder, or the files a text file names.

    Raises:
        DataError: there is no such folder or list, nothing in it, or two files with one id.
    """
    if not source.exists():
        raise DataError(f"{source} is not there; wanted a folder, or a text file with a path on each line")
    paths = walk(source, suffixes, others) if source.is_dir() else read_list(source)
    listing = Listing((id_of(path), path) for path in paths)
    if not len(listing):
        looked_for = "files" if suffixes is None else " ".join(sorted(suffixes))
        seen = f", found {describe_others(others)}" if others else ""
        raise DataError(f"no image below {source}; looked for {looked_for}{seen}")
    return listing


def describe_others(others: Counter[str]) -> str:
    """Files of other suffixes in words, the most frequent first, and what to do about archives among them."""
    counts = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
    return f"{counts}; archives are not looked into: unpack them" if ARCHIVES & set(others) else counts


def _written(names: Iterable[Name]) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the listing
    for name, path in names:
        file.write(os.fsencode(name) + b"\0" + os.fsencode(path) + b"\0")
    file.flush()
    return file


def _read(file: BinaryIO) -> Iterator[Name]:
    """Reads by position, so that several may read one file."""
    rest, offset = b"", 0
    while block := os.pread(file.fileno(), _BLOCK, offset):
        offset += len(block)
        *parts, rest = (rest + block).split(b"\0")
        if len(parts) % 2:
            rest = parts.pop() + b"\0" + rest
        for name, path in zip(parts[::2], parts[1::2]):
            yield os.fsdecode(name), os.fsdecode(path)
