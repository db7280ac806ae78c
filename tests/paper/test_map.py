"""The map of the protocol names tests that exist and run files that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text()


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    file, missing, count = "", [], 0
    for found, name in re.findall(r"`([\w./]+\.py)?::(\w+)`", TEXT):
        file, count = found or file, count + 1
        missing += [f"{file}::{name}"] if name not in functions(HERE.parent / file) else []
    assert missing == []
    assert count > 30


def test_every_detail_says_where_it_is_from() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 18
    assert all(re.match(r"\| \d", row) for row in rows)
