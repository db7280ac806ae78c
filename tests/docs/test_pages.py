"""The documents: what their code blocks say is done, from top to bottom of every page."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ddpm_lmk.config.load import load_run, load_yaml
from tests.docs.pages import LONGEST_S, PAGES, ROOT, Block, blocks, needs, script


def name(page: Path) -> str:
    """A page in the name of a test."""
    return str(page.relative_to(ROOT))


def _as_parameter(page: Path) -> object:
    marks = [pytest.mark.slow if word == "slow" else pytest.mark.extra(word) for word in needs(page)]
    return pytest.param(page, id=name(page), marks=marks)


@pytest.mark.parametrize("page", [_as_parameter(page) for page in PAGES if script(page)])
def test_page_does_what_it_says(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-c", script(page)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-40:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_names_its_language(page: Path) -> None:
    untitled = [block for block in blocks(page) if block.title is None]
    known = {"bash", "python", "text", "yaml"}
    assert [f"line {block.line}" for block in untitled if block.language not in known] == []


RUN_FILES = [
    pytest.param(block, id=f"{name(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "yaml" and block.title is None and block.is_run
]


@pytest.mark.parametrize("block", RUN_FILES)
def test_a_run_file_that_is_shown_is_one(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(block.text)
    load_run(path, [] if "path" in load_yaml(path).get("data", {}) else ["data.path=pool"])
