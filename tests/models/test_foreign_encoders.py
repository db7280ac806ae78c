"""Encoders from files of others: the features that transformers and timm compute, from the same weights.

encoder_references.json has their names, shapes and a few numbers of their outputs; make_encoder_references.py wrote it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lmk.config import EncoderUNetConfig, RunConfig
from ddpm_lmk.config.load import config_hash
from ddpm_lmk.config.model import CONVNEXTS, PATCHES
from ddpm_lmk.data.shards.manifest import Manifest
from ddpm_lmk.engine.starting_weights import require_fitting
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.models import build_model, model_cost
from ddpm_lmk.models.encoder_unet import DEVIATION, MEAN, EncoderUNet, build_any_encoder, load_encoder
from ddpm_lmk.models.import_torch import import_weights
from ddpm_lmk.models.state_dicts import describe
from ddpm_lmk.run import execute
from ddpm_lmk.rundir.checkpoint import load_weights
from tests.models.make_encoder_references import FILE, formula, picture

REFERENCES: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
NEW = (*PATCHES, *CONVNEXTS)
PUBLISHED = {  # parameters without classifier, as their authors and timm count them
    "dinov2_vits14": 22_056_576 - 384,  # the token of masked patches
    "dinov2_vitb14": 86_580_480 - 768,
    "convnext_tiny": 28_589_128 - 769_000 - 2 * 768,
    "convnext_base": 88_591_464 - 1_025_000 - 2 * 1024,
    "vit_small_patch16_224": 22_050_664 - 385_000 + 24 * 384,  # and the scales that a plain ViT has not
}


def small(encoder: str, **more: object) -> EncoderUNetConfig:
    blocks = (4,) if encoder in PATCHES else (1, 1, 2, 1)
    heads = 1 / 12 if "base" in encoder or "vitb" in encoder else 1 / 6
    scale = heads if encoder in PATCHES else 0.1
    fields = {"encoder": encoder, "scale": max(scale, 0.1), "blocks": blocks, "decoder": (16, 8, 8, 4, 4)}
    return EncoderUNetConfig.model_validate({**fields, "in_channels": 3, **more})


def state_of(reference: dict[str, Any]) -> dict[str, Tensor]:
    return {name: formula(name, tuple(shape)) for name, shape in reference["shapes"].items()}


def features(encoder: nn.Module, side: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        maps = encoder.eval()(picture(*side))
    if isinstance(maps, list):
        return torch.cat([each.flatten() for each in maps])
    return maps.flatten(2).transpose(1, 2).flatten()


@pytest.mark.parametrize("title", REFERENCES)
def test_features_are_those_of_the_library_that_wrote_the_file(title: str) -> None:
    reference = REFERENCES[title]
    cfg = small(reference["encoder"])
    model = build_model(cfg, out_channels=2)
    load_encoder(model, state_of(reference))
    found = features(model.encoder, reference["side"])  # type: ignore[arg-type]
    assert len(found) == reference["size"]
    torch.testing.assert_close(found[:: reference["step"]], torch.tensor(reference["values"]), atol=1e-5, rtol=1e-5)


def renamed(title: str, *pairs: tuple[str, str], **more: Tensor) -> dict[str, Tensor]:
    """The weights of a reference under other names."""
    state = {}
    for name, value in state_of(REFERENCES[title]).items():
        for old, new in pairs:
            name = name.replace(old, new)
        state[name] = value
    return state | more


def test_the_authors_own_names_are_known_too() -> None:
    """DINOv2's and DINOv3's own files, a training checkpoint's prefix, torchvision's ConvNeXt, a task's prefix."""
    own = [("reg_token", "register_tokens")]
    mask = torch.cat((torch.ones(64), torch.zeros(64), torch.ones(64)))
    theirs = [("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")]
    dinov3 = renamed("timm DINOv3", *theirs)
    for index in range(4):
        # Their own files may hold anything where the mask is 0.
        dinov3[f"blocks.{index}.attn.qkv.bias"] = torch.where(mask == 1, 0.0, torch.nan)
        dinov3[f"blocks.{index}.attn.qkv.bias_mask"] = mask
    dinov3["rope_embed.periods"] = torch.ones(16)
    backbone = {f"backbone.{name}": value for name, value in state_of(REFERENCES["timm DINOv2"]).items()}
    prefixed = {f"convnext.{name}": value for name, value in state_of(REFERENCES["transformers ConvNeXt"]).items()}
    torchvision = {}
    for name, value in state_of(REFERENCES["timm ConvNeXt"]).items():
        head, *rest = name.split(".")
        if head == "stem":
            torchvision[f"features.0.{'.'.join(rest)}"] = value
        elif rest[1:2] == ["downsample"]:
            torchvision[f"features.{2 * int(rest[0])}.{'.'.join(rest[2:])}"] = value
        elif head == "stages":
            place = f"features.{2 * int(rest[0]) + 1}.{rest[2]}"
            layer = {"conv_dw": "0", "norm": "2", "fc1": "3", "fc2": "5"}.get(rest[3] if rest[3] != "mlp" else rest[4])
            torchvision[f"{place}.layer_scale" if layer is None else f"{place}.block.{layer}.{rest[-1]}"] = (
                value[:, None, None] if layer is None else value
            )
    torchvision["classifier.0.weight"] = torch.ones(77)
    for title, state in (
        ("timm DINOv2 with registers", renamed("timm DINOv2 with registers", *own, mask_token=torch.zeros(1, 64))),
        ("timm DINOv3", dinov3),
        ("timm DINOv2", backbone),
        ("transformers ConvNeXt", prefixed),
        ("timm ConvNeXt", torchvision),
    ):
        reference = REFERENCES[title]
        cfg = small(reference["encoder"])
        model = build_model(cfg, out_channels=2)
        load_encoder(model, state)
        found = features(model.encoder, reference["side"])  # type: ignore[arg-type]
        torch.testing.assert_close(found[:: reference["step"]], torch.tensor(reference["values"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_an_encoder_has_the_published_number_of_parameters(encoder: str) -> None:
    with torch.device("meta"):
        model = build_any_encoder(EncoderUNetConfig.model_validate({"encoder": encoder, "in_channels": 3}))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[encoder]


@pytest.mark.parametrize("encoder", ["dinov2_vits14_reg", "dinov3_vits16", "convnext_tiny"])
def test_maps_have_the_size_of_the_image_and_cost_what_torch_counts(encoder: str) -> None:
    cfg = small(encoder)
    side = 2 * cfg.side_multiple
    model = build_model(cfg, out_channels=3)
    maps = model(torch.rand(2, 1, side, side))
    assert maps.shape == (2, 3, side, side)
    maps.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1, side, side))
    cost = model_cost(cfg, side, 3)
    # PyTorch does not count its fused attention on CPUs: two products of N x N x D in each of four blocks.
    tokens = 0 if encoder in CONVNEXTS else 4 + 1 + 4
    assert cost.flops_forward == counter.get_total_flops() + 4 * 4 * tokens**2 * 64
    frozen = model_cost(small(encoder, frozen=True), side, 3)
    assert frozen.flops_forward == cost.flops_forward < frozen.flops_train < cost.flops_train


def test_the_encoder_sees_imagenet_s_mean_and_deviation() -> None:
    seen = {}
    for normalize in ("auto", "none"):
        model = build_model(small("convnext_tiny", normalize=normalize), out_channels=1).eval()
        assert isinstance(model, EncoderUNet)
        model.encoder.register_forward_pre_hook(lambda module, inputs, key=normalize: seen.update({key: inputs[0]}))
        grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(grey)
        assert not any(name.startswith("input_") for name in model.state_dict())
    torch.testing.assert_close(seen["none"], grey.expand(-1, 3, -1, -1))
    wanted = torch.stack([(grey[:, 0] - mean) / deviation for mean, deviation in zip(MEAN, DEVIATION)], 1)
    torch.testing.assert_close(seen["auto"], wanted)


def test_a_frozen_encoder_has_no_gradients_and_its_norms_stay() -> None:
    cfg = EncoderUNetConfig.model_validate(
        {"encoder": "densenet161", "scale": 0.125, "blocks": (1, 1, 1, 1), "decoder": (8, 8, 8, 8, 8), "frozen": True}
    )
    model = build_model(cfg, out_channels=1)
    assert isinstance(model, EncoderUNet)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.rand(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    after = model.state_dict()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert all(name in same for name in after if name.startswith("encoder."))
    assert any("running_mean" in name for name in set(after) - same)  # those of the decoder move


@pytest.mark.parametrize(
    ("title", "is_pickle"), [("transformers DINOv2", False), ("timm DINOv3", True), ("timm ConvNeXt", False)]
)
def test_a_run_with_two_looks_starts_from_a_file_and_keeps_a_frozen_encoder(
    title: str, is_pickle: bool, packed_phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = REFERENCES[title]
    cfg = small(reference["encoder"], frozen=True)
    state = state_of(reference)
    file = tmp_path / "encoder" / "model.safetensors"
    file.parent.mkdir()
    if is_pickle:
        torch.save(state, tmp_path / "encoder.pth")
        import_weights(tmp_path / "encoder.pth", file)
    else:
        save_file(state, file)
        (file.parent / "config.json").write_text('{"model_type": "theirs"}')  # a folder as the hub has it
    side = {14: 28, 16: 32, 32: 32}[cfg.side_multiple]
    run = RunConfig.model_validate(
        {
            "data": {"path": str(packed_phantoms), "image_size": side, "fine_size": 64},
            "model": cfg.model_dump(),
            "task": {"kind": "landmarks", "codec": {"kind": "disc"}, "refine": {"crop": 0.5, "size": side}},
            "train": {"duration": "2 steps", "global_batch_size": 4, "precision": "bf16", "channels_last": True},
            "init": {"weights": str(file if is_pickle else file.parent)},
            "optim": {"lr": 0.01, "weight_decay": 0.1},
            "runtime": {"workers": 0},
            "evaluate": {"split": None},
        }
    )
    require_fitting(run, Manifest.open(packed_phantoms).spec)  # before anything starts, from the header alone
    execute(run, tmp_path / "run", device="cpu")
    parent = json.loads((tmp_path / "run" / "run.json").read_text())["parent"]
    assert parent["loaded"] == "encoder"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert parent["files"]["model.safetensors"]["sha256"] == digest
    assert f"sha256 {digest}" in capsys.readouterr().err
    for use in ("model", "ema"):
        weights = load_weights(tmp_path / "run", use)[0]
        for part in ("coarse", "fine"):
            model = build_model(cfg, out_channels=1)
            load_encoder(model, state)
            for name, value in model.encoder.state_dict().items():  # type: ignore[union-attr]
                assert torch.equal(weights[f"{part}.encoder.{name}"], value), name


@pytest.mark.parametrize("encoder", ["dinov2_vits14", "dinov3_vitb16", "convnext_small"])
def test_published_files_are_recognised(encoder: str) -> None:
    with torch.device("meta"):
        model = build_any_encoder(EncoderUNetConfig.model_validate({"encoder": encoder, "in_channels": 3}))
        state = model.state_dict()
    assert describe(state)["network"] == f"{encoder} of published size, for model.kind=encoder_unet"


def test_a_file_of_another_encoder_is_refused_and_what_cannot_be_is_said() -> None:
    model = build_model(small("dinov2_vits14_reg"), out_channels=1)
    with pytest.raises(CheckpointError, match=r"register_tokens is missing.*docs/weights\.md"):
        load_encoder(model, state_of(REFERENCES["transformers DINOv2"]))
    data = {"path": "x", "image_size": 224}
    fields = {"data": data, "model": {"kind": "encoder_unet", "in_channels": 3}, "task": {"kind": "landmarks"}}
    refusals: list[tuple[str, dict[str, Any]]] = [
        ("set in_channels=3", {"model": {"encoder": "dinov2_vits14", "in_channels": 1}}),
        ("normalize=imagenet is for three channels", {"model": {"normalize": "imagenet", "in_channels": 1}}),
        ("multiple of 14", {"model": {"encoder": "dinov2_vits14"}, "data": {**data, "image_size": 256}}),
        ("name its file in init.weights", {"model": {"frozen": True}}),
        ("trains densenet161, vgg19 or resnext50", {"model": {"encoder": "convnext_tiny"}, "task": {"kind": "dino"}}),
        ("has 4 stages", {"model": {"encoder": "convnext_tiny", "blocks": (3,)}}),
    ]
    for words, change in refusals:
        own = {**fields["model"], **change.pop("model", {})}  # type: ignore[dict-item]
        with pytest.raises(ValidationError, match=words):
            RunConfig.model_validate({**fields, "model": own, **change})


def test_run_files_of_before_keep_their_hash() -> None:
    cfg = EncoderUNetConfig()
    assert set(cfg.model_dump(mode="json")) == {"kind", "encoder", "scale", "blocks", "decoder", "in_channels"}
    run = {"data": {"path": "x"}, "model": {"kind": "encoder_unet"}, "task": {"kind": "landmarks"}}
    frozen = {**run, "model": {"kind": "encoder_unet", "frozen": True}, "init": {"weights": "x"}}
    assert config_hash(RunConfig.model_validate(run)) != config_hash(RunConfig.model_validate(frozen))
