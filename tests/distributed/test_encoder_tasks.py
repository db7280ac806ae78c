"""Two processes have the loss, the gradient and the followers of one process with the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import processes
from tests.faults.forge import Forge
from tests.tasks.test_encoder_tasks import KINDS, NETWORK

pytestmark = pytest.mark.distributed

COUNT = 4


@pytest.fixture(scope="module")
def folder(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for world in (1, 2):
        jobs = [job(folder / f"{kind}-{world}", kind) for kind in KINDS]
        processes.run(forge, folder, jobs, world=world, module="tests.distributed.encoder_worker")
    return folder


def job(out: Path, kind: str) -> dict[str, Any]:
    more = {"frozen": 0} if kind == "dino" else {}
    data = {"path": "x", "image_size": 64}
    return {
        "config": {"data": data, "model": NETWORK, "task": {"kind": kind, **KINDS[kind], **more}},
        "count": COUNT,
        "out": str(out),
    }


def found(folder: Path, kind: str, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{kind}-{world}-rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_come_from_all_ranks(folder: Path, kind: str) -> None:
    (alone,), together = found(folder, kind, 1), found(folder, kind, 2)
    losses = [loss for rank in together for loss in rank["losses"]]
    assert losses == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_back_from_all_ranks(folder: Path, kind: str) -> None:
    (alone,), together = found(folder, kind, 1), found(folder, kind, 2)
    assert alone["gradient"].keys() == together[0]["gradient"].keys()
    largest = max(alone["gradient"].values())
    for rank in together:
        assert rank["gradient"] == pytest.approx(alone["gradient"], rel=1e-3, abs=1e-4 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_followers_and_the_centre_are_those_of_one_process(folder: Path, kind: str) -> None:
    (alone,), together = found(folder, kind, 1), found(folder, kind, 2)
    for rank in together:
        assert rank["buffers"] == pytest.approx(alone["buffers"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_end_with_the_same_bits(folder: Path, kind: str) -> None:
    first, second = found(folder, kind, 2)
    assert first["bits"] == second["bits"]
