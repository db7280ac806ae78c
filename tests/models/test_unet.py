"""The U-Net against a plain rewrite of the released network, and in the forms the paper does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lmk.config import UNetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models import build_model
from ddpm_lmk.models.blocks import Block, DoubleSizeConv2d, GroupNorm, HalfSizeConv2d
from ddpm_lmk.models.weight_standardization import standardized
from ddpm_lmk.models.weights import from_upstream
from tests.reference.released_unet import ReleasedUNet, random_state, released_shapes

SMALL = UNetConfig(width=8, multipliers=(1, 2), groups=4, heads=2, head_dim=4)
RELEASED = json.loads((Path(__file__).parents[1] / "reference" / "released_shapes.json").read_text())["shapes"]
TIMES = torch.tensor([3, 420])


def pair(width: int, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[ReleasedUNet, nn.Module]:
    state = random_state(released_shapes(width, out_channels=3), dtype=dtype)
    model = build_model(UNetConfig(width=width), out_channels=3).to(dtype)
    model.load_state_dict(from_upstream(state))
    for value in state.values():
        value.requires_grad_()
    return ReleasedUNet(state), model.to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("times", [TIMES, None], ids=["timed", "untimed"])
def test_outputs_and_gradients_are_those_of_the_released_network(times, memory_format):
    twin, model = pair(8, torch.float64, memory_format)
    x = torch.rand(2, 1, 16, 24, dtype=torch.float64).to(memory_format=memory_format)
    ours, theirs = model(x, times), twin(x, times)
    assert ours.shape == (2, 3, 16, 24)
    assert (ours - theirs).abs().max() < 1e-10
    towards = torch.randn_like(theirs)
    (ours * towards).sum().backward()
    (theirs * towards).sum().backward()
    for name, parameter in model.named_parameters():
        expected = twin.state[name].grad
        if expected is None:
            assert parameter.grad is None, name
            continue
        expected = expected[:, 1:] if name == "init_conv.weight" else expected
        assert (parameter.grad - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()), name


def test_single_precision_stays_within_a_ten_thousandth_of_the_released_network():
    twin, model = pair(16, torch.float32, torch.channels_last)
    x = torch.rand(2, 1, 32, 32)
    assert (model(x, TIMES) - twin(x, TIMES)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("outputs", "count"), [(1, 558_548_225), (6, 558_549_510), (19, 558_552_851), (37, 558_557_477)]
)
def test_paper_preset_has_the_released_parameters_less_the_dead_input_channel(outputs, count):
    with torch.device("meta"):
        model = build_model(UNetConfig(width=256), out_channels=outputs)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    expected = RELEASED | {
        "init_conv.weight": [256, 1, 1, 1],
        "final_conv.weight": [outputs, 256, 1, 1],
        "final_conv.bias": [outputs],
    }
    assert shapes == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == count - 256


def test_without_a_timestep_nothing_of_the_time_conditioning_is_used():
    model = build_model(SMALL, out_channels=1)
    model(torch.rand(1, 1, 16, 16)).sum().backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {name for name, _ in model.named_parameters() if "mlp." in name}


def test_patch_works_on_a_smaller_grid_and_shuffles_back_to_full_size():
    cfg = SMALL.model_copy(update={"pixel_unshuffle": 2})
    torch.manual_seed(0)
    full = build_model(cfg, out_channels=3)
    small = build_model(cfg, out_channels=12, full_size=False)
    small.load_state_dict(full.state_dict())
    x = torch.rand(2, 1, 16, 16)
    assert full(x, TIMES).shape == (2, 3, 16, 16)
    assert small(x, TIMES).shape == (2, 12, 8, 8)
    assert torch.equal(full(x, TIMES), F.pixel_shuffle(small(x, TIMES), 2))


def test_patched_stem_sees_every_pixel():
    model = build_model(SMALL.model_copy(update={"pixel_unshuffle": 4}), out_channels=1, full_size=False)
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    model(x).square().sum().backward()
    assert (x.grad != 0).all()


def test_linear_attention_is_where_it_is_asked_for():
    model = build_model(SMALL.model_copy(update={"linear_attention": (False, True)}), out_channels=1)
    assert {name.split(".fn")[0] for name in model.state_dict() if "to_qkv" in name} == {
        "downs.1.2",
        "ups.0.2",
        "mid_attn",
    }
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear_attention": (True,)}, "model.linear_attention has 1 entries for 2 levels"),
        ({"width": 10}, "model.width=10 must be even and divisible by model.groups=4"),
        ({"width": 9, "groups": 3}, "model.width=9 must be even"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        UNetConfig.model_validate(SMALL.model_dump() | changes)


def test_images_that_cannot_be_halved_are_refused_with_the_multiple_wanted():
    model = build_model(UNetConfig(width=8, pixel_unshuffle=2), out_channels=1)
    with pytest.raises(ConfigError, match=r"24 x 16 pixels.*multiple of 16"):
        model(torch.rand(1, 1, 16, 24))


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    x, grads, kept = torch.rand(2, 1, 16, 16), [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(SMALL.model_copy(update={"checkpointing": checkpointing}), out_channels=1)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda kept, to=sizes: to.append(kept.numel()) or kept, lambda kept: kept
        ):
            out = model(x, TIMES)
        kept.append(sum(sizes))
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(grads[1], grads[0])


def test_bf16_autocast_stays_near_fp32_and_reaches_every_parameter():
    torch.manual_seed(0)
    model = build_model(SMALL, out_channels=1).to(memory_format=torch.channels_last)
    x = torch.rand(2, 1, 16, 16)
    exact = model(x, TIMES)
    types: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, (Block, GroupNorm)):
            module.register_forward_hook(lambda module, args, out: types.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, TIMES)
    assert types == {torch.bfloat16}
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    rounded.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


class SoftmaxTypes(TorchDispatchMode):
    """Collects the types softmaxes are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.seen.append(out.dtype)
        return out


