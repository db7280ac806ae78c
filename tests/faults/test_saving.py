"""Whatever happens to a save, there is a good checkpoint, and the run ends with the bits of one nothing happened to."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import processes
from tests.faults import campaign, disk, outputs, syscalls
from tests.faults.breaking import Break
from tests.faults.forge import Forge
from tests.faults.saving import Outcome, continues, damage_all, good_steps, job, kill_often, undisturbed

# In the second save, which drops the checkpoint before it. Files are flushed one by one: state,
# model, ema, optim, best, manifest; then their folder, and once that has its name the folder around it.
SAVING: list[Break] = [
    {"call": "os.mkdir", "at": 2, "how": "kill"},  # nothing is written yet (the first call is that of `checkpoints`)
    {"call": "os.fsync", "at": 1, "how": "kill"},
    {"call": "os.fsync", "at": 6, "how": "kill"},
    {"call": "os.fsync", "at": 7, "how": "kill"},
    {"call": "os.rename", "at": 1, "how": "kill"},
    {"call": "os.rename", "at": 1, "how": "kill after"},
    {"call": "os.rename", "at": 2, "how": "kill"},  # the new one is durable, the old one still has its name
    {"call": "os.rename", "at": 2, "how": "kill after"},
]
REFUSALS: list[Break] = [
    {"call": "os.mkdir", "at": 2, "how": "ENOSPC"},
    {"call": "os.fsync", "at": 3, "how": "ENOSPC"},
    {"call": "os.rename", "at": 1, "how": "ENOSPC"},
    {"call": "os.fsync", "at": 8, "how": "ENOSPC"},
    {"call": "os.rename", "at": 2, "how": "ENOSPC"},
]
LOADING: list[Break] = [
    {"call": "os.rename", "at": 2, "how": "kill"},  # the damaged one goes aside (the first call tries the folder)
    {"call": "os.rename", "at": 2, "how": "kill after"},
    {"call": "ddpm_lmk.engine.training_state.load_moments", "how": "kill"},  # a good one is read and verified
]


def told(place: Break) -> str:
    return " ".join(str(place[key]) for key in ("call", "at", "how") if key in place)  # type: ignore[literal-required]


@pytest.fixture(scope="module")
def wanted(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return undisturbed(forge, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("place", SAVING, ids=told)
def test_killed_at_a_call_of_a_save_it_continues(forge: Forge, wanted: Outcome, tmp_path: Path, place: Break) -> None:
    work = job(tmp_path / "run")
    code, said = forge.run(work, breaks=[place | {"save": 2}])
    assert code == -signal.SIGKILL, said
    assert good_steps(tmp_path / "run")
    continues(forge, work, wanted)


@pytest.mark.parametrize("place", LOADING, ids=told)
def test_killed_while_it_loads_it_continues(forge: Forge, wanted: Outcome, tmp_path: Path, place: Break) -> None:
    out = tmp_path / "run"
    work = job(out)
    work["config"]["runtime"]["keep_checkpoints"] = 2
    third: Break = {"call": "os.mkdir", "save": 3, "how": "kill"}
    assert forge.run(work, breaks=[third])[0] == -signal.SIGKILL
    assert good_steps(out) == [6, 3]
    with (out / "checkpoints" / "step-00000006" / "optim.safetensors").open("ab") as file:
        file.write(b"?")
    code, said = forge.run(work, breaks=[place])
    assert code == -signal.SIGKILL, said
    continues(forge, work, wanted)
    assert processes.events(out).count("checkpoint.bad") == (0 if place["how"] == "kill after" else 1)


@pytest.mark.parametrize("place", REFUSALS, ids=told)
def test_a_disk_that_refuses_a_call_of_a_save_costs_no_step(
    forge: Forge, wanted: Outcome, tmp_path: Path, place: Break
) -> None:
    out = tmp_path / "run"
    code, said = forge.run(job(out), breaks=[place | {"save": 2}])
    assert code == 0, said
    assert f"broken at {place['call']}: ENOSPC" in said
    assert Outcome.of(out) == wanted
    assert {"checkpoint.failed", "retention.failed"} & set(processes.events(out))
    assert good_steps(out)[0] == 12


@pytest.mark.parametrize("how", ["kill", "kill after"])
def test_killed_while_its_first_file_is_written_it_continues(
    forge: Forge, wanted: Outcome, tmp_path: Path, how: Any
) -> None:
    work = job(tmp_path / "run")
    assert forge.run(work, breaks=[{"call": "os.replace", "how": how}])[0] == -signal.SIGKILL
    assert not good_steps(tmp_path / "run")
    continues(forge, work, wanted)


def test_killed_at_random_moments_it_continues(forge: Forge, wanted: Outcome, tmp_path: Path) -> None:
    assert kill_often(forge, tmp_path, wanted, kills=3, seed=11) == 3


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(forge: Forge, wanted: Outcome, tmp_path: Path) -> None:
    """Files may not grow beyond 900 bytes until step 7: neither the state of step 3 nor every line fits."""
    out = tmp_path / "run"
    forge.finish(job(out, largest_file=900, room_from=7))
    names = processes.events(out)
    assert names.count("checkpoint.failed") in (1, 2), "step 6 is saved while room is made"
    assert names.index("checkpoint.failed") < names.index("checkpoint.saved")
    assert "lines.lost" in names
    assert Outcome.of(out).digest == wanted.digest


def test_a_signal_during_a_save_waits_for_it(forge: Forge, wanted: Outcome, tmp_path: Path) -> None:
    work = job(tmp_path / "run", signal_at=4)
    code, said = forge.run(work, breaks=[{"call": "os.fsync", "save": 1, "how": "pause"}])
    assert code == 75, said
    assert good_steps(tmp_path / "run") == [5, 3], "the newest, and the newest at the interval"
    saved = [event for event in processes.events(tmp_path / "run") if event == "checkpoint.saved"]
    assert len(saved) == 2, "the save that was under way, and the one of the signal"
    del work["signal_at"]
    continues(forge, work, wanted)


def test_no_damage_to_the_newest_checkpoint_is_loaded(forge: Forge, tmp_path: Path) -> None:
    work = job(tmp_path / "run")
    work["config"]["runtime"]["keep_checkpoints"] = 2
    forge.finish(work)
    found = damage_all(tmp_path / "run" / "checkpoints", flips=60, truncations=18)
    assert found == {"flipped": 60, "truncated": 18, "deleted": 6, "emptied": 6, "grown": 6}


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
def test_a_save_flushes_before_it_renames_and_renames_before_it_says_so(forge: Forge, tmp_path: Path) -> None:
    syscalls.want_flushes_in_order(syscalls.watch(forge, tmp_path))


@needs_strace
@pytest.mark.parametrize(
    "disturbance", ["fsync:signal=KILL:when=2", "rename:signal=KILL:when=1", "write:error=ENOSPC:when=3"]
)
def test_a_system_call_of_a_save_killed_or_refused(
    forge: Forge, wanted: Outcome, tmp_path: Path, disturbance: str
) -> None:
    syscalls.disturb(forge, tmp_path, disturbance, wanted)


def test_disks_of_so_many_checkpoints(forge: Forge, tmp_path: Path) -> None:
    wanted = undisturbed(forge, tmp_path, ballast=disk.BALLAST)
    size = disk.checkpoint_size(tmp_path / "undisturbed")
    for times, code in ((1.0, 6), (2.5, 0)):
        facts = disk.fill(forge, tmp_path / str(times), wanted, times=times, checkpoint_bytes=size)
        assert facts["exit"] == code


def test_results_are_whole_or_absent(forge: Forge, tmp_path: Path, packed_phantoms: Path) -> None:
    wanted = outputs.undisturbed(forge, packed_phantoms, tmp_path / "undisturbed")
    assert {"results.json", "predictions.csv", "done.json"} <= wanted.keys()
    places: list[Break] = [
        {"call": "os.replace", "at": 5, "how": "kill"},
        {"call": "os.replace", "at": 6, "how": "kill after"},
    ]
    for number, place in enumerate(places):
        assert outputs.interrupt(forge, outputs.job(packed_phantoms, tmp_path / f"run-{number}"), place, wanted)


@pytest.mark.slow
@needs_strace
def test_the_whole_campaign(tmp_path: Path) -> None:
    figures = campaign.campaign(tmp_path, sys.stdout.write)
    assert figures["system_calls"]["killed"] > 80
    assert [row["exit"] for row in figures["full_disk"]][-1] == 0
