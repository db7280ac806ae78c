"""A rank that computes the losses of the encoder tasks on its part of one batch.

Networks have their BatchNorm in evaluation, because batch statistics are those of a rank by design; everything else is
as in training.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import SPECS
from ddpm_lmk.engine.bucket_reduce import BucketReduce
from ddpm_lmk.engine.parallel import AllRanks, Parallel, RunningStatistics
from ddpm_lmk.models import build_model
from ddpm_lmk.tasks import EncoderTask, build_task
from ddpm_lmk.tasks.task import OneRank
from tests.data.batches import unlabelled_batch


def work(job: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """One step without an optimizer, then one with: losses, the summed gradient, and what is left in the model."""
    cfg = RunConfig.model_validate(job["config"])
    task = build_task(cfg, SPECS["phantom-chest"])
    assert isinstance(task, EncoderTask)
    task.prepare(AllRanks(parallel.rank, parallel.world) if parallel.world > 1 else OneRank(), total_steps=10)
    torch.manual_seed(0)
    model = task.wrap(build_model(cfg.model, out_channels=1)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    buckets = BucketReduce(model) if parallel.world > 1 else None
    statistics = RunningStatistics(model, parallel)
    statistics.begin_step()
    share = job["count"] // parallel.world
    batch = unlabelled_batch(job["count"], chosen=slice(parallel.rank * share, (parallel.rank + 1) * share))
    losses = task.loss(model, batch)
    if buckets is None:
        (losses.sum() / job["count"]).backward()
    else:
        buckets.expect()
        (losses.sum() / job["count"]).backward()
        buckets.finish()
    statistics.end_step(is_kept=True)
    gradient = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    task.after_step(model, 1)
    buffers = {name: value.double().sum().item() for name, value in model.named_buffers()}
    bits = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
    return {"losses": losses.tolist(), "gradient": gradient, "buffers": buffers, "bits": bits}


def main(file: Path) -> int:
    """Do the jobs of a file; the exit code."""
    parallel = Parallel("cpu")
    for job in json.loads(file.read_text()):
        found = work(job, parallel)
        Path(f"{job['out']}-rank{parallel.rank}.json").write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0
