"""A sample of the unusual input of `kinds.py`; all of it is `make fuzz`."""

import pytest

pytest.importorskip("pydicom")

from tests.faults.kinds import FAMILIES, SAMPLE, campaign


def test_unusual_input_of_every_kind_has_the_right_value_or_is_refused_in_words(tmp_path):
    outcomes = campaign(tmp_path, seed=1, sample=SAMPLE)
    assert set(outcomes) == set(FAMILIES)


@pytest.mark.slow
def test_all_unusual_input(tmp_path):
    campaign(tmp_path)
