"""A real run on phantoms in class exact, started by the launcher with two processes, against the same run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.launcher import launch
from tests.engine import processes

pytestmark = pytest.mark.distributed


def test_two_launched_processes_have_the_bits_of_one(tmp_path: Path, packed_phantoms: Path) -> None:
    """Few-shot training with warps, a short last group and a part of the network that gets no gradient."""
    sections: dict[str, Any] = {
        "data": {"path": str(packed_phantoms), "image_size": 32, "shots": 7, "augment": {"probability": 1.0}},
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "task": {"kind": "landmarks"},
        "train": {
            "length": 4,
            "group_size": 4,
            "micro_batch": 1,
            "windows": "epoch",
            "log_every": 1,
            "exactness": "exact",
        },
    }
    job = {"config": RunConfig.model_validate(sections | {"optim": {"lr": 1e-3}}).model_dump(mode="json")}
    assert launch({**job, "out": str(tmp_path / "one")}, processes=1, device="cpu") == 0
    assert launch({**job, "out": str(tmp_path / "two")}, processes=2, device="cpu") == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("snapshots/*/*.safetensors"))
    assert [path.name for path in files] == ["ema.safetensors", "model.safetensors"]
    for file in [*files, Path("predictions.csv")]:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert processes.losses(tmp_path / "two") == processes.losses(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["protocols"] == two["protocols"]
    assert one["num_images"] == two["num_images"] == 6
