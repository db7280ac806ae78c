"""Writes encoder_references.json: what transformers and timm compute with weights that are a formula.

Run by hand, in an environment with transformers 5.23 and timm 1.0.31 (neither is needed by a test):
`python tests/models/make_encoder_references.py`. The weights of a tensor follow from its name and shape
(`formula`), so that only names, shapes and a few outputs have to be kept.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("encoder_references.json")
NUM_KEPT = 60  # about as many numbers of the maps, evenly spread


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of a tensor: small, about 1 where they are a scale."""
    count = torch.Size(shape).numel()
    waves = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000)
    is_scale = len(shape) == 1 and name.endswith(("weight", "gamma", "lambda1", "gamma_1", "gamma_2", "parameter"))
    fan_in = max(1, count // shape[0]) if len(shape) > 1 else 100
    return ((1 + 0.1 * waves) if is_scale else waves * fan_in**-0.5).reshape(shape).float()


def picture(height: int, width: int) -> Tensor:
    """Images `[2, 3, H, W]` in [0, 1]."""
    values = torch.sin(torch.arange(2 * 3 * height * width, dtype=torch.float64) * 0.37)
    return (0.5 + 0.5 * values).reshape(2, 3, height, width).float()


def filled(model: Any) -> tuple[nn.Module, dict[str, list[int]]]:
    """A model with those weights, and the names and shapes that a file of it has: transformers' own names differ."""
    if not hasattr(model, "save_pretrained"):
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict({name: formula(name, shape) for name, shape in shapes.items()})
        return model.eval(), {name: list(shape) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {name: tuple(value.shape) for name, value in load_file(file).items()}
        save_file({name: formula(name, shape) for name, shape in shapes.items()}, file, metadata={"format": "pt"})
        return type(model).from_pretrained(folder).eval(), {name: list(shape) for name, shape in shapes.items()}


class Empty(type):
    """Makes classes that have every attribute."""

    def __getattr__(cls, name: str) -> str:
        return name


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision, which timm imports and does not need here, as modules full of empty classes."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_wanted = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_wanted else None

    def exec_module(self, module: types.ModuleType) -> None:
        def empty(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return Empty(name, (), {})

        module.__getattr__ = empty  # type: ignore[method-assign]


def main() -> None:
    import transformers as hf

    sys.meta_path.insert(0, NoTorchvision())
    import timm

    vit = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}

    def tokens(norm: str, prefix: int) -> Callable[[Any, Tensor], Tensor]:
        def maps(model: Any, image: Tensor) -> Tensor:
            extra = {"interpolate_pos_encoding": True} if isinstance(model, hf.ViTModel) else {}
            hidden = model(image, output_hidden_states=True, **extra).hidden_states[1:]
            return torch.cat([getattr(model, norm)(each)[:, prefix:] for each in hidden], -1)

        return maps

    def stages(model: Any, image: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in model(image, output_hidden_states=True).hidden_states[1:]])

    def timm_tokens(model: Any, image: Tensor) -> Tensor:
        maps = model.forward_intermediates(image, indices=[0, 1, 2, 3], norm=True, intermediates_only=True)
        return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], -1)

    def timm_stages(model: Any, image: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in model.forward_intermediates(image, intermediates_only=True)])

    small = {"embed_dim": 64, "depth": 4, "num_heads": 1}
    convnext = {"hidden_sizes": [10, 19, 38, 77], "depths": [1, 1, 2, 1]}
    dinov2 = {"image_size": 518, "patch_size": 14, **vit}
    second = hf.Dinov2Model(hf.Dinov2Config(**dinov2))
    registers = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dinov2))
    dinov3 = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(intermediate_size=256, num_register_tokens=4, **vit))
    plain = hf.ViTModel(hf.ViTConfig(intermediate_size=256, layer_norm_eps=1e-6, **vit))
    theirs = hf.ConvNextModel(hf.ConvNextConfig(layer_norm_eps=1e-6, **convnext))

    def of_timm(name: str, **more: Any) -> nn.Module:
        return timm.create_model(name, **(small | more))

    any_size = {"dynamic_img_size": True}
    narrow = {"dims": (10, 19, 38, 77), "depths": (1, 1, 2, 1)}
    # Where two libraries resize positions to fewer in two ways, the other one is asked at the size they were learnt at.
    cases: dict[str, tuple[str, nn.Module, Callable[[Any, Tensor], Tensor], tuple[int, int]]] = {
        "transformers DINOv2": ("dinov2_vits14", second, tokens("layernorm", 1), (56, 42)),
        "transformers DINOv2 with registers": ("dinov2_vits14_reg", registers, tokens("layernorm", 5), (56, 42)),
        "transformers DINOv3": ("dinov3_vits16", dinov3, tokens("norm", 5), (64, 48)),
        "transformers ViT": ("vit_small_patch16_224", plain, tokens("layernorm", 1), (224, 224)),
        "transformers ConvNeXt": ("convnext_tiny", theirs, stages, (64, 96)),
        "transformers DINOv3 ConvNeXt": (
            "convnext_tiny",
            hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**convnext)),
            stages,
            (64, 96),
        ),
        "timm DINOv2": ("dinov2_vits14", of_timm("vit_small_patch14_dinov2"), timm_tokens, (518, 518)),
        "timm DINOv2 with registers": (
            "dinov2_vits14_reg",
            of_timm("vit_small_patch14_reg4_dinov2", **any_size),
            timm_tokens,
            (56, 42),
        ),
        "timm DINOv3": ("dinov3_vits16", of_timm("vit_small_patch16_dinov3"), timm_tokens, (64, 48)),
        "timm DINOv3 with biases": ("dinov3_vits16", of_timm("vit_small_patch16_dinov3_qkvb"), timm_tokens, (64, 48)),
        "timm ViT": ("vit_small_patch16_224", of_timm("vit_small_patch16_224", **any_size), timm_tokens, (64, 48)),
        "timm ConvNeXt": ("convnext_tiny", timm.create_model("convnext_tiny", **narrow), timm_stages, (64, 96)),
    }
    references = {}
    for title, (encoder, model, maps, side) in cases.items():
        loaded, shapes = filled(model)
        with torch.no_grad():
            found = maps(loaded, picture(*side)).flatten()
        step = len(found) // NUM_KEPT
        facts = {"encoder": encoder, "side": side, "shapes": shapes, "size": len(found), "step": step}
        references[title] = {**facts, "values": [round(float(value), 6) for value in found[::step]]}
    FILE.write_text(json.dumps(references, separators=(",", ":")).replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main()
