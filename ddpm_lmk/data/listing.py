"""Which files there are, in order of id: walked, sorted and kept on the disk, never in memory.

A tree may hold millions of files, so names are sorted in pieces that are merged (an external sort). Symbolic links to
folders are not followed; hidden files and folders are skipped, and so is what archives of macOS leave behind.
"""

from __future__ import annotations

import heapq
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ddpm_lmk.errors import DataError

Name = tuple[str, str]  # id, path
_SORTED_AT_ONCE = 50_000
_BLOCK = 1 << 16
_SKIPPED = (".", "__MACOSX")


def walk(root: Path, suffixes: frozenset[str] | None, others: Counter[str]) -> Iterator[str]:
    """Paths of files below `root`, relative to it, in no order.

    Args:
        suffixes: lower-case suffixes that are taken; None: all files.
        others: counts the files of other suffixes, by suffix.

    Raises:
        DataError: a folder cannot be listed: an unreadable one must not look like an empty one.
    """
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as entries:  # noqa: PTH118 - strings: there may be millions
                for entry in entries:
                    if entry.name.startswith(_SKIPPED):
                        continue
                    path = f"{below}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{path}/")
                    elif suffixes is None or (suffix := os.path.splitext(path)[1].lower()) in suffixes:  # noqa: PTH122
                        yield path
                    else:
                        others[suffix or "none"] += 1
        except OSError as error:
            raise DataError(
                f"a folder below {root} cannot be listed ({error.strerror}); mend it and pack again"
            ) from None


def read_list(path: Path) -> Iterator[str]:
    """Paths in a text file, one a line, relative to its folder or absolute; empty lines and `#` lines are skipped."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            name = line.rstrip("\r\n")
            if name.strip() and not name.startswith("#"):
                yield name


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
        raise DataError(f"no image below {source}; looked for {looked_for}")
    return listing


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
