"""The queue for borrowed machines: it goes on where it was cut off or killed, ends in time whatever hangs, and says
what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import _gpu_items
import _gpu_queue
import _subject
import pytest
from _gpu_items import Item, items
from _gpu_queue import Queue

from ddpm_lmk.bench import Result
from ddpm_lmk.config.load import load_run

ROOT = Path(__file__).parents[2]
CALL_S, START_S = 240, 30  # of a call; for imports, wheels and the archive


def script(folder: Path, name: str, code: str) -> tuple[str]:
    """Words that run this code."""
    (path := folder / f"{name}.py").write_text(code)
    return (str(path),)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_queue, "PRELOADED", ())
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    made = Queue(tmp_path / "state", tmp_path / "carried", call=1, is_smoke=False)
    good = script(tmp_path, "good", "import os; print('well', os.getcwd())")
    bad = script(tmp_path, "bad", "raise SystemExit(3)")
    slow = script(tmp_path, "slow", "import time; print('begun', flush=True); time.sleep(600)")
    made.items = [
        Item("good", 1, good, 1, 60, ""),
        Item("bad", 1, bad, 1, 60, ""),
        Item("slow", 1, slow, 1, 1, ""),
        Item("lacking", 1, good, 1, 60, "", modules=("no_such_module", "no_such.module")),
        Item("after", 1, good, 1, 60, "", needs=("bad",)),
    ]
    return made


def outcomes(queue: Queue) -> dict[str, object]:
    return {str(row["item"]): row["outcome"] for row in queue.rows()}


def test_items_pass_fail_take_too_long_and_are_skipped(queue: Queue, tmp_path: Path) -> None:
    for item in queue.due():
        queue.run(item, left_s=500)
    assert outcomes(queue) == {
        "good": "passed",
        "bad": "failed: exit code 3",
        "slow": "failed: over its limit",
        "lacking": "skipped: no no_such_module here, no no_such.module here",
        "after": "skipped: bad did not pass",
    }
    assert (queue.logs / "good.log").read_text() == f"well {ROOT}\n"
    assert [item.name for item in queue.due()] == ["lacking", "after"], "what ended is not done again"


def test_every_file_that_a_call_says_it_brings_home_is_there(queue: Queue, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for item in queue.due():
        queue.run(item, left_s=500)
        queue.bring(out)
        report = json.loads((out / "gpu_queue.json").read_text())
        with tarfile.open(out / "gpu_queue.tar.gz") as archive:
            assert archive.getnames() == report["calls"]["1"]["brought"]
    assert {"logs/good.log", "done/bad.json", "results/gpu_queue-cuda.json"} <= set(report["calls"]["1"]["brought"])
    assert "slow" in (out / "gpu_queue.txt").read_text()
    assert [path.name for path in out.glob(".*")] == [], "nothing half-written"


def test_a_call_without_time_leaves_items_for_the_next(queue: Queue, tmp_path: Path) -> None:
    slow = Item("slow", 1, queue.items[2].words, 1, 500, "")
    queue.items = [slow, queue.items[0], Item("long", 1, slow.words, 300, 500, "")]
    for item, left_s in zip(queue.items, (1, 0.1, 249)):
        queue.run(item, left_s)
    found = outcomes(queue)
    assert str(found["slow"]).startswith("later: cut off after ")
    assert found["good"] == found["long"] == "later: no time left in this call"
    assert not list(queue.done.iterdir())
    assert (queue.logs / "slow.log").read_text() == "begun\n", "what it said until then comes home"


def test_a_benchmark_is_told_its_end_and_what_it_leaves_out_is_kept(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu_items, "HERE", tmp_path)
    write = (
        "import json, sys, time\n"
        f"results = {str(queue.results)!r}\n"
        "name, left_out, *_, until = sys.argv[1:]\n"
        "assert 10 < float(until) - time.monotonic() < 60\n"
        "facts = {'budget': {'left_out': json.loads(left_out)}}\n"
        "open(f'{results}/{name}.json', 'w').write(json.dumps(facts))\n"
    )
    [path] = script(tmp_path, "write", write)
    [nothing] = script(tmp_path, "nothing", "")
    some = '["a part", "another"]'
    queue.items = [
        Item("whole", 1, (path, "whole", "[]"), 1, 60, ""),
        Item("short", 1, (path, "short", some), 1, 60, ""),
        Item("cut", 1, (path, "cut", some), 1, 600, ""),
        Item("empty", 1, (nothing,), 1, 60, ""),
    ]
    for item in queue.due():
        queue.run(item, left_s=60 if item.name == "cut" else 500)
    assert outcomes(queue) == {
        "whole": "passed",
        "short": "passed, 2 left out",
        "cut": "later: 2 left out at the end of this call",
        "empty": "failed: no result",
    }
    assert [item.name for item in queue.due()] == ["cut"]


def test_an_item_that_is_done_again_begins_with_an_empty_folder(queue: Queue, tmp_path: Path) -> None:
    folder = tmp_path / "filled"
    code = f"import os, time; os.mkdir({str(folder)!r}); time.sleep(float(open({str(tmp_path / 's')!r}).read()))"
    queue.items = [Item("fill", 1, script(tmp_path, "fill", code), 1, 3, "", fills=folder)]
    for seconds, outcome in (("600", "failed: over its limit"), ("0", "passed")):
        (tmp_path / "s").write_text(seconds)
        queue.run(queue.items[0], left_s=500)
        assert outcomes(queue) == {"fill": outcome}


class UnderstoodError(Exception):
    """Raised where a benchmark would begin to measure."""


def test_every_command_line_of_full_size_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as without a GPU: its words are taken, and its run file with its settings is right."""

    def begin(*_: object, **__: object) -> None:
        raise UnderstoodError

    monkeypatch.setattr(_subject, "device_of", lambda options: options.device)
    monkeypatch.setattr(_subject.Subject, "__init__", begin)
    monkeypatch.setattr(Result, "__init__", begin)
    found = set()
    for item in items(results=tmp_path, packs=tmp_path, runs=tmp_path, is_smoke=False):
        if item.is_benchmark:
            monkeypatch.setattr(sys, "argv", [*item.words, "--until", str(time.monotonic() + 60)])
            with pytest.raises(UnderstoodError):
                runpy.run_path(item.words[0], run_name="__main__")
            found.add(item.name)
        elif item.words[2] in ("pretrain", "finetune"):
            settings = [word for word in item.words if "=" in word]
            assert load_run(Path(item.words[3]), settings).train.duration.count == 40
            found.add(item.name)
    assert len(found) == 12


