"""Signs of life: when a rank hangs, when it is slow, why it is gone, and how often it may be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ddpm_lmk.errors import NoProgressError
from ddpm_lmk.launcher import Placement, run_ranks, supervise
from ddpm_lmk.system import memory, processes
from ddpm_lmk.system import memory as cgroup
from ddpm_lmk.system.heartbeat import Beat, Pulse, read_beats
from tests.faults.harness import ROOT


def beat(rank: int = 0, **changes: object) -> Beat:
    facts: dict = {
        "pid": os.getpid(),
        "phase": "step",
        "step": 7,
        "at": time.monotonic(),
        "interval_s": 1.0,
        "count": 9,
    }
    return Beat(**{"rank": rank, "reach_s": 0.0, "reaches": 0, **facts, **changes})


def test_a_rank_hangs_after_the_limit_or_ten_usual_steps_whichever_is_longer() -> None:
    assert supervise.limit_s(beat(interval_s=1.0), 60) == 60
    assert supervise.limit_s(beat(interval_s=30.0), 60) == 300
    assert supervise.limit_s(beat(interval_s=0.1, count=2, phase="evaluate"), 60) == 600, (
        "its pace is not known at once"
    )
    assert supervise.limit_s(beat(interval_s=8.0, count=1), 60) == 80, "that of steps is, after one"
    assert supervise.limit_s(beat(interval_s=0.1, count=9, phase="setup"), 60) == 600, "the next data may be larger"
    late = time.monotonic() - 61
    assert [found.rank for found in supervise.find_stalled([beat(0, at=late), beat(1)], 60)] == [0]


def test_a_slow_rank_is_one_that_lets_the_others_wait_for_a_hundred_steps() -> None:
    fast = [beat(rank, reach_s=1.0, reaches=100) for rank in range(3)]
    [(slow, times)] = supervise.find_stragglers([*fast, beat(3, reach_s=1.6, reaches=100)])
    assert (slow.rank, times) == (3, pytest.approx(1.6))
    assert supervise.find_stragglers([*fast, beat(3, reach_s=1.4, reaches=100)]) == []
    assert supervise.find_stragglers([*fast, beat(3, reach_s=9.0, reaches=99)]) == []
    assert supervise.find_stragglers([beat(0, reach_s=1.0, reaches=100), beat(1, reach_s=2.0, reaches=100)]), "of two"


def test_signs_are_read_as_they_were_written_and_torn_ones_left_out(tmp_path: Path) -> None:
    pulse, began = Pulse(tmp_path, 3), time.monotonic()
    for step in range(4):
        pulse.beat("step", step, 0.25)
    [found] = read_beats(tmp_path)
    assert (found.rank, found.pid, found.phase, found.step, found.count) == (3, os.getpid(), "step", 3, 3)
    assert (found.reach_s, found.reaches) == (0.25, 4)
    assert 0 <= found.age_s <= time.monotonic() - began
    pulse.close()
    record = tmp_path / "rank-3"
    record.write_bytes(record.read_bytes()[:-1] + b"\xff")
    assert read_beats(tmp_path) == []


def test_the_first_step_of_every_run_of_a_process_sets_the_pace(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 0)
    for _ in range(2):
        pulse.beat("train", -1, None)
        time.sleep(0.5)
        pulse.beat("step", 1, None)
        [found] = read_beats(tmp_path)
        assert (found.count, found.interval_s >= 0.5) == (1, True)
        pulse.beat("step", 2, None)
    pulse.close()


def test_the_clock_of_the_wall_decides_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 0)
    pulse.beat("step", 1, None)
    monkeypatch.setattr(time, "time", lambda: -1e9)  # set back by decades
    pulse.beat("step", 2, None)
    pulse.close()
    assert supervise.find_stalled(read_beats(tmp_path), 60) == []
    users = [path for path in (ROOT / "ddpm_lmk").rglob("*.py") if "time.time()" in path.read_text()]
    assert [path.name for path in users] == ["supervise.py"], "only the names of stack files hold the time of day"
    users = [path for path in (ROOT / "ddpm_lmk").rglob("*.py") if "st_mtime" in path.read_text()]
    equal = {"session.py", "base.py"}  # they ask whether a file is still the same one, never which is older
    assert {path.name for path in users} - equal <= {"remote.py"}, "which copy goes first when a cache is full"


@pytest.mark.parametrize(
    ("files", "membership", "count"),
    [
        ({"own/memory.events": "low 0\noom_kill 4\n"}, "0::/own\n", 4),
        ({"memory/own/memory.oom_control": "under_oom 0\noom_kill 2\n"}, "4:memory:/own\n0::/\n", 2),
        ({"memory.events": "oom_kill 1\n"}, "0::/not/mounted\n", 1),
        ({}, "0::/\n", None),
    ],
    ids=["version 2", "version 1", "container", "none"],
)
def test_kills_for_want_of_memory_are_counted(
    tmp_path: Path, files: dict[str, str], membership: str, count: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert memory.count_oom_kills(tmp_path, tmp_path / "membership") == count


def test_a_real_kill_for_want_of_memory_is_seen(tmp_path: Path) -> None:
    """A process in a memory group of 64 MiB takes 256; where groups may not be made, there is nothing to test."""
    group = cgroup.ROOT / "memory" / f"ddpm-lmk-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError:
        pytest.skip("no rights to make a memory group (cgroup version 1)")
    (tmp_path / "membership").write_text(f"4:memory:/{group.name}\n")
    try:
        before = memory.count_oom_kills(cgroup.ROOT, tmp_path / "membership")
        assert before == 0
        enter = f"open('{group}/cgroup.procs', 'w').write('0')"
        code = subprocess.run([sys.executable, "-c", f"{enter}; b'x' * (256 << 20)"], check=False).returncode
        after = memory.count_oom_kills(cgroup.ROOT, tmp_path / "membership")
        assert (code, after) == (-9, 1)
        assert "for want of memory; use a smaller train.micro_batch" in supervise.cause_of(code, oom_kills=1)
    finally:
        with suppress(OSError):
            group.rmdir()


def test_causes_are_told_apart() -> None:
    assert supervise.cause_of(-9, oom_kills=0).endswith("not for want of memory as far as the kernel says")
    assert supervise.cause_of(-11, oom_kills=0) == "was ended by SIGSEGV"
    assert supervise.cause_of(1, oom_kills=0) == "ended with exit code 1"


def test_a_process_without_its_launcher_ends() -> None:
    """The launcher is gone before the rank asks, and after it has asked."""
    gone = subprocess.run(
        [sys.executable, "-c", "from ddpm_lmk.system.processes import die_with_parent; die_with_parent(1)"],
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert gone.returncode == processes.ORPHANED
    child = (
        "import os, time; from ddpm_lmk.system.processes import die_with_parent\n"
        "die_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    with process.stdout as words:
        pid = int(words.readline())
    process.kill()
    process.wait()
    limit = time.monotonic() + 60
    while processes.state_of(pid) not in ("", "Z"):
        assert time.monotonic() < limit, "it has outlived its parent"
        time.sleep(0.02)


@pytest.mark.distributed
def test_losses_without_progress_end_the_run_and_losses_with_progress_do_not(tmp_path: Path) -> None:
    """Ranks that never get to the next checkpoint, and ranks that are lost five times with one in between."""
    with pytest.raises(NoProgressError, match="3 restarts brought no new checkpoint") as error:
        run_ranks(["-c", "import os; os.kill(os.getpid(), 9)"], Placement("cpu", 2), out=tmp_path)
    assert error.value.exit_code == 76
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "if os.environ['RANK'] == '1': sys.exit(0)\n"
        "done = pathlib.Path(sys.argv[1]) / 'checkpoints'\n"
        "count = len(list(done.glob('step-*'))) if done.is_dir() else 0\n"
        "if count == 5: sys.exit(0)\n"
        "(done / f'step-{count:08d}').mkdir(parents=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert run_ranks([str(script), str(tmp_path)], Placement("cpu", 2), out=tmp_path) == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5


def test_signals_outside_of_training_end_a_process_with_the_code_of_a_stop() -> None:
    code = (
        "import time; from ddpm_lmk.system.signals import leaving_at_once\n"
        "with leaving_at_once(): print('in', flush=True); time.sleep(60)"
    )
    for number, wanted in ((signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == wanted
        assert "the same command continues" in said


def test_what_is_not_saved_within_the_grace_is_left_and_the_code_is_the_same() -> None:
    """The main thread sleeps in C and never looks at the flag."""
    code = (
        "import time; from ddpm_lmk.system.signals import StopRequest\n"
        "with StopRequest(within_s=0.3): print('in', flush=True); [time.sleep(0.1) for _ in range(600)]"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "continues from the last checkpoint" in said
