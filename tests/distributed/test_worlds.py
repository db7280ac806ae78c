"""One to four processes do the same run; killed and continued, two and three of them end with the same bits.

The network has a standardised convolution, whose gradient passes through the standardisation once per step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import processes
from tests.engine.toy import config
from tests.faults.forge import Forge

pytestmark = pytest.mark.distributed

EXACT: dict[str, Any] = {"lr": 0.05, "clip": {"limit": 0.2}, "plateau": {"patience": 0}}
WORLDS = (1, 2, 3, 4)
BAD = [9]  # the place in the stream of an image whose loss is not a number: in step 2, on the last rank
SETTINGS: dict[str, Any] = {"duration": 6, "global_batch_size": 8, "micro_batch": 1, "epoch_boundary": "epoch"}


def job(
    out: Path, *, optim: dict[str, Any], exactness: str = "ordered", every: int | None = None, **more: Any
) -> dict[str, Any]:
    train = SETTINGS | {"exactness": exactness, "evaluate_every": every}
    cfg = config(train=train, optim=optim, data={"validation_split": "val"}, runtime={"checkpoint_every": 2})
    return {"config": cfg.model_dump(mode="json"), "out": str(out), "num_images": 13, "is_standardised": True, **more}


@pytest.fixture(scope="module")
def folder(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with 1 to 4 processes: windows of 8 and 5 images, so that the last group is short and uneven."""
    folder = tmp_path_factory.mktemp("worlds")
    for world in WORLDS:
        jobs = [job(folder / f"sgd-{world}", optim={"kind": "sgd", "lr": 0.3})]
        jobs.append(job(folder / f"exact-{world}", optim=EXACT, exactness="exact", bad_positions=BAD))
        jobs.append(job(folder / f"muon-{world}", optim={**EXACT, "kind": "muon"}, exactness="exact"))
        if world != 3:
            stop = {} if world == 4 else {"signal_at": 2 * world - 1, "expected": "StoppedError"}
            jobs.append(job(folder / "moved", optim=EXACT, exactness="exact", bad_positions=BAD, **stop))
        if world == 2:
            dry = {"dry_at": 1, "expected": "StoppedError"}
            jobs.append(job(folder / "dry-2", optim=EXACT, exactness="exact", **dry))
            jobs.append(job(folder / "corrupt-2", optim=EXACT, corrupt_at=3, expected="DivergedError"))
            fails = {"optim": {"lr": 0.01}, "every": 2, "fails_at": 1}
            jobs.append(job(folder / "blind-2", **fails))
            jobs.append(job(folder / "strict-2", **fails, strict=True, expected="EvaluationError"))
        if world in (2, 3):
            jobs.append(job(folder / f"adamw-{world}", optim={"lr": 0.01}))
            jobs.append(job(folder / f"cut-{world}", optim={"lr": 0.01}, kill_at=5))
            workers = processes.launch(forge, folder, jobs, world=world)
            codes, said = processes.wait(workers, timeout=900)
            assert -9 in codes, said
        else:
            processes.run(forge, folder, jobs, world=world, threads=3 - min(world, 2))
    return folder


def seen(folder: Path, world: int) -> list[dict[str, float]]:
    """Every sample that was used with weight 1: position, sum of its pixels, sum of its noise."""
    parts = [processes.facts(folder / f"sgd-{world}", rank)["seen"] for rank in range(world)]
    return sorted((sample for part in parts for sample in part), key=lambda sample: sample["position"])


@pytest.mark.parametrize("world", WORLDS[1:])
def test_any_number_of_processes_sees_the_same_samples_and_noise(folder: Path, world: int) -> None:
    assert len(seen(folder, 1)) == 3 * 13
    assert seen(folder, world) == seen(folder, 1)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_any_number_of_processes_has_the_same_losses(folder: Path, world: int) -> None:
    wanted = processes.losses(folder / "sgd-1")
    assert len(wanted) == 6
    assert processes.losses(folder / f"sgd-{world}") == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_all_ranks_end_with_the_same_bits(folder: Path, world: int) -> None:
    found = [processes.facts(folder / f"sgd-{world}", rank) for rank in range(world)]
    assert len({facts["digest"] for facts in found}) == 1
    assert all(facts["unused_is_none"] for facts in found), "what no rank reaches gets no gradient"