def is_gone(process: int) -> bool:
    """Has it ended, or does within seconds?"""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(200):
        with suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().split()[2] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


def test_what_an_item_started_ends_with_it(queue: Queue, tmp_path: Path) -> None:
    code = "import subprocess, sys\np = subprocess.Popen(['sleep', '600'])\nprint(p.pid, flush=True)\np.wait()"
    queue.items = [Item("parent", 1, script(tmp_path, "parent", code), 1, 3, "")]
    queue.run(queue.items[0], left_s=500)
    assert is_gone(int((queue.logs / "parent.log").read_text()))


def test_a_process_that_does_not_die_is_left_behind(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a driver: killing does nothing."""
    asked: list[int] = []
    monkeypatch.setattr(_gpu_queue, "GRACE_S", 0.1)
    monkeypatch.setattr(_gpu_queue.os, "killpg", lambda group, number: asked.append(group))
    monkeypatch.setattr(BaseProcess, "kill", lambda process: None)
    queue.run(queue.items[2], left_s=500)
    assert outcomes(queue)["slow"] == "failed: over its limit"
    monkeypatch.undo()
    with suppress(ProcessLookupError):
        os.killpg(asked[0], signal.SIGKILL)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import _gpu_queue
from _gpu_items import Item
_gpu_queue.PRELOADED = ()
def two(**places):
    yield Item("first", 1, ({first!r},), 1, 60, "")
    yield Item("second", 1, ({second!r},), 1, 60, "")
_gpu_queue.items = two
if __name__ == "__main__":
    sys.exit(_gpu_queue.main())
"""


def test_a_call_killed_in_the_middle_has_brought_home_what_was_done_and_goes_on(tmp_path: Path) -> None:
    times = tmp_path / "times"
    counted = f"open({str(times)!r}, 'a').write('{{}}')"
    [first] = script(tmp_path, "first", counted.format("1"))
    [second] = script(tmp_path, "second", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    names = {"benchmarks": str(ROOT / "benchmarks"), "first": first, "second": second}
    [driver] = script(tmp_path, "driver", DRIVER.format(**names))
    out = tmp_path / "out"
    command = [sys.executable, driver, "1", "--state", str(tmp_path / "state"), "--out", str(out), "--carried", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        log = tmp_path / "state" / "logs" / "second.log"
        while not (log.exists() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert is_gone(int(log.read_text())), "an item does not outlive its queue"
    with tarfile.open(out / "gpu_queue.tar.gz") as archive:
        assert "done/first.json" in archive.getnames()
    script(tmp_path, "second", counted.format("2"))
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert times.read_text() == "12", "the first was done once"


def test_another_machine_goes_on_from_the_archive_and_makes_what_it_reads_again(queue: Queue, tmp_path: Path) -> None:
    product = tmp_path / "product"
    make = script(tmp_path, "make", f"open({str(product)!r}, 'w').write('made')")
    first, read = queue.items[0], Item("read", 2, queue.items[0].words, 1, 60, "", needs=("make",))
    queue.items = [first, Item("make", 1, make, 1, 60, "", makes=product), read]
    for item in queue.due():
        queue.run(item, left_s=500)
    queue.bring(queue.carried / "back")
    product.unlink()
    other = Queue(tmp_path / "bare", queue.carried, call=2, is_smoke=False)
    other.items = queue.items
    other.take()
    assert outcomes(other)["good"] == "passed"
    assert (other.logs / "good.log").read_text() == f"well {ROOT}\n"
    done = []
    for item in other.due():
        other.run(item, left_s=500)
        done.append(item.name)
    assert done == ["make", "read"]
    assert outcomes(other)["read"] == "passed"


def test_an_item_begins_from_nothing_where_something_asked_cuda_before_the_fork(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from types import SimpleNamespace
import _gpu_queue
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(_is_in_bad_fork=lambda: True))
_gpu_queue.carry_out(sys.argv[1:], {str(tmp_path / "log")!r}, {{}}, [])
"""
    words = script(tmp_path, "item", "import sys; print('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", code, *words], check=True)
    assert (tmp_path / "log").read_text() == "False\n"


def test_nothing_that_is_imported_before_the_fork_asks_for_cuda() -> None:
    code = (
        f"import sys, os, importlib; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\n"
        "import _gpu_queue\nfor name in _gpu_queue.PRELOADED: importlib.import_module(name)\n"
        "import torch, threading\n"
        "pid = os.fork()\nif pid == 0: os._exit(torch.cuda._is_in_bad_fork())\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + torch.cuda.is_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def wheel(folder: Path, name: str = "carried_thing", module: str = "carried_thing.py") -> Path:
    """A package of one module, packed by hand."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(module, "answer = 42\n" + "".join(f"# {i}\n" for i in range(1000)))
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_in_parts_is_installed_when_the_last_part_came(queue: Queue, tmp_path: Path) -> None:
    (first := queue.carried / "1").mkdir(parents=True)
    whole = wheel(tmp_path)
    content = whole.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (first / f"{whole.name}.sha256").write_text(f"{digest}  {whole.name}\n")
    (first / f"{whole.name}.part-01").write_bytes(content[:500])
    queue.take()
    assert not _gpu_queue.has("carried_thing")
    (first / f"{whole.name}.part-01").unlink()
    (second := queue.carried / "2").mkdir()
    (second / f"{whole.name}.part-02").write_bytes(content[500:])
    queue.take()
    assert _gpu_queue.has("carried_thing")
    assert [file.name for file in queue.wheels.glob("*.part-*")] == []


def test_wheels_of_two_calls_may_share_a_folder(queue: Queue, tmp_path: Path) -> None:
    """As those of NVIDIA do; where one of them is broken, the others are installed."""
    for name in ("first", "second"):
        (call := queue.carried / name).mkdir(parents=True)
        wheel(call, f"carried_{name}", f"carried/{name}.py")
        (call / "broken-1.0-py3-none-any.whl").write_text("none")
        queue.take()
    assert _gpu_queue.has("carried.first")
    assert _gpu_queue.has("carried.second")


def test_every_item_is_there_in_both_sizes_names_files_that_exist_and_fits_its_call(tmp_path: Path) -> None:
    places = {"results": tmp_path, "packs": tmp_path, "runs": tmp_path}
    full, toy = (list(items(**places, is_smoke=is_smoke)) for is_smoke in (False, True))
    assert [item.name for item in full] == [item.name for item in toy]
    for item in [*full, *toy]:
        files = [word for word in item.words if word.endswith((".py", ".yaml"))]
        assert all(Path(file).is_file() for file in files), item.name
        assert item.about_s < item.limit_s
        assert item.fills is None or str(item.fills) in item.words, item.name
    for call in (1, 2, 3):
        assert sum(item.about_s for item in full if item.call == call) <= CALL_S - START_S


@pytest.mark.slow
def test_the_whole_queue_runs_at_toy_size_on_a_processor(tmp_path: Path) -> None:
    words = ["--cpu-smoke", "--budget-s", "3000", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": sys.executable}
    for call in "123":
        command = [str(ROOT / "benchmarks" / "gpu_queue.sh"), call, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        table = (tmp_path / "out" / "gpu_queue.txt").read_text()
        assert done.returncode == 0, table + done.stdout[-3000:]
    assert "passed" in table
    assert "later" not in table
    with tarfile.open(tmp_path / "out" / "gpu_queue.tar.gz") as archive:
        brought = set(archive.getnames())
    assert set(json.loads((tmp_path / "out" / "gpu_queue.json").read_text())["calls"]["3"]["brought"]) == brought
    found = [json.loads(file.read_text()) for file in (tmp_path / "state" / "results").glob("*.json")]
    assert {"device", "step", "peers", "train", "switches"} <= {result.get("benchmark") for result in found}
