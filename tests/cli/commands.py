"""The command line, called as a user calls it."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpm_lmk import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMOKE = CONFIGS / "smoke"


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str


Lmk = Callable[..., Result]


def run_command(*words: object) -> Result:
    """`ddpm-lmk WORDS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))
