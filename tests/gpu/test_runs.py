"""Whole runs on the device: the same bits again, also through a checkpoint; fp16 and its scale; a reduction of one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine.bucket_reduce import BucketReduce
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.run import execute
from tests.gpu.test_network import inputs, loss_and_gradient, network


@pytest.fixture(scope="module")
def parallel(device: torch.device) -> Parallel:
    return Parallel("cuda" if device.type == "cuda" else "cpu")


def config(packs: Path, **train: Any) -> RunConfig:
    settings = {"duration": 4, "global_batch_size": 4, "micro_batch": 2} | train
    return RunConfig.model_validate(
        {
            "data": {"path": str(packs), "image_size": 32},
            "runtime": {"workers": 0, "log_every": 1, "checkpoint_every": 2},
            "model": {"width": 8, "multipliers": [1, 2], "heads": 2, "head_dim": 8},
            "task": {"kind": "denoise", "num_timesteps": 20},
            "train": settings,
        }
    )


def digests(run: Path) -> dict[str, str]:
    files = sorted(run.glob("snapshots/*/*.safetensors"))
    assert files
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_has_the_same_bits_again_and_through_a_checkpoint(
    tmp_path: Path, packed_phantoms: Path, parallel: Parallel
) -> None:
    cfg = config(packed_phantoms, exactness="exact")
    for name in ("once", "again"):
        execute(cfg, tmp_path / name, parallel=parallel)
    assert digests(tmp_path / "again") == digests(tmp_path / "once")
    short = config(packed_phantoms, exactness="exact", duration=2)
    execute(short, tmp_path / "short", parallel=parallel)
    execute(cfg, tmp_path / "continued", parallel=parallel, fork=tmp_path / "short")
    assert digests(tmp_path / "continued") == digests(tmp_path / "once")


def test_fp16_trains_and_keeps_its_scale(tmp_path: Path, packed_phantoms: Path, parallel: Parallel) -> None:
    execute(config(packed_phantoms, precision="fp16"), tmp_path / "run", parallel=parallel)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 10 for line in lines)
    [state] = (tmp_path / "run" / "checkpoints").glob("step-*4/state.json")
    assert json.loads(state.read_text())["scale"]["value"] >= 1


def test_buckets_of_one_process_have_the_gradient_of_none(tmp_path: Path, device: torch.device) -> None:
    model, (x, t) = network(device), inputs(device)
    loss, alone = loss_and_gradient(model, x, t, None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        buckets = BucketReduce(model)
        buckets.expect()
        shared_loss, _ = loss_and_gradient(model, x, t, None)
        buckets.finish()
        shared = torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])
        table = torch.ones(8, device=device)
        distributed.all_reduce(table)
        assert table.sum() == 8
        buckets.close()
    finally:
        distributed.destroy_process_group()
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert (shared - alone).norm() < 1e-3 * alone.norm()
