"""Run files, launch files and benchmarks that come with the package, found from any folder by their usual names.

`configs/pretrain/base.yaml` means the file of that name under the current folder where there is one, else the shipped
one: inside the package when it is installed, beside it in a checkout.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ddpm_lmk.errors import LaunchError, ResourceError, RunConflictError
from ddpm_lmk.system import files

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "launch", "benchmarks")
COPIED = ("configs", "launch")  # to be edited; benchmarks are run by name
GUIDE = "configs/README.md"
MOST_NAMES = 4  # in an error message


def shipped(name: str) -> Path:
    """The folder `configs`, `benchmarks` or `launch`. Raises LaunchError in an incomplete installation."""
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise LaunchError(f"the folder {name}/ is missing beside {PACKAGE}; install the package again")


def find(path: str | Path, folder: Path = Path()) -> Path:
    """`path` in `folder`, or the shipped file of that name where there is none; the first where there is neither."""
    path = Path(path)
    own = folder / path
    # A path that climbs could leave the shipped folder and name anything.
    if os.path.lexists(own) or ".." in path.parts or path.parts[:1] not in [(name,) for name in FOLDERS]:
        return own
    other = shipped(path.parts[0]).joinpath(*path.parts[1:])
    return other if other.exists() else own


def names() -> Iterator[str]:
    """Names of the shipped run and launch files, as `find` takes them."""
    for name in COPIED:
        folder = shipped(name)
        for file in sorted(folder.rglob("*.yaml")):
            yield f"{name}/{file.relative_to(folder).as_posix()}"


def near(path: str | Path) -> list[str]:
    """Names of shipped files that may have been meant: those that look alike, then those with the same last word."""
    given, known = Path(path).as_posix(), list(names())
    alike = difflib.get_close_matches(given, known, n=MOST_NAMES, cutoff=0.8)
    same = [name for name in known if Path(name).name in (Path(path).name, f"{Path(path).name}.yaml")]
    same.sort(key=lambda name: -difflib.SequenceMatcher(None, given, name).ratio())
    return list(dict.fromkeys([*alike, *same]))[:MOST_NAMES]


def advice(path: str | Path) -> str:
    """What to do about a run file that is not there."""
    meant = near(path)
    guess = f"did you mean the shipped {' or '.join(meant)}? " if meant else "check the path; "
    return f"{guess}`ddpm-lmk init` lists the shipped run files, `ddpm-lmk init DIR` copies them to DIR"


def copy_out(target: Path) -> list[Path]:
    """Copy run files and launch files, with the pages that explain them, to `target`; returns what was written.

    Raises:
        RunConflictError: something of that name is there already; nothing is written then.
        ResourceError: the disk refuses.
    """
    if target.exists() and not target.is_dir():
        raise ResourceError(f"{target} is a file; wanted a folder for the copies")
    for name in COPIED:
        if os.path.lexists(target / name):
            raise RunConflictError(f"{target / name} exists and is kept; name a new folder")
    written = []
    for name in COPIED:
        folder = shipped(name)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            copy = target / name / file.relative_to(folder)
            files.write_bytes(copy, file.read_bytes())
            written.append(copy)
    return written


def head(name: str) -> str:
    """What the shipped file of that name is for: the first sentence of the comment it opens with."""
    folder, _, rest = name.partition("/")
    with (shipped(folder) / rest).open(encoding="utf-8") as text:
        lines = [line.lstrip("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), text)]
    return re.split(r"\.(?: |$)", " ".join(lines), maxsplit=1)[0]
