"""A run that goes on elsewhere, from the newest checkpoint of another one."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.errors import CheckpointError, ResourceError, RunConflictError
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.directory import copy_checkpoint

Maker = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    return Parallel("cpu")


def events(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_fork_goes_on_from_the_checkpoint_of_another_run_and_leaves_it_alone(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    execute(pretraining(train={"checkpoint_every": 1}), old, parallel=parallel)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    changed = pretraining(train={"length": 5}, optim={"lr": 0.5}, seed=7)
    with pytest.raises(RunConflictError, match="add --fork NEWDIR"):
        execute(changed, old, parallel=parallel)
    results = execute(changed, new, parallel=parallel, fork=old)
    assert results["train"]["steps"] == 5
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 5]
    assert {line["lr"] for line in lines if "loss" in line} == {0.5}
    parent = json.loads((new / "run.json").read_text())["parent"]
    assert parent == {"path": str(old), "use": "state", "step": 3, "loaded": "fork"}
    after = {path: path.read_bytes() for path in before}
    assert after == before or {path.name for path in before if after[path] != before[path]} <= {".lock"}
    assert execute(changed, new, parallel=parallel, fork=old)["train"]["steps"] == 5, "the same command is no new fork"


def test_a_fork_that_was_killed_before_its_first_step_continues(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    execute(pretraining(), old, parallel=parallel)
    new.mkdir()
    copy_checkpoint(old, new)
    with pytest.raises(RunConflictError, match="is not a run"):
        execute(pretraining(optim={"lr": 0.5}), new, parallel=parallel)
    results = execute(pretraining(train={"length": 4}, optim={"lr": 0.5}), new, parallel=parallel, fork=old)
    assert results["train"]["steps"] == 4
    assert json.loads((new / "run.json").read_text())["parent"]["loaded"] == "fork"


def test_a_fork_onto_a_full_disk_says_so(tmp_path: Path, pretraining: Maker, parallel: Parallel) -> None:
    execute(pretraining(), tmp_path / "old", parallel=parallel)
    largest, before = 4096, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(ResourceError, match="the same command continues"):
            execute(pretraining(), tmp_path / "new", parallel=parallel, fork=tmp_path / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []


def test_a_fork_of_nothing_and_of_another_network_is_refused(
    tmp_path: Path, pretraining: Maker, parallel: Parallel
) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* to go on from"):
        execute(pretraining(), tmp_path / "new", parallel=parallel, fork=tmp_path / "nothing")
    execute(pretraining(), tmp_path / "old", parallel=parallel)
    wider = pretraining(model=pretraining().model.model_dump() | {"width": 16})
    with pytest.raises(CheckpointError):
        execute(wider, tmp_path / "wide", parallel=parallel, fork=tmp_path / "old")
