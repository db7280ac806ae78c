"""The map of faults names tests that exist, and has a line for every row it is about."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES = (HERE / "README.md").read_text().splitlines()


@pytest.mark.parametrize(("letter", "count"), [("D", 16)])
def test_every_row_of_a_section_has_a_line(letter: str, count: int) -> None:
    rows = [match[1] for line in LINES if (match := re.match(rf"\| ({letter}\d+) \|", line))]
    assert rows == [f"{letter}{number}" for number in range(1, count + 1)]


def test_every_row_about_starting_and_training_has_a_line() -> None:
    rows = [match[1] for line in LINES if (match := re.match(r"\| ([AC]\d+) \|", line))]
    assert sorted(rows) == sorted([f"A{number}" for number in range(1, 23)] + [f"C{number}" for number in range(1, 15)])


def test_every_row_names_a_test_or_gives_a_reason() -> None:
    rows = [line for line in LINES if re.match(r"\| [A-E]\d+", line)]
    bare = [row for row in rows if not re.search(r"::test_\w+", row) and len(row.split("|")[3]) < 80]
    assert bare == []


def test_every_row_about_data_has_a_line() -> None:
    heads = [match[1] for line in LINES if (match := re.match(r"\| (B[B\d, ]*) \|", line))]
    assert [row for head in heads for row in head.split(", ")] == [f"B{number}" for number in range(1, 31)]


def test_every_named_test_exists() -> None:
    file, missing, count = "", [], 0
    for found, name in re.findall(r"`([\w./]+\.py)?::(\w+)`", "\n".join(LINES)):
        file, count = found or file, count + 1
        missing += [f"{file}::{name}"] if name not in functions(HERE.parent / file) else []
    assert missing == []
    assert count > 40


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