def test_softmaxes_of_linear_attention_are_fp32_under_autocast():
    model = build_model(SMALL, out_channels=1)
    with SoftmaxTypes() as softmaxes, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.rand(1, 1, 8, 8))
    assert softmaxes.seen == [torch.float32] * 8


def test_activations_stay_channels_last():
    model = build_model(SMALL.model_copy(update={"pixel_unshuffle": 2}), out_channels=1).to(
        memory_format=torch.channels_last
    )
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: outputs.setdefault(name, out))
    model(torch.rand(2, 1, 32, 32), TIMES)
    maps = {name: out for name, out in outputs.items() if isinstance(out, Tensor) and out.ndim == 4 and name}
    assert len(maps) > 30
    assert [name for name, out in maps.items() if not out.is_contiguous(memory_format=torch.channels_last)] == []


def test_a_forward_and_backward_pass_never_reads_a_value_back():
    """Under fake tensors any `.item()` or branch on data raises; on a GPU each would be a wait for the device."""
    with FakeTensorMode():
        model = build_model(UNetConfig(width=8, pixel_unshuffle=2, checkpointing=True), out_channels=2)
        model(torch.rand(2, 1, 32, 32), torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_standardised_weights_have_mean_zero_and_the_biased_variance_of_the_formula(memory_format):
    weight = (3 + 2 * torch.randn(4, 5, 3, 3, dtype=torch.float64)).to(memory_format=memory_format)
    unit = standardized(weight)
    variance = weight.var(dim=(1, 2, 3), correction=0)
    assert unit.is_contiguous(memory_format=memory_format)
    assert unit.mean(dim=(1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(unit.var(dim=(1, 2, 3), correction=0), variance / (variance + 1e-5))
    torch.testing.assert_close(unit[2] * (variance[2] + 1e-5).sqrt(), weight[2] - weight[2].mean())


def test_standardisation_is_in_fp32_for_half_precision_weights():
    weight = torch.randn(4, 5, 3, 3).bfloat16()
    assert standardized(weight).dtype == torch.float32


def test_doubling_convolution_is_nearest_enlargement_and_a_3x3_convolution():
    conv = DoubleSizeConv2d(3, 5).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)


def test_halving_convolution_is_pixel_unshuffle_and_a_1x1_convolution():
    conv = HalfSizeConv2d(3, 5).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(F.pixel_unshuffle(x, 2), conv.weight, conv.bias))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_gradients_are_the_eager_ones(autocast):
    """`F.interpolate(mode="nearest")` would fail here: its compiled gradient under CPU autocast is zero, silently."""
    torch.manual_seed(0)
    model = build_model(SMALL, out_channels=1).to(memory_format=torch.channels_last)
    x, grads = torch.rand(2, 1, 16, 16), []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = run(x, TIMES)
        out.float().square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    eager, compiled = grads
    largest = max(grad.norm() for grad in eager.values())
    for name, grad in eager.items():
        assert (compiled[name] - grad).norm() <= (0.1 if autocast else 1e-3) * grad.norm() + 1e-3 * largest, name
