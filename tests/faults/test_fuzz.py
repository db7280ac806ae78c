"""A sample of the fuzz campaign (`fuzz.py`); the whole of it is `make fuzz`."""

import sys

import pytest

from tests.faults.fuzz import SHARES, campaign


@pytest.fixture(autouse=True)
def _bytecode():
    before = sys.dont_write_bytecode
    yield
    sys.dont_write_bytecode = before


def test_damaged_input_of_every_kind_is_read_as_it_was_or_told(tmp_path):
    outcomes = campaign(tmp_path, 200, seed=1)
    assert set(outcomes) == set(SHARES)
    assert sum(found.total() for found in outcomes.values()) >= 200


@pytest.mark.slow
def test_more_damaged_input(tmp_path):
    outcomes = campaign(tmp_path, 4000, seed=2)
    assert not {"CRASH", "TIMEOUT", "MEMORY"} & set().union(*outcomes.values())
