"""What a loader gives when the shards lie elsewhere, to compare with what it gives from a local folder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data import open_loader
from ddpm_lmk.data.batch import GlobalBatch
from tests.data.dot_packs import run_config


def config(path: Any, cache: Path, *, task: str = "denoise", **runtime: Any) -> RunConfig:
    """A run that streams, with a cache of its own."""
    runtime = {"cache_pixels": "stream", "cache_dir": str(cache), **runtime}
    return run_config(path, task=task, data={"shuffle_window": 2}, runtime=runtime)


def stream(cfg: RunConfig, count: int = 6) -> list[GlobalBatch]:
    """The first `count` global batches of training."""
    loader = open_loader(cfg, stage="train")
    try:
        return list(itertools.islice(loader.global_batches(0), count))
    finally:
        loader.close()


def assert_same(found: list[GlobalBatch], wanted: list[GlobalBatch]) -> None:
    """The same images in the same order, bit by bit, and nothing left out."""
    pairs = [(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x.micro_batches, y.micro_batches)]
    for a, b in pairs:
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
    assert all(group.bad == () for group in found)
