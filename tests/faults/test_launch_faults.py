"""A run of two processes is hurt in every way: it resumes by itself, or says how (docs/faults.md, C5-C10, A9)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cli.commands import run_command
from tests.faults import breaking
from tests.faults.harness import Started, are_gone, events, newest_checkpoint, steps_done, write_run

pytestmark = pytest.mark.distributed

LAUNCH = {"device": "cpu", "processes": 2, "stall_s": 4}


@pytest.fixture
def run_file(tmp_path: Path, packed_phantoms: Path) -> Path:
    return write_run(
        tmp_path, packed_phantoms, duration="100000 steps", checkpoint_every="15 steps", log_every="1 steps"
    )


def start(run_file: Path, out: Path, *words: object) -> Started:
    return Started([run_file, *words], out, launch=LAUNCH)


def test_lost_and_stopped_ranks_are_replaced_and_a_signal_saves(run_file: Path, tmp_path: Path) -> None:
    """One launch: a rank is killed, a rank is stopped, a second writer comes, the scheduler asks to stop."""
    out = tmp_path / "run"
    run = start(run_file, out)
    run.until(lambda: newest_checkpoint(out))
    first = run.ranks()
    first[1].kill()
    run.until(lambda: events(out, "ranks.recovered"))
    assert are_gone([rank.pid for rank in first])
    lost = events(out, "ranks.lost")[0]
    assert "was killed (SIGKILL)" in lost["message"]
    assert "starting again from the last checkpoint" in lost["message"]

    done = steps_done(out)
    run.until(lambda: steps_done(out) > done + 4 and steps_done(out) % 15 in range(3, 8))  # far from a save
    second = run.ranks()
    second[0].send_signal(signal.SIGSTOP)
    run.until(lambda: len(events(out, "ranks.recovered")) == 2)
    stalled = events(out, "ranks.stalled")[-1]
    assert f"(process {second[0].pid}, stopped by a signal)" in stalled["message"]
    stacks = [(out / "stacks" / name).read_text() for name in stalled["stacks"]]
    assert len(stacks) == 2
    assert all("most recent call first" in text for text in stacks)
    assert are_gone([rank.pid for rank in second])

    late = run_command("pretrain", run_file, "--cpu", 2, "--out", out)
    assert late.code == 7
    assert f"in use by process {run.process.pid} on " in late.err
    assert "since 20" in late.err

    last = run.ranks()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75
    assert are_gone([rank.pid for rank in last])
    assert run.said.read_text().count("the same command continues") == 1


@pytest.mark.slow
def test_a_disk_that_is_slow_at_the_end_is_waited_for(tmp_path: Path, packed_phantoms: Path) -> None:
    """Four checkpoints are written beside training, in no time; the fifth takes three times the limit for a step."""
    run_file = write_run(
        tmp_path, packed_phantoms, duration="10 steps", checkpoint_every="2 steps", log_every="1 steps"
    )
    slow = breaking.environment({"call": "os.fsync", "save": 5, "at": None, "how": "pause"})
    run = Started([run_file], tmp_path / "run", launch=LAUNCH | {"stall_s": 2}, **slow)
    assert run.wait() == 0
    assert run.said.read_text().count("broken at os.fsync") >= 6
    assert events(tmp_path / "run", "ranks.stalled") == []


def test_a_run_in_one_process_that_hangs_says_where_and_can_be_continued(tmp_path: Path, packed_phantoms: Path) -> None:
    run_file = write_run(tmp_path, packed_phantoms, duration="2 steps", log_every="1 steps")
    out, words = tmp_path / "run", [run_file, "data.validation_split=val", "evaluate.batch=1"]
    alone = LAUNCH | {"processes": 1, "stall_s": 2}
    hanging: breaking.Break = {"call": "ddpm_lmk.engine.evaluate.beat", "at": 2, "how": "hang"}
    run = Started(words, out, launch=alone, **breaking.environment(hanging))
    assert run.wait() == 75
    [stalled] = events(out, "run.stalled")
    assert "at evaluate" in stalled["message"]
    assert "most recent call first" in Path(stalled["stacks"]).read_text()
    assert "in evaluate" in Path(stalled["stacks"]).read_text()
    assert run_command("pretrain", *words, "--cpu", 1, "--out", out).code == 0
    assert (out / "done.json").is_file()
