"""What the tests of the engine share."""

from __future__ import annotations

import pytest

from ddpm_lmk.engine.parallel import Parallel


@pytest.fixture(scope="module")
def parallel() -> Parallel:
    """The only process of a run."""
    return Parallel("cpu")
