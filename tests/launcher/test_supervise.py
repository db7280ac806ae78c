"""Supervision: when a rank hangs, when it is slow, why it is gone, and how often it may be started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.errors import NoProgressError
from ddpm_lmk.launcher import Placement, run_ranks, supervise
from ddpm_lmk.system.heartbeat import Heartbeat, Recorder, read_heartbeats
from tests.faults.harness import ROOT


def heartbeat(rank: int = 0, **changes: Any) -> Heartbeat:
    facts = {"pid": os.getpid(), "phase": "step", "step": 7, "at": time.monotonic(), "interval_s": 1.0, "intervals": 9}
    return Heartbeat(**{"rank": rank, "busy_s": 0.0, "busy_steps": 0, **facts, **changes})


@pytest.mark.parametrize(
    ("last", "limit_s"),
    [
        ({"interval_s": 1.0}, 60),
        ({"interval_s": 30.0}, 300),
        ({"interval_s": 8.0, "intervals": 1}, 80),  # the pace of steps is known after one
        ({"interval_s": 0.1, "intervals": 2, "phase": "evaluate"}, 600),  # that of other phases is not
        ({"interval_s": 0.1, "phase": "setup"}, 600),  # the next data may be larger
    ],
)
def test_a_rank_hangs_after_the_limit_or_ten_usual_steps_whichever_is_longer(
    last: dict[str, Any], limit_s: float
) -> None:
    assert supervise.limit_s(heartbeat(**last), 60) == limit_s
    late = heartbeat(1, **last, at=time.monotonic() - limit_s - 1)
    assert supervise.find_stalled([heartbeat(0, **last), late], 60) == [late]


def test_a_rank_that_fell_silent_a_moment_after_the_others_is_named_with_them() -> None:
    ranks = [heartbeat(rank, at=time.monotonic() - age_s) for rank, age_s in enumerate((61, 59, 2))]
    assert supervise.find_stalled(ranks, 60) == ranks[:2]


@pytest.mark.parametrize(
    ("busy_s", "steps", "is_slow"), [(1.6, 100, True), (1.4, 100, False), (9.0, 99, False)], ids=str
)
def test_a_slow_rank_is_one_that_lets_the_others_wait_for_a_hundred_steps(
    busy_s: float, steps: int, is_slow: bool
) -> None:
    fast = [heartbeat(rank, busy_s=1.0, busy_steps=100) for rank in range(3)]
    last = heartbeat(3, busy_s=busy_s, busy_steps=steps)
    for others in (fast, fast[:1]):
        assert supervise.find_stragglers([*others, last]) == ([(last, pytest.approx(busy_s))] if is_slow else [])


def test_heartbeats_are_read_as_they_were_written_and_torn_ones_left_out(tmp_path: Path) -> None:
    recorder, began = Recorder(tmp_path, 3), time.monotonic()
    for step in (1000, 2, 3, 4):  # the longer record first: nothing of it is left
        recorder.beat("step", step, 0.25)
    [last] = read_heartbeats(tmp_path)
    assert last == recorder.last
    assert (last.rank, last.pid, last.phase, last.step, last.intervals) == (3, os.getpid(), "step", 4, 3)
    assert (last.busy_s, last.busy_steps) == (0.25, 4)
    assert 0 <= last.age_s <= time.monotonic() - began
    recorder.close()
    record = tmp_path / "rank-3"
    record.write_bytes(record.read_bytes().replace(b'"step": 4', b'"step": 5'))
    assert read_heartbeats(tmp_path) == []


def test_the_first_step_of_every_run_of_a_process_sets_the_pace(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for _ in range(2):
        recorder.beat("train", -1, None)
        time.sleep(0.5)
        recorder.beat("step", 1, None)
        [last] = read_heartbeats(tmp_path)
        assert (last.intervals, last.interval_s >= 0.5) == (1, True)
        recorder.beat("step", 2, None)
    recorder.close()


def test_the_clock_of_the_wall_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.beat("step", 1, None)
    monkeypatch.setattr(time, "time", lambda: -1e9)  # set back by decades
    recorder.beat("step", 2, None)
    recorder.close()
    assert supervise.find_stalled(read_heartbeats(tmp_path), 60) == []
    sources = {path.name: path.read_text() for path in (ROOT / "ddpm_lmk").rglob("*.py")}
    assert [name for name, text in sources.items() if "time.time()" in text] == []
    # A cache asks which copy goes first when it is full; the others whether a file is still the same one.
    files = {"remote.py", "session.py", "base.py", "in_place.py"}
    assert {name for name, text in sources.items() if "st_mtime" in text} <= files


def test_describing_a_rank_imports_nothing_since_the_disk_may_be_what_hangs() -> None:
    code = (
        "import sys\n"
        "from ddpm_lmk.launcher import supervise\n"
        "from ddpm_lmk.system.heartbeat import Recorder\n"
        "recorder = Recorder(None, 0)\n"
        "recorder.beat('step', 1, None)\n"
        "before = set(sys.modules)\n"
        "supervise.describe(recorder.last)\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_causes_are_told_apart() -> None:
    assert supervise.cause_of(-9, oom_kills=0).endswith("not for want of memory as far as the kernel says")
    assert supervise.cause_of(-11, oom_kills=0) == "was ended by SIGSEGV"
    assert supervise.cause_of(1, oom_kills=0) == "ended with exit code 1"


LOST_FIVE_TIMES = """\
import os, pathlib, sys
if os.environ["RANK"] == "1": sys.exit(0)
done = pathlib.Path(sys.argv[1]) / "checkpoints"
count = len(list(done.glob("step-*"))) if done.is_dir() else 0
if count == 5: sys.exit(0)
(done / f"step-{count:08d}").mkdir(parents=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.distributed
def test_losses_without_progress_end_the_run_and_losses_with_progress_do_not(tmp_path: Path) -> None:
    """Ranks that never get to the next checkpoint, and ranks that are lost five times with one in between."""
    with pytest.raises(NoProgressError, match="3 restarts brought no new checkpoint") as error:
        run_ranks(["-c", "import os; os.kill(os.getpid(), 9)"], Placement("cpu", 2), out=tmp_path)
    assert error.value.exit_code == 76
    (tmp_path / "rank.py").write_text(LOST_FIVE_TIMES)
    assert run_ranks([str(tmp_path / "rank.py"), str(tmp_path)], Placement("cpu", 2), out=tmp_path) == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5
