"""The queue for borrowed machines: it goes on where it was cut off, names what is missing, joins what came in parts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import _gpu_queue
import pytest
from _gpu_items import Item, items
from _gpu_queue import Queue

ROOT = Path(__file__).parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    made = Queue(tmp_path / "state", tmp_path / "carried", is_smoke=False)
    made.items = [
        Item("good", (python("print('well')"), python("open('/dev/null')")), 60),
        Item("bad", (python("raise SystemExit(3)"), python("print('never')")), 60),
        Item("slow", (python("import time; time.sleep(600)"),), 1),
        Item("lacking", (python("print('never')"),), 60, ("no_such_module",), "no_such_pack"),
    ]
    return made


def outcomes(queue: Queue) -> dict[str, str]:
    return {name: outcome for name, outcome, _ in queue.table()}


def test_items_pass_fail_take_too_long_and_are_skipped(queue: Queue, tmp_path: Path) -> None:
    for item in queue.items:
        queue.run(item, left_s=500)
    assert outcomes(queue) == {
        "good": "passed",
        "bad": "failed: exit code 3",
        "slow": "failed: over its limit",
        "lacking": "skipped: no no_such_module, no packed no_such_pack here",
    }
    assert "never" not in (queue.logs / "bad.log").read_text()
    queue.bundle(tmp_path / "out", "table")
    with tarfile.open(tmp_path / "out" / "gpu_queue.tar.gz") as archive:
        assert {"logs/good.log", "done/bad.json"} <= set(archive.getnames())


def test_a_call_without_time_leaves_items_for_the_next(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_queue, "FEWEST_S", 0.5)
    slow = Item("slow", (python("import time; time.sleep(600)"),), 500, goes_on=True)
    queue.items = [slow, queue.items[0]]
    queue.run(slow, left_s=1)
    queue.run(queue.items[1], left_s=0.1)
    assert outcomes(queue)["slow"].startswith("later: cut off after ")
    assert outcomes(queue)["good"] == "later: no time left in this call"
    queue.run(Item("long", slow.commands, 500), left_s=249)
    assert outcomes(queue)["slow"].startswith("later: cut off after ")
    assert not (queue.logs / "long.log").exists(), "it would be cut off half-way, and its time lost"
    assert not list(queue.done.iterdir())


def test_another_machine_goes_on_from_the_archive_of_the_first(queue: Queue, tmp_path: Path) -> None:
    queue.run(queue.items[0], left_s=500)
    queue.carried.mkdir()
    queue.bundle(queue.carried, "table")
    other = Queue(tmp_path / "bare", queue.carried, is_smoke=False)
    other.items = queue.items
    assert outcomes(other)["good"] == "later: not asked for"
    other.take()
    assert outcomes(other)["good"] == "passed"
    assert (other.logs / "good.log").read_text() == "well\n"


def wheel(folder: Path) -> Path:
    """A package of one module, packed by hand."""
    path, info = folder / "carried_thing-1.0-py3-none-any.whl", "carried_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carried_thing.py", "answer = 42\n" + "# padding\n" * 1000)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_in_parts_is_installed_when_the_last_part_came(queue: Queue, tmp_path: Path) -> None:
    queue.carried.mkdir()
    whole = wheel(tmp_path)
    content = whole.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (queue.carried / f"{whole.name}.sha256").write_text(f"{digest}  {whole.name}\n")
    (queue.carried / f"{whole.name}.part-00").write_bytes(content[:500])
    queue.take()
    assert not queue.has("carried_thing")
    (queue.carried / f"{whole.name}.part-00").unlink()
    (queue.carried / f"{whole.name}.part-01").write_bytes(content[500:])
    queue.take()
    assert queue.has("carried_thing")
    assert [file.name for file in queue.wheels.glob("*.part-*")] == []


def test_every_item_is_there_in_both_sizes_and_names_files_that_exist(tmp_path: Path) -> None:
    places = {"results": tmp_path, "packs": tmp_path, "runs": tmp_path}
    full, toy = (list(items(**places, is_smoke=is_smoke)) for is_smoke in (False, True))
    assert [item.name for item in full] == [item.name for item in toy]
    for item in [*full, *toy]:
        files = [word for command in item.commands for word in command if word.endswith((".py", ".yaml"))]
        assert all(Path(file).is_file() for file in files), item.name
    assert sum(item.limit_s for item in full) < 4000


@pytest.mark.slow
def test_the_whole_queue_runs_at_toy_size_on_a_processor(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu_queue.sh"), "--cpu-smoke", "--budget-s", "6000", "--state"]
    words = [str(tmp_path / "state"), "--out", str(tmp_path / "out"), "--carried", str(tmp_path / "nothing")]
    done = subprocess.run(
        [*command, *words], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    table = (tmp_path / "out" / "gpu_queue.txt").read_text()
    assert done.returncode == 0, table + done.stdout[-3000:]
    assert "passed" in table
    assert "later" not in table
    found = [json.loads(file.read_text()) for file in (tmp_path / "state" / "results").glob("*.json")]
    assert {"device", "step", "peers", "train"} <= {result.get("benchmark") for result in found}
