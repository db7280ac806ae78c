"""Told to stop: the run leaves something that goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine import processes
from tests.engine.toy import config
from tests.faults.forge import Forge, Worker

SETTINGS: dict[str, Any] = {
    "duration": 12,
    "micro_batch": 2,
    "select": "best",
    "evaluate_every": 2,
}


def job(out: Path, **more: Any) -> dict[str, Any]:
    settings = {"train": SETTINGS, "runtime": {"checkpoint_every": 3}, "data": {"validation_split": "val"}}
    cfg = config(**settings, optim={"plateau": {"patience": 0}})
    return {"config": cfg.model_dump(mode="json"), "out": str(out), **more}


def started(forge: Forge, tmp_path: Path) -> Worker:
    """A run that waits for a signal after its second step."""
    [worker] = processes.launch(forge, tmp_path, [job(tmp_path / "run", announce_at=2)], world=1)
    worker.wait_for("there")
    return worker


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_code(
    forge: Forge, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    worker = started(forge, tmp_path)
    worker.send_signal(number)
    codes, said = processes.wait([worker])
    assert codes == [code]
    assert "the same command continues" in said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_the_same_request_arriving_twice_at_once_is_one_request(forge: Forge, tmp_path: Path) -> None:
    worker = started(forge, tmp_path)
    worker.send_signal(signal.SIGSTOP)
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGINT)  # a launcher passes on what the keyboard also sent
    worker.send_signal(signal.SIGCONT)
    assert processes.wait([worker])[0][0] in (75, 130)
    assert (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_later_leaves_at_once_and_saves_nothing(forge: Forge, tmp_path: Path) -> None:
    cfg_job = job(tmp_path / "run", announce_at=2)
    cfg_job["config"]["train"]["duration"] = "1000000 steps"
    cfg_job["hold"] = True
    [worker] = processes.launch(forge, tmp_path, [cfg_job], world=1)
    worker.wait_for("there")
    worker.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    worker.send_signal(signal.SIGTERM)
    assert processes.wait([worker])[0] == [128 + signal.SIGTERM]
    assert not (tmp_path / "run" / "checkpoints").exists()
