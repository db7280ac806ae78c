"""The site of the documents: built without a warning, fetches nothing, has every command and setting. The notebook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from ddpm_lmk.cli.app import app
from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.explain import explain
from tests.docs.pages import LONGEST_S, ROOT
from tests.extras import needs_extra

pytestmark = needs_extra("docs")
LOADING_TAG = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*>")
ELSEWHERE = re.compile(r"""(?:\b(?:src|href)=|\burl\()["']?(?:https?:)?//|@import""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, strictly: a link to nowhere is a warning, and a warning ends it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    words = [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    tags = {tag for page in site.rglob("*.html") for tag in LOADING_TAG.findall(page.read_text())}
    assert len(tags) > 10
    assert sorted(tag for tag in tags if ELSEWHERE.search(tag)) == []
    assert [style.name for style in site.rglob("*.css") if ELSEWHERE.search(style.read_text())] == []


def test_search_works_from_the_disk(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text()
    assert "mean radial error" in index.lower()


def test_every_command_and_setting_is_in_the_reference(site: Path) -> None:
    commands, settings = ((site / name).read_text() for name in ("commands.html", "settings.html"))
    names = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in names if f"ddpm-lmk {name}</code>" not in commands] == []
    assert [row[0] for row in explain(RunConfig) if f"<code>{row[0]}</code>" not in settings] == []


@pytest.mark.slow
def test_the_notebook_runs_from_packing_to_prediction(tmp_path: Path, environment: dict[str, str]) -> None:
    import nbformat

    path = tmp_path / "notebook.ipynb"
    path.write_bytes((ROOT / "docs" / "first-landmarks.ipynb").read_bytes())
    words = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace", str(path)]
    words.append(f"--ExecutePreprocessor.timeout={LONGEST_S}")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    said = re.findall(r"^(mean shape|this run) +MRE +([\d.]+) px", printed, re.MULTILINE)
    errors = {start: float(mre) for start, mre in said}
    assert errors["this run"] < errors["mean shape"] / 3
    assert any("image/png" in output.get("data", {}) for output in outputs)
