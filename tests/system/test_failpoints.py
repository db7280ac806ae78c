"""Fail-points: off unless asked for, and the list is what the code has."""

from __future__ import annotations

import ast
import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system import failpoints
from ddpm_lmk.system.failpoints import POINTS, arm, reach

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm("")


def test_the_list_names_every_place_in_the_code_and_no_other() -> None:
    found = [
        node.args[0].value
        for path in (ROOT / "ddpm_lmk").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "reach" and isinstance(node.args[0], ast.Constant)
    ]
    assert sorted(found) == sorted(POINTS)


def test_nothing_happens_where_nothing_is_armed() -> None:
    for name in POINTS:
        reach(name)


def test_the_nth_visit_acts_once() -> None:
    arm("save.begin:2=enospc, load.begin=eio")
    reach("save.begin")
    with pytest.raises(OSError, match=r"fail-point save\.begin") as error:
        reach("save.begin")
    assert error.value.errno == errno.ENOSPC
    reach("save.begin")
    with pytest.raises(OSError, match=r"fail-point load\.begin") as error:
        reach("load.begin")
    assert error.value.errno == errno.EIO


@pytest.mark.parametrize("text", ["save.bgin", "save.begin:x", "save.begin=explode"])
def test_what_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=failpoints.VARIABLE):
        arm(text)


def test_the_environment_arms_a_kill() -> None:
    code = "from ddpm_lmk.system.failpoints import reach\nreach('load.begin')\nreach('save.begin')\nprint('alive')"
    environment = {"PYTHONPATH": str(ROOT), failpoints.VARIABLE: "save.begin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    assert done.stderr == "fail-point save.begin: kill\n"
