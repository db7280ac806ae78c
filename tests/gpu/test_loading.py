"""DALI on the device against the torch loader: the same samples and coordinates; nvJPEG within a few grey levels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.data import open_loader
from ddpm_lmk.data.batch import Batch
from tests.data.dot_packs import pack_dots, run_config
from tests.extras import needs_extra

pytestmark = needs_extra("dali")

GREY_LEVEL = 1 / 255
MOVES = {"probability": 0.7, "shift": 0.1, "rotate_deg": 20, "scale": 0.2, "scale_axes": "independent"}


def batches(pack: Path, loader: str, device: torch.device) -> list[Batch]:
    data: dict[str, Any] = {"augment": MOVES, "intensity": "full_range"}
    runtime: dict[str, Any] = {"loader": loader, "cache_pixels": "stream"}
    opened = open_loader(run_config(pack, data=data, runtime=runtime), stage="train", device=device)
    made = [batch for group in itertools.islice(opened.global_batches(0), 3) for batch in group.micro_batches]
    opened.close()
    return made


@pytest.mark.parametrize(("encoding", "bits", "levels"), [("raw", 8, 0.05), ("png", 16, 0.05), ("jpeg", 8, 4.0)])
def test_dali_gives_the_images_of_the_torch_loader(
    tmp_path: Path, device: torch.device, encoding: Any, bits: int, levels: float
) -> None:
    pack = pack_dots(tmp_path / "dots", {"train": 10, "test": 2}, bits=bits, encoding=encoding, noise=0.3)
    for wanted, found in zip(batches(pack, "torch", device), batches(pack, "dali", device), strict=True):
        assert found.ids == wanted.ids
        assert found.images.device.type == device.type
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.points, wanted.points)
        assert (found.images - wanted.images).abs().max() < levels * GREY_LEVEL
