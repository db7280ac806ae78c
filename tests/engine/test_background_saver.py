"""Saving in the background: what is written is the state at the call, and every outcome comes back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.engine.background_saver import Checkpointer, HostCopy
from ddpm_lmk.engine.optim import moments
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.engine.training_state import TrainState
from ddpm_lmk.errors import ResourceError, RunConflictError
from ddpm_lmk.launcher.supervise import limit_s
from ddpm_lmk.rundir.checkpoint import Checkpoint, Tensors, load_latest, load_weights
from ddpm_lmk.rundir.directory import RunDir
from ddpm_lmk.rundir.retention import Keep
from ddpm_lmk.system import heartbeat
from tests.engine.toy import config, everything, fresh_state


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


class SlowRun(RunDir):
    """A run directory whose disk waits to be told, and can be told to be full."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        super().__init__(path, writes=writes)
        self.go, self.begun, self.room = threading.Event(), threading.Event(), True

    def save_checkpoint(self, tensors: Tensors, facts: dict[str, Any], **more: Any) -> bool:
        self.begun.set()
        assert self.go.wait(20)
        return super().save_checkpoint(tensors if self.room else {"model": Unwritable()}, facts, **more)


class Unwritable(dict[str, torch.Tensor]):
    """Refuses as a full disk does."""

    def values(self) -> Any:
        raise OSError(28, "No space left on device")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    cfg = config()
    with SlowRun.lock(tmp_path / "run", cfg) as run:
        run.begin(cfg, {"fingerprint": "toy"})
        yield run


def at(step: int) -> TrainState:
    state = fresh_state(config())
    state.step = step
    return state


def newest(run: RunDir) -> Checkpoint:
    found = load_latest(run.path / "checkpoints", on_bad=lambda path, reason: None)
    assert found is not None
    return found


def test_training_goes_on_while_the_state_of_the_call_is_written(run: SlowRun, parallel: Parallel) -> None:
    state = at(1)
    wanted = {name: value.clone() for name, value in everything(state).items()}
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        saver.save(state, moments(state.optimizer, state.model))  # returns although the disk does not
        assert run.begun.wait(20)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1.0)
        state.step = 2
        run.go.set()
    found = newest(run)
    assert found.state["step"] == 1
    saved = {f"{file}/{name}": v for file, group in found.tensors.items() for name, v in group.items()}
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in saved.items())
    assert "optim" in found.tensors


def test_training_goes_on_while_a_snapshot_of_the_call_is_written(
    run: SlowRun, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written after the checkpoint before it, from the same buffers."""
    state, written = at(1), threading.Event()
    plain = run.save_snapshot
    monkeypatch.setattr(run, "save_snapshot", lambda *given: written.wait(20) and plain(*given))
    run.go.set()
    wanted = {name: value.clone() for name, value in state.model.state_dict().items()}
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        saver.save(at(1), moments(state.optimizer, state.model))
        saver.keep_weights(state, {"step": 1, "selected": False})  # returns although the disk does not
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1.0)
        written.set()
        assert saver.wait(), "the last checkpoint was a success, whatever was written since"
    found, meta = load_weights(run.path / "snapshots" / "step-00000001", "model")
    assert meta["step"] == 1
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_next_save_waits_for_the_one_before(run: SlowRun, parallel: Parallel) -> None:
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        saver.save(at(1), {})
        second = threading.Thread(target=saver.save, args=(at(2), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        run.go.set()
        second.join(20)
        assert saver.wait()
    steps = [path.name for path in sorted((run.path / "checkpoints").iterdir())]
    assert steps == ["step-00000001", "step-00000002"]


def test_waiting_for_the_disk_has_a_pace_of_its_own(
    run: SlowRun, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_recorder", heartbeat.Recorder(tmp_path, 0))
    run.go.set()
    with Checkpointer(run, parallel, keep=Keep(2)) as saver:
        saver.save(at(1), {})
        heartbeat.beat("save", step=1)
        saver.wait()
        [sign] = heartbeat.read_heartbeats(tmp_path)
        assert sign.phase == "write"
        assert limit_s(sign, 60) == 600


def test_two_refusals_are_events_and_the_third_ends_the_run(run: SlowRun, parallel: Parallel) -> None:
    run.go.set()
    run.room = False
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        for step in (1, 2):
            saver.save(at(step), {})
            assert not saver.wait()
        saver.save(at(3), {})
        with pytest.raises(ResourceError, match="3 checkpoints in a row") as error:
            saver.wait()
    assert error.value.exit_code == 6
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in events].count("checkpoint.failed") == 3
    assert list((run.path / "checkpoints").iterdir()) == []


def test_a_success_forgives_the_failures_before_it(run: SlowRun, parallel: Parallel) -> None:
    run.go.set()
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        for step, room in enumerate([False, False, True, False, False], start=1):
            saver.wait()
            run.room = room
            saver.save(at(step), {})
            assert saver.wait() is room


def test_a_directory_taken_over_ends_the_run(run: SlowRun, parallel: Parallel) -> None:
    run.go.set()
    (run.path / ".lock").write_text(json.dumps({"pid": 7, "host": "other", "incarnation": "another"}))
    with (
        pytest.raises(RunConflictError, match="taken over by process 7 on other"),
        Checkpointer(run, parallel, keep=Keep(3)) as s,
    ):
        s.save(at(1), {})
    assert list((run.path / "checkpoints").iterdir()) == []


def test_an_error_in_training_lets_the_write_come_to_its_end(run: SlowRun, parallel: Parallel) -> None:
    threading.Timer(0.1, run.go.set).start()
    with pytest.raises(ZeroDivisionError):
        save_and_fail(run, parallel)
    assert newest(run).state["step"] == 1


def save_and_fail(run: RunDir, parallel: Parallel) -> None:
    with Checkpointer(run, parallel, keep=Keep(3)) as saver:
        saver.save(at(1), {})
        raise ZeroDivisionError


def test_the_best_step_and_the_one_resumed_from_are_kept(run: SlowRun, parallel: Parallel) -> None:
    run.go.set()
    run.source = 2
    with Checkpointer(run, parallel, keep=Keep(1, every=4)) as saver:
        for step in range(1, 8):
            state = at(step)
            state.patience.best_step = 3
            saver.save(state, moments(state.optimizer, state.model))
    left = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert left == [f"step-0000000{step}" for step in (2, 3, 4, 7)]


def test_memory_of_a_copy_is_used_again_and_follows_a_change_of_shape() -> None:
    copy = HostCopy()
    copy.take({"model": {"w": torch.zeros(3)}})
    first = copy.on_host()["model"]["w"]
    copy.take({"model": {"w": torch.ones(3)}, "optim": {}})
    again = copy.on_host()
    assert again["model"]["w"].data_ptr() == first.data_ptr()
    assert first.tolist() == [1.0, 1.0, 1.0]
    assert again["optim"] == {}
    wide = torch.arange(16.0).reshape(1, 2, 2, 4).contiguous(memory_format=torch.channels_last)
    copy.take({"model": {"w": wide}})
    assert torch.equal(copy.on_host()["model"]["w"], wide)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_of_device_tensors_is_of_the_moment_it_was_taken() -> None:
    copy, value = HostCopy(), torch.zeros(1 << 24, device="cuda")
    for wanted in (0.0, 1.0):
        copy.take({"model": {"w": value, "h": torch.ones(2)}})
        value.add_(1.0)
        found = copy.on_host()["model"]
        assert found["w"].is_pinned()
        assert (found["w"] == wanted).all()
        assert found["h"].tolist() == [1.0, 1.0]
