"""ZeRO stages 1 and 2 on the CPU backend of DeepSpeed, against stage 0. The first run here compiles for minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.launcher import Placement, launch
from ddpm_lmk.rundir.checkpoint import load_weights
from tests.engine import processes
from tests.engine.toy import config
from tests.extras import needs_extra
from tests.faults.forge import Forge

pytestmark = [needs_extra("deepspeed"), pytest.mark.distributed, pytest.mark.slow]

TRAIN: dict[str, Any] = {"duration": 6, "global_batch_size": 8, "epoch_boundary": "epoch"}
ADAMW: dict[str, Any] = {"lr": 0.01, "clip": {"limit": 0.2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw-clipped": {"optim": ADAMW},
    "adamw-accumulated": {"optim": ADAMW, "micro_batch": 1},
    "sgd-clipped-by-value": {"optim": {"kind": "sgd", "lr": 0.3, "clip": {"kind": "value", "limit": 0.05}}},
    "sgd-accumulated": {"optim": {"kind": "sgd", "lr": 0.3}, "micro_batch": 2},
    "bad-step": {"optim": ADAMW, "micro_batch": 1, "bad_positions": [10]},
    "went-back": {"optim": ADAMW, "micro_batch": 1, "duration": 12, "bad_positions": list(range(26, 65))},
    "bf16": {"optim": ADAMW, "precision": "bf16"},
    "fp16": {"optim": ADAMW, "precision": "fp16"},
}
STOPS = {"signal_at": 1, "expected": "StoppedError"}, {"signal_at": 3, "expected": "StoppedError"}


def job(out: Path, *, optim: dict[str, Any], **more: Any) -> dict[str, Any]:
    train = TRAIN | {key: more.pop(key) for key in ("micro_batch", "precision", "duration") if key in more}
    cfg = config(train=train, optim=optim, data={"validation_split": "val"}, runtime={"checkpoint_every": 2})
    return {"config": cfg.model_dump(mode="json"), "out": str(out), "num_images": 13, **more}


@pytest.fixture(scope="module")
def folder(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant with stages 0, 1 and 2 on two processes, and a run that moves from one to the other."""
    folder = tmp_path_factory.mktemp("zero")
    long = {"optim": ADAMW, "micro_batch": 1, "duration": 8}
    processes.run(forge, folder, [job(folder / "moved", **long, **STOPS[0]), job(folder / "stayed", **long)], world=1)
    for stage in (0, 1, 2):
        jobs = [job(folder / f"{name}-{stage}", zero=stage, **fields) for name, fields in VARIANTS.items()]
        if stage == 1:
            jobs.append(job(folder / "moved", **long, **STOPS[1]))
        processes.run(forge, folder, jobs, world=2)
    processes.run(forge, folder, [job(folder / "moved", **long, signal_at=5, expected="StoppedError", zero=2)], world=4)
    processes.run(forge, folder, [job(folder / "moved", **long)], world=1)
    return folder


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_zero_has_the_losses_of_stage_zero(folder: Path, name: str, stage: int) -> None:
    wanted = [loss for loss in processes.losses(folder / f"{name}-0") if loss is not None]
    found = [loss for loss in processes.losses(folder / f"{name}-{stage}") if loss is not None]
    assert len(wanted) >= 5
    assert found == pytest.approx(wanted, rel=1e-2 if "16" in name else 2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_goes_back_to_a_checkpoint(folder: Path, stage: int) -> None:
    """Six steps in a row are bad, 5 to 10; the two after them start from step 4."""
    assert processes.events(folder / f"went-back-{stage}").count("run.went_back") == 1
    assert processes.facts(folder / f"went-back-{stage}")["step"] == 12


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_leaves_out_the_same_step(folder: Path, stage: int) -> None:
    names = [processes.events(folder / f"bad-step-{s}").count("update.skipped") for s in (0, stage)]
    assert names == [1, 1]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_has_the_weights_average_and_moments_of_stage_zero(folder: Path, stage: int) -> None:
    for use in ("model", "ema"):
        found, _ = load_weights(folder / f"adamw-clipped-{stage}", use)
        wanted, _ = load_weights(folder / "adamw-clipped-0", use)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
            assert "unreached" not in name or torch.equal(found[name], value), "no weight decay where nothing is learnt"


def test_a_run_moves_from_one_process_to_zero_and_back_with_the_losses_of_one_that_stayed(folder: Path) -> None:
    """2 steps in one process, 2 with stage 1 on two, 2 with stage 2 on four, 2 in one process."""
    assert processes.events(folder / "moved").count("run.continued") == 3
    assert processes.losses(folder / "moved") == pytest.approx(processes.losses(folder / "stayed"), rel=5e-6)
    found, wanted = load_weights(folder / "moved", "ema")[0], load_weights(folder / "stayed", "ema")[0]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_launched_run_with_stage_one_is_the_run_of_stage_zero(tmp_path: Path, packed_phantoms: Path) -> None:
    """Few-shot training of the real network, through the launcher."""
    sections: dict[str, Any] = {
        "data": {"path": str(packed_phantoms), "image_size": 32, "shots": 7},
        "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
        "task": {"kind": "landmarks"},
        "train": {"duration": 4, "global_batch_size": 4, "epoch_boundary": "epoch"},
        "runtime": {"log_every": 1},
    }
    job = {"config": RunConfig.model_validate(sections).model_dump(mode="json")}
    for stage in (0, 1):
        assert launch({**job, "out": str(tmp_path / f"{stage}")}, Placement("cpu", 2, zero=stage)) == 0
    assert processes.losses(tmp_path / "1") == pytest.approx(processes.losses(tmp_path / "0"), rel=1e-5)
    assert json.loads((tmp_path / "1" / "run.json").read_text())["zero"] == 1
    assert (tmp_path / "1" / "results.json").is_file()
