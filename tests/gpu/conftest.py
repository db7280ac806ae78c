"""Tests that want a CUDA device. Without one they are skipped; `LMK_GPU_TESTS_ON=cpu` runs them on the processor.

That is no proof of anything about a GPU, but of the tests: they are called, and compare what they say they compare.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if HERE in item.path.resolve().parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device, or what LMK_GPU_TESTS_ON says; skips where that is not there."""
    wanted = os.environ.get("LMK_GPU_TESTS_ON", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(wanted)
