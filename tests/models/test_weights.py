"""Strict loading: released checkpoints into our network, whole networks and trunks into one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models import build_model
from ddpm_lmk.models.weights import from_upstream, load_all, load_trunk, upstream_config
from tests.reference.released_unet import ReleasedUNet, random_state, released_shapes

RELEASED = json.loads((Path(__file__).parents[1] / "reference" / "released_shapes.json").read_text())["shapes"]
WIDTH8 = released_shapes(8, multipliers=(1, 2))
SMALL = UNetConfig(width=8, multipliers=(1, 2))


def test_released_weights_give_the_released_output_whatever_the_dead_channel_holds():
    state = random_state(WIDTH8)
    model = build_model(upstream_config(state), out_channels=1).double()
    load_all(model, from_upstream({"epoch": 750, "n_iter": 6000, "model_state_dict": state}))
    x, t = torch.rand(2, 1, 16, 16, dtype=torch.float64), torch.tensor([1, 499])
    assert state["init_conv.weight"][:, 0].abs().min() > 0
    assert (model(x, t) - ReleasedUNet(state, levels=2)(x, t)).abs().max() < 1e-10


def test_the_plain_rewrite_lists_exactly_the_released_tensors():
    assert {name: list(shape) for name, shape in released_shapes(256).items()} == RELEASED


def test_the_full_size_released_checkpoint_fits_the_paper_preset():
    with torch.device("meta"):
        state = from_upstream({name: torch.empty(shape) for name, shape in RELEASED.items()})
        model = build_model(UNetConfig(width=256), out_channels=1)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


def renamed(state: dict) -> dict:
    return {f"module.{name}": value for name, value in state.items()}


def without_bias(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "mid_block1.block1.proj.bias"}


def with_extra(state: dict) -> dict:
    return state | {"model.extra": torch.zeros(1)}


def with_wrong_shape(state: dict) -> dict:
    return state | {"ups.0.0.res_conv.weight": torch.zeros(16, 23, 1, 1)}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (renamed, "are no released network's"),
        (without_bias, "mid_block1.block1.proj.bias is missing"),
        (with_extra, "model.extra is unknown"),
        (with_wrong_shape, r"ups.0.0.res_conv.weight is \[16, 23, 1, 1\], not \[16, 24, 1, 1\]"),
        (lambda state: {}, "not tensors by name"),
        (lambda state: state | {"epoch": 3}, "not tensors by name"),
        (lambda state: {"model_state_dict": {"init_conv.weight": torch.zeros(3)}}, "are no released network's"),
    ],
)
def test_anything_but_a_released_state_dict_is_refused_by_name(damage, told):
    with pytest.raises(CheckpointError, match=told):
        from_upstream(damage(random_state(WIDTH8)))


def test_another_architecture_is_refused_with_its_first_five_differences_and_changes_nothing():
    model = build_model(SMALL, out_channels=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_all(model, build_model(SMALL.model_copy(update={"width": 12}), out_channels=1).state_dict())
    message = str(caught.value)
    assert message.count(", not [") == 5
    assert "; ..." in message
    assert "init_conv.weight is [12, 1, 1, 1], not [8, 1, 1, 1]" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trunk_is_loaded_under_another_output_layer_which_keeps_its_values():
    source, model = build_model(SMALL, out_channels=1), build_model(SMALL, out_channels=6)
    head = model.final_conv.weight.clone()
    load_trunk(model, source.state_dict())
    assert torch.equal(model.final_conv.weight, head)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items() if "final_conv" not in name)


def test_a_trunk_with_a_missing_tensor_is_refused():
    state = build_model(SMALL, out_channels=1).state_dict()
    del state["downs.0.0.block1.proj.weight"]
    with pytest.raises(CheckpointError, match=r"1 differences: downs\.0\.0\.block1\.proj\.weight is missing\."):
        load_trunk(build_model(SMALL, out_channels=6), state)


def test_a_whole_network_with_other_outputs_is_refused():
    with pytest.raises(CheckpointError, match=r"final_conv\.weight"):
        load_all(build_model(SMALL, out_channels=6), build_model(SMALL, out_channels=1).state_dict())
