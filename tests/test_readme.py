"""The README and the documents against the package: files, commands and options they name are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from ddpm_lmk.cli.app import app
from ddpm_lmk.system import shipped
from tests.docs.pages import PAGES, ROOT

README = ROOT / "README.md"
COMMAND = re.compile(r"(?:^|`)(ddpm-lmk (?:\\\n|[^`#\n])+)", re.MULTILINE)
COMMANDS = {
    line.replace("\\\n", " ")
    for page in PAGES
    for line in COMMAND.findall(page.read_text())
    if "COMMAND" not in line and page.name != "CHANGELOG.md"
}


def test_run_files_and_folders_that_are_named_exist() -> None:
    named = set(re.findall(r"\b((?:configs|launch|benchmarks|docs|tests|ddpm_lmk)/[\w/.-]*\w)", README.read_text()))
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
    files = {name for name in named if name.endswith(".yaml")}
    assert files <= set(shipped.names())


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_command_that_is_named_has_the_options_it_is_given(line: str) -> None:
    words = shlex.split(line)[1:]
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not words or words[0].startswith("-") or not getattr(command, "commands", {}), f"{line}: no such command"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert [word for word in words if word.startswith("--") and word not in known] == []


def test_every_command_is_listed() -> None:
    rows = re.search(r"## Commands\n(.*?)\n## ", README.read_text(), re.DOTALL)
    assert rows is not None
    listed = set(re.findall(r"`([\w-]+)", rows[1]))
    assert set(get_command(app).commands) <= listed  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    made = {"commands.md", "settings.md"}  # with the site
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if link not in made and not (page.parent / link).exists()] == []
