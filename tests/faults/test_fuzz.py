"""Samples of damaged input (`fuzz.py`) and of whole but unusual input (`kinds.py`); all of both is `make fuzz`."""

import sys

import pytest

pytest.importorskip("pydicom")

from tests.faults import fuzz, kinds


@pytest.fixture(autouse=True)
def _bytecode():
    before = sys.dont_write_bytecode
    yield
    sys.dont_write_bytecode = before


def test_damaged_input_of_every_kind_is_read_as_it_was_or_told(tmp_path):
    outcomes = fuzz.campaign(tmp_path, 200, seed=1)
    assert set(outcomes) == set(fuzz.SHARES)
    assert sum(found.total() for found in outcomes.values()) >= 200


@pytest.mark.slow
def test_more_damaged_input(tmp_path):
    outcomes = fuzz.campaign(tmp_path, 4000, seed=2)
    assert not {"CRASH", "TIMEOUT", "MEMORY"} & set().union(*outcomes.values())


def test_unusual_input_of_every_kind_has_the_right_value_or_is_refused_in_words(tmp_path):
    assert set(kinds.campaign(tmp_path, seed=1, sample=kinds.SAMPLE)) == set(kinds.FAMILIES)


@pytest.mark.slow
def test_all_unusual_input(tmp_path):
    kinds.campaign(tmp_path)
