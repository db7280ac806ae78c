"""Which files a source has, in order of id: folders and lists walked, names sorted in a temporary database.

A tree may hold millions of files, so names are never all in memory. Symbolic links to folders are followed, but into
what is walked already; hidden files and folders are skipped, and so is what archives of macOS leave behind.
"""

from __future__ import annotations

import io
import os
import sqlite3
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ddpm_lmk.data.images.decode import SUFFIXES, RefusedImageError, read_content
from ddpm_lmk.data.images.dicom import is_dicom
from ddpm_lmk.errors import DataError, ResourceError

IMAGES = SUFFIXES | {".dcm", ".dicom"}  # whose files are pictures, or reported as broken ones
_SKIPPED = (".", "__MACOSX")
_DICOM_HEAD = 132  # the preamble and `DICM`

# The files that people give where a folder or a list is wanted, by their first bytes.
_COMPRESSED = "is compressed, and pictures are read where they lie; unpack it and give the folder"
_ONE_PICTURE = "is one picture, not a list; give its folder, or a text file with a path on each line"
_FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    *((magic, _COMPRESSED) for magic in (b"\x1f\x8b", b"PK\x03\x04", b"PK\x05\x06", b"BZh", b"\xfd7zXZ\0")),
    *((magic, _COMPRESSED) for magic in (b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")),
    *((magic, _ONE_PICTURE) for magic in (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")),
)
_ARCHIVES = frozenset({".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar"})


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
                        # One folder in the other, or the same: the link leads in a circle, or to what is walked anyway.
                        if not any(os.path.commonpath((real, tree)) in (real, tree) for tree in trees):
                            waiting.append((f"{path}/", (*trees, real)))
                    elif suffixes is None or (suffix := os.path.splitext(path)[1].lower()) in suffixes:  # noqa: PTH122
                        yield path
                    else:
                        others[suffix or "none"] += 1
        except OSError as error:
            raise DataError(
                f"a folder below {root} cannot be listed ({error.strerror}); mend it and pack again"
            ) from None


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
    if b"\0" in head and is_dicom(head):  # without a NUL it is text: a folder of a list may be called DICM
        raise DataError(
            f"{path} is one DICOM file, not a list; give its folder, or a text file with a path on each line"
        )
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar; kind folder reads it if its name ends in .tar, else unpack it")
    if b"\0" in head:
        raise DataError(f"{path} is not text; wanted a folder, or a UTF-8 text file with a path on each line")


def begins_as_dicom(path: Path) -> bool:
    """Is it a DICOM file by its first bytes? Pipes are not waited for, and what cannot be read is none."""
    try:
        return is_dicom(read_content(path, size=_DICOM_HEAD))
    except (OSError, RefusedImageError):
        return False


def images_below(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images below a folder, sorted, and what else is there by suffix.

    DICOM files are known by their first bytes, whatever their names. Raises DataError where there is no image.
    """
    below = sorted(walk(folder, None, Counter()))
    images = [name for name in below if Path(name).suffix.lower() in IMAGES or begins_as_dicom(folder / name)]
    if not images:
        raise DataError(f"no image below {folder}; looked for DICOM and {' '.join(sorted(SUFFIXES))}")
    return images, Counter(Path(name).suffix or "none" for name in set(below) - set(images))


def without_suffix(name: str) -> str:
    """A path without the suffix of a picture; the last part of `1.2.840` is none."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGES else name


def unique_ids(names: Sequence[str]) -> list[str]:
    """Ids of files by their names: without the suffix of a picture, but for those that only the suffix tells apart."""
    plain = [without_suffix(name) for name in names]
    counts = Counter(plain)
    ids: dict[str, None] = {}
    for name, short in zip(names, plain):
        wanted = short if counts[short] == 1 else name
        numbered = (f"{wanted}-{number}" for number in range(1, len(names)))
        ids[next(each for each in (wanted, *numbered) if each not in ids)] = None
    return list(ids)


class Listing:
    """Pairs (id, path) in ascending order of id, on the disk; can be gone through more than once.

    Raises:
        DataError: an id comes twice.
        ResourceError: there is no room in the folder for temporary files.
    """

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        # The empty name is a database of its own in a temporary file, which goes with the connection.
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._db.close)
        self._db.execute("CREATE TABLE names (id BLOB, path BLOB)")
        try:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT INTO names VALUES (?, ?)", ((_bytes(id_), _bytes(path)) for id_, path in names)
            )
            self._db.execute("CREATE INDEX by_id ON names (id, path)")
        except sqlite3.OperationalError as error:
            raise ResourceError(
                f"names of files cannot be sorted ({error}); set TMPDIR to a folder with room"
            ) from error
        self._count = self._db.execute("SELECT count(*) FROM names").fetchone()[0]
        several = "SELECT id, count(*) AS times FROM names GROUP BY id HAVING times > 1"
        twice, first = self._db.execute(f"SELECT sum(times - 1), min(id) FROM ({several})").fetchone()
        if twice:
            raise DataError(f"{twice} ids come twice, first {_text(first)!r}; ids must differ: rename one of the files")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for id_, path in self._db.execute("SELECT id, path FROM names ORDER BY id"):
            yield _text(id_), _text(path)


def _bytes(name: str) -> bytes:
    """Bytes that compare as the strings do, also where a name is no UTF-8 on the disk and holds lone surrogates."""
    return name.encode("utf-8", "surrogatepass")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")


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
        found = f", found {describe_others(others)}" if others else ""
        raise DataError(f"no image below {source}; looked for {looked_for}{found}")
    return listing


def describe_others(others: Counter[str]) -> str:
    """Files of other suffixes in words, the most frequent first, and what to do about archives among them."""
    counts = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(5))
    return f"{counts}; archives are not looked into: unpack them" if _ARCHIVES & set(others) else counts
