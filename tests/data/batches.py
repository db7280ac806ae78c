"""Batches without labels, made on the spot."""

from __future__ import annotations

import math

import torch

from ddpm_lmk.data.batch import Batch


def unlabelled_batch(count: int, weights: list[float] | None = None, *, chosen: slice = slice(None)) -> Batch:
    """Some of `count` noise images of 64 pixels, the same at every call."""
    images = torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(1))[chosen]
    positions = torch.arange(count)[chosen]
    return Batch(
        images=images,
        points=None,
        to_native=torch.eye(2, 3).expand(len(images), 2, 3),
        native_size=torch.full((len(images), 2), 64.0),
        mm_per_px=torch.full((len(images),), math.nan),
        positions=positions,
        weight=torch.tensor(weights or [1.0] * count)[chosen],
        ids=tuple(map(str, positions.tolist())),
    )
