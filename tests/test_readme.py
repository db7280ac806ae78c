"""The README against the package: files, commands and options it names are there, and PyPI can show it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from ddpm_lmk.cli.app import app
from ddpm_lmk.system import shipped

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = {line for line in re.findall(r"(?:^|`)(ddpm-lmk [^`#\n]+)", TEXT, re.MULTILINE) if "COMMAND" not in line}


def test_run_files_and_folders_that_are_named_exist() -> None:
    named = set(re.findall(r"\b((?:configs|launch|benchmarks|docs|tests|ddpm_lmk)/[\w/.-]*\w)", TEXT))
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
    assert not getattr(command, "commands", {}), f"{line}: no such command"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert [word for word in words if word.startswith("--") and word not in known] == []


def test_every_command_is_listed() -> None:
    rows = re.search(r"## Commands\n(.*?)\n## ", TEXT, re.DOTALL)
    assert rows is not None
    listed = set(re.findall(r"`([\w-]+)", rows[1]))
    assert set(get_command(app).commands) <= listed  # type: ignore[attr-defined]


def test_links_hold_outside_of_the_repository_too() -> None:
    assert [link for link in re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", TEXT) if "://" not in link] == []
