"""Where the code of the documents is run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`ddpm-lmk` and `python` are those of this checkout, the home is empty."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for program, words in {"python": "", "ddpm-lmk": "-m ddpm_lmk.cli"}.items():
        (programs / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / program).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return os.environ | own
