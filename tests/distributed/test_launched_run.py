"""A real run on phantoms, started by the launcher with two processes, against the same run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.launcher import launch
from tests.engine import processes

pytestmark = pytest.mark.distributed


def test_two_launched_processes_have_the_losses_and_scores_of_one(tmp_path: Path, packed_phantoms: Path) -> None:
    """Few-shot training with warps, a short last group and a part of the network that gets no gradient."""
    sections: dict[str, Any] = {
        "data": {"path": str(packed_phantoms), "image_size": 32, "shots": 7, "augment": {"probability": 1.0}},
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "task": {"kind": "landmarks"},
        "optim": {"kind": "sgd", "lr": 0.05},
        "train": {"length": 4, "group_size": 4, "windows": "epoch", "log_every": 1},
    }
    job = {"config": RunConfig.model_validate(sections).model_dump(mode="json")}
    assert launch({**job, "out": str(tmp_path / "one")}, processes=1, device="cpu") == 0
    assert launch({**job, "out": str(tmp_path / "two")}, processes=2, device="cpu") == 0
    losses = processes.losses(tmp_path / "one")
    assert len(losses) == 4
    assert processes.losses(tmp_path / "two") == pytest.approx(losses, rel=1e-6)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["num_images"] == two["num_images"] == 6
    mre = one["protocols"]["original"]["mre"]
    assert two["protocols"]["original"]["mre"] == pytest.approx(mre, rel=1e-3)
