"""Tests that need an extra of the package: without it they are skipped by name, with it `-m extra` runs them alone.

An extra is installed when all its requirements in pyproject.toml are.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
REASON = "needs the extra "


@cache
def is_installed(extra: str) -> bool:
    """Whether every requirement of an extra is there, in a version it takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["optional-dependencies"][extra]]
    return all(_is_met(need) for need in requirements if need.marker is None or need.marker.evaluate())


def _is_met(need: Requirement) -> bool:
    try:
        return need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def reason(missing: list[str]) -> str:
    """Why a test is skipped; `by_extra` reads it back."""
    return f"{REASON}{', '.join(missing)}: pip install -e '.[{','.join(missing)}]'"


def needs_extra(*extras: str) -> pytest.MarkDecorator:
    """For `pytestmark` of a module: skips all of it before its tests are collected, or marks them."""
    __tracebackhide__ = True  # the line of the module is reported, not one of this file
    if missing := [extra for extra in extras if not is_installed(extra)]:
        pytest.skip(reason(missing), allow_module_level=True)
    return pytest.mark.extra(*extras)


def skip_without(item: pytest.Item) -> None:
    """For a single test with the mark `extra`."""
    wanted = [extra for mark in item.iter_markers("extra") for extra in mark.args]
    if missing := [extra for extra in wanted if not is_installed(extra)]:
        item.add_marker(pytest.mark.skip(reason=reason(missing)))


def by_extra(reports: list[pytest.CollectReport | pytest.TestReport]) -> dict[str, list[str]]:
    """From what was skipped: the extras that were missing, and the files with tests that need them."""
    found: dict[str, set[str]] = {}
    for report in reports:
        words = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if REASON in words:
            name = words.split(REASON, 1)[1].split(": pip")[0]
            found.setdefault(name, set()).add(report.nodeid.split("[")[0])
    return {name: sorted(tests) for name, tests in sorted(found.items())}
