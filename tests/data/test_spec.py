"""The facts of the datasets, and the rule of spacing."""

import numpy as np
import pytest
from pydantic import ValidationError

from ddpm_lmk.data.phantom import LANDMARK_NAMES
from ddpm_lmk.data.spec import SPECS, DatasetSpec, FileSpacing, FixedSpacing, PairSpacing, unlabelled

POINTS = np.array([[0.0, 0.0], [30.0, 40.0], [1.0, 1.0]])


def made(spacing, unit="mm"):
    return DatasetSpec(name="x", landmark_names=("a", "b", "c"), unit=unit, spacing=spacing)


@pytest.mark.parametrize(("name", "count"), [("chest", 6), ("cephalometric", 19), ("hand", 37)])
def test_public_sets_have_the_landmarks_of_the_paper(name, count):
    assert SPECS[name].num_landmarks == count


@pytest.mark.parametrize("kind", ["chest", "skull", "hand"])
def test_phantoms_are_labelled_in_the_order_of_their_spec(kind):
    assert LANDMARK_NAMES[kind] == SPECS[f"phantom-{kind}"].landmark_names


def test_pair_spacing_is_measured_in_native_pixels():
    assert made(PairSpacing(i=0, j=1, mm=50)).resolve_spacing(POINTS, None) == pytest.approx(1.0)


def test_pair_spacing_of_one_point_twice_is_unknown():
    assert made(PairSpacing(i=0, j=1, mm=50)).resolve_spacing(np.zeros((3, 2)), None) is None


def test_fixed_spacing_gives_way_to_what_a_sample_states():
    spec = made(FixedSpacing(mm_per_px=0.1))
    assert spec.resolve_spacing(POINTS, None) == 0.1
    assert spec.resolve_spacing(POINTS, 0.2) == 0.2


def test_file_spacing_is_never_guessed():
    assert made(FileSpacing()).resolve_spacing(POINTS, None) is None


def test_millimetres_without_a_spacing_rule_are_refused():
    with pytest.raises(ValidationError, match="spacing rule"):
        DatasetSpec(name="x", landmark_names=("a",), unit="mm")


@pytest.mark.parametrize("pair", [(0, 0), (0, 3)])
def test_a_pair_that_is_not_two_landmarks_is_refused(pair):
    with pytest.raises(ValidationError, match="two of the 3 landmarks"):
        made(PairSpacing(i=pair[0], j=pair[1], mm=50))


def test_specs_survive_json():
    for spec in [*SPECS.values(), unlabelled("pool")]:
        assert DatasetSpec.model_validate_json(spec.model_dump_json()) == spec
