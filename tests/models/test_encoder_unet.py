"""The baselines' U-Net: published sizes, torchvision's names, and weights from files made on the spot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import EncoderUNetConfig, RunConfig
from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.encoder_unet import build_encoder, double, load_encoder, require_file
from ddpm_lmk.models.import_torch import import_weights
from ddpm_lmk.rundir.checkpoint import read

PUBLISHED = {  # encoder parameters without classifier, as torchvision prints them
    "densenet161": 28_681_000 - 2_209_000,
    "resnext50": 25_028_904 - 2_049_000,
    "vgg19": 143_667_240 - 123_642_856,
}
SMALL = {"densenet161": (1, 1, 2, 1), "resnext50": (1, 1, 2, 1), "vgg19": (1, 1, 1, 1, 1)}


def small(encoder: str, **more: object) -> EncoderUNetConfig:
    return EncoderUNetConfig.model_validate(
        {"encoder": encoder, "scale": 0.125, "blocks": SMALL[encoder], "decoder": (16, 8, 8, 4, 4), **more}
    )


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_encoder_has_the_published_number_of_parameters(encoder: str) -> None:
    with torch.device("meta"):
        model = build_encoder(EncoderUNetConfig.model_validate({"encoder": encoder, "in_channels": 3}))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[encoder]


def test_densenet161_unet_costs_what_the_paper_s_does() -> None:
    """docs/method.md, section 5: 38.73 M parameters, of them 26.46 M in the encoder, 16.8 to 17.1 GMAC at 256 x 256."""
    cost = model_cost(EncoderUNetConfig(), 256, 19)
    assert round(cost.params / 1e6, 2) == 38.73
    assert round(cost.flops_forward / 2e9, 1) == 16.9
    with torch.device("meta"):
        encoder = build_encoder(EncoderUNetConfig())
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 26.46
    assert encoder.channels == [96, 384, 768, 2112, 2208]


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_cost_is_what_torch_counts(encoder: str) -> None:
    cfg = small(encoder)
    model = build_model(cfg, out_channels=3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 64, 64))
    cost = model_cost(cfg, 64, 3)
    assert cost.flops_forward == counter.get_total_flops()
    assert cost.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_maps_have_the_size_of_the_image_and_every_parameter_learns(encoder: str) -> None:
    model = build_model(small(encoder), out_channels=3)
    maps = model(torch.rand(2, 1, 64, 96))
    assert maps.shape == (2, 3, 64, 96)
    maps.square().mean().backward()
    # A bias in front of BatchNorm aside, nothing is without effect; norms cancel the scale, not the gradient.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_densenet_computes_what_its_definition_says() -> None:
    """Written out with the names of the state dict, for two layers and a transition."""
    encoder = build_encoder(small("densenet161", blocks=(2, 1, 1, 1))).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    w = encoder.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, var = w[f"{name}.running_mean"].view(shape), w[f"{name}.running_var"].view(shape)
        scaled = (x - mean) / (var + 1e-5).sqrt()
        return (scaled * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)).relu()

    def layer(x: Tensor, name: str) -> Tensor:
        inner = F.conv2d(norm(x, f"{name}.norm1"), w[f"{name}.conv1.weight"])
        return torch.cat((x, F.conv2d(norm(inner, f"{name}.norm2"), w[f"{name}.conv2.weight"], padding=1)), 1)

    x = torch.rand(1, 1, 32, 32)
    first = norm(F.conv2d(x, w["features.conv0.weight"], stride=2, padding=3), "features.norm0")
    block = F.max_pool2d(first, 3, 2, 1)
    for number in (1, 2):
        block = layer(block, f"features.denseblock1.denselayer{number}")
    second = norm(block, "features.transition1.norm")
    with torch.no_grad():
        maps = encoder(x)
    torch.testing.assert_close(maps[0], first)
    torch.testing.assert_close(maps[1], second)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 16 >> i, 16 >> i) for i, c in enumerate(encoder.channels)]


def test_double_repeats_pixels() -> None:
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(double(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_torchvision_file_fills_the_encoder(encoder: str, tmp_path: Path) -> None:
    """With a classifier, old DenseNet names, no counters, and a stem for colour; one of them as a real file."""
    torch.manual_seed(0)
    source = build_encoder(small(encoder, in_channels=3)).eval()
    foreign = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    head = "fc" if encoder == "resnext50" else "classifier"
    state = {**foreign, f"{head}.weight": torch.zeros(5, 4), f"{head}.bias": torch.zeros(5)}
    if encoder == "densenet161":
        torch.save(state, tmp_path / "net.pth")
        import_weights(tmp_path / "net.pth", tmp_path / "net.safetensors")
        with (tmp_path / "net.safetensors").open("rb") as file:
            state = read(file, (tmp_path / "net.safetensors").stat().st_size, "net")
    model = build_model(small(encoder), out_channels=2).eval()
    decoder = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("decoder.")}
    load_encoder(model, state)
    grey = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        for mine, theirs in zip(model.encoder(grey), source(grey.expand(-1, 3, -1, -1)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in decoder.items())


def test_weights_of_another_encoder_are_refused_and_change_nothing() -> None:
    model = build_model(small("densenet161"), out_channels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"does not fit.*download\.pytorch\.org"):
        load_encoder(model, build_encoder(small("resnext50")).state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(CheckpointError, match=r"does not exist.*densenet161-8d451a50\.pth"):
        require_file("nowhere.safetensors")


def test_run_file_is_refused_where_the_network_cannot_do_it() -> None:
    data = {"path": "x", "image_size": 64}
    landmarks = {"data": data, "model": {"kind": "encoder_unet"}, "task": {"kind": "landmarks"}}
    assert RunConfig.model_validate(landmarks).model.kind == "encoder_unet"
    refusals = {
        "takes no timestep, which task denoise needs": {"task": {"kind": "denoise"}},
        "set task.timestep=null": {"task": {"kind": "landmarks", "timestep": 3}},
        "multiple of 32": {"data": {**data, "image_size": 48}},
        "use train.exactness=ordered": {"train": {"exactness": "exact", "micro_batch": 2}},
        "has 2 numbers": {"model": {"kind": "encoder_unet", "blocks": (1, 1)}},
    }
    for message, change in refusals.items():
        with pytest.raises(ValidationError, match=message):
            RunConfig.model_validate({**landmarks, **change})
    with pytest.raises(ConfigError, match=r"48 x 32 pixels.*multiple of 32"):
        build_model(small("vgg19"), out_channels=1)(torch.zeros(1, 1, 32, 48))
