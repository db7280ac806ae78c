"""What the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import harness


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """A test that fails in the middle leaves no run behind."""
    yield
    while harness.STARTED:
        run = harness.STARTED.pop()
        if run.process.poll() is None:
            run.kill_everything()
