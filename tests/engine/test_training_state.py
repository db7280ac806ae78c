"""The state of a run, out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.engine.optim import moments
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models.weights import load_all
from ddpm_lmk.rundir.checkpoint import Checkpoint
from tests.engine.toy import config, fresh_state


def test_a_checkpoint_that_lacks_a_part_is_of_another_version_and_changes_nothing() -> None:
    state = fresh_state(config())
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    other = fresh_state(config(seed=1))
    facts = other.facts()
    del facts["health"], facts["images"]
    files = {**other.weights(), "optim": moments(other.optimizer, other.model)}
    with pytest.raises(CheckpointError, match="says nothing of health, images: it is of another version"):
        state.load(Checkpoint(Path("step-1"), files, facts), load_all=load_all)
    assert all((value == before[name]).all() for name, value in state.model.state_dict().items())