@pytest.mark.parametrize("name", ["exact", "muon"])
def test_class_exact_has_the_same_bits_for_any_number_of_processes(name: str, folder: Path) -> None:
    """Weights, average and moments; groups of 8 and 5 micro-batches, which 2 ranks share as 3 and 2."""
    found = [processes.facts(folder / f"{name}-{world}", rank) for world in WORLDS for rank in range(world)]
    assert len({facts["digest"] for facts in found}) == 1
    assert all(facts["unused_is_none"] for facts in found), "what no rank reaches gets no gradient"
    lines = [processes.losses(folder / f"{name}-{world}") for world in WORLDS]
    assert all(line == lines[0] for line in lines)
    scores = [processes.scores(folder / f"{name}-{world}") for world in WORLDS]
    assert all(score == scores[0] for score in scores)


def test_class_exact_has_the_same_bits_when_the_number_changes_on_the_way(folder: Path) -> None:
    """Stopped after 2 steps in one process and after 4 in two, finished in four."""
    assert processes.events(folder / "moved").count("run.continued") == 2
    assert processes.facts(folder / "moved")["digest"] == processes.facts(folder / "exact-1")["digest"]
    assert processes.facts(folder / "moved")["step"] == 6


def test_a_step_that_is_bad_on_one_rank_is_left_out_on_all(folder: Path) -> None:
    lines = (folder / "exact-2" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "update.skipped" in line] == [2]


def test_a_rank_without_its_part_of_a_short_group_lets_none_wait(folder: Path) -> None:
    """It stands in with the group before, which had other micro-batches, cut to the number of the others'."""
    for rank in (0, 1):
        facts = processes.facts(folder / "dry-2", rank)
        assert facts["code"] == 75
        assert "the file system does not answer; trained to step 1" in facts["said"]


def test_a_bit_that_changed_on_one_rank_ends_the_run_before_anything_is_saved(folder: Path) -> None:
    for rank in (0, 1):
        facts = processes.facts(folder / "corrupt-2", rank)
        assert facts["code"] == 8
        assert "all ranks differ from each other after step 4" in facts["said"]
    assert [path.name for path in (folder / "corrupt-2" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_validation_that_fails_on_one_rank_is_an_event_and_lets_none_wait(folder: Path) -> None:
    lines = map(json.loads, (folder / "blind-2" / "events.jsonl").read_text().splitlines())
    found = [(line["step"], line["reason"]) for line in lines if line["event"] == "validation.failed"]
    assert found == [(4, "ValueError on rank 1, see its traceback above")]
    assert len(processes.scores(folder / "blind-2")) == 2
    digests = {processes.facts(folder / name, rank)["digest"] for name in ("blind-2", "adamw-2") for rank in (0, 1)}
    assert len(digests) == 1, "the weights are those of a run that never looked"


def test_a_validation_that_fails_on_one_rank_of_a_strict_run_ends_all(folder: Path) -> None:
    said = {processes.facts(folder / "strict-2", rank)["said"] for rank in (0, 1)}
    assert said == {"ValueError on rank 1, see its traceback above"}


def test_class_ordered_has_not_so_that_the_test_above_can_fail(folder: Path) -> None:
    assert len({processes.facts(folder / f"sgd-{world}")["digest"] for world in WORLDS}) > 1


@pytest.mark.parametrize("world", [2, 3])
def test_processes_killed_and_continued_have_the_same_bits(world: int, forge: Forge, folder: Path) -> None:
    """Three numbers are added in another order after another first step; two cannot be."""
    cut, whole = folder / f"cut-{world}", folder / f"adamw-{world}"
    assert not (cut / "snapshots").exists()
    processes.run(forge, folder, [job(cut, optim={"lr": 0.01})], world=world)
    assert "run.continued" in processes.events(cut)
    assert processes.facts(cut)["digest"] == processes.facts(whole)["digest"]
    assert processes.losses(cut) == processes.losses(whole)
