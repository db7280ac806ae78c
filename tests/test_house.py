"""The measures of the package, on a made-up one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house

FILES = {
    "toy/__init__.py": '"""A package."""\n',
    "toy/run.py": "from toy import data\nfrom toy.net import layers\n\nx = data, layers  # the only comment\n",
    "toy/data.py": "def late():\n    from toy import run\n    return run\n",
    "toy/net/__init__.py": "",
    "toy/net/layers.py": "import toy.net.blocks\n",
    "toy/net/blocks.py": "if TYPE_CHECKING:\n    from toy import run\n",
    "toy/unused.py": '"""Two lines,\nno code."""\n',
    "benchmarks/one.py": "a = 1\n",
    "tests/one.py": "a = 1\nb = 2\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_row_of_the_table_is_counted(root: Path) -> None:
    assert house.measure(root, package="toy", start="toy.run") == {
        "files": 7,
        "lines": 13,
        "top files": 4,
        "top folders": 1,
        "layers of import": 3,  # blocks, layers, run
        "circles at import": 0,
        "circles, imports in functions included": 1,
        "modules of a run": 6,  # all but the unused one
        "lines of a run": 11,
        "modules of a run, imports in functions included": 6,
        "comments per 100 lines of code": 11.1,  # one comment, nine lines of code
        "lines of benchmarks": 1,
        "lines of tests": 2,
    }


def test_a_circle_is_named_and_counts_as_one_link() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert house.circles(arrows) == [["b", "c"]]
    assert house.num_layers(arrows) == 3


def test_what_is_wanted_is_measured(root: Path) -> None:
    measured = house.measure(root, package="toy", start="toy.run").keys()
    assert house.WANTED.keys() - measured == {"documented keys of a pretrain run file"}
