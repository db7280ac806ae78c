"""ConvNeXt as an encoder (Liu et al., CVPR 2022; also DINOv3's), under the names of its authors' code.

`convnext_tensors` brings the names of timm, torchvision and Hugging Face's transformers to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6
# Channels and blocks of the four stages.
CONVNEXTS = {
    "convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
}


class ConvNeXt(nn.Module):
    """Images [B, C, S, S] -> four maps, at 1/4, 1/8, 1/16 and 1/32 of the side."""

    def __init__(self, channels: tuple[int, ...], blocks: tuple[int, ...], *, in_channels: int) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList()
        for before, count in zip((in_channels, *channels), channels):
            if not len(self.downsample_layers):
                layers = [nn.Conv2d(before, count, 4, stride=4), ChannelNorm(count, eps=EPS)]
            else:
                layers = [ChannelNorm(before, eps=EPS), nn.Conv2d(before, count, 2, stride=2)]
            self.downsample_layers.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(count) for _ in range(number))) for count, number in zip(channels, blocks)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7 x 7 convolution per channel, a perceptron at every pixel, scaled and added."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(count, count, 7, padding=3, groups=count)
        self.norm = nn.LayerNorm(count, eps=EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(count, 4 * count), nn.Linear(4 * count, count)
        self.gamma = nn.Parameter(torch.full((count,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.pwconv2(F.gelu(self.pwconv1(inner))) * self.gamma
        return x + inner.permute(0, 3, 1, 2)


# From the names of others to the authors', in this order.
NAMES = [
    (r"^(convnext|dinov3_convnext|backbone|model)\.", ""),
    # timm
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    # transformers, and its DINOv3
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^(?:encoder\.)?stages\.(\d+)\.downsampl(?:ing_layer|e_layers)\.", r"downsample_layers.\1."),
    (r"^(?:encoder\.)?stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv([12])\.", r".pwconv\1."),
    (r"^(stages\.\d+\.\d+)\.layer_?norm\.", r"\1.norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
]
# torchvision: 0 is the stem, odd ones are stages, the even ones between them halve
TORCHVISION = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
OURS = re.compile(r"^(downsample_layers\.\d\.[01]|stages\.\d\.\d+\.(dwconv|norm|pwconv[12]))\.(weight|bias)$|\.gamma$")


def convnext_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors of a ConvNeXt under the names of ours, without last norm and head; None where they are of none."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = _from_torchvision(name)
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if OURS.search(name):
            found[name] = value.flatten() if name.endswith(".gamma") else value
            if ".pwconv" in name and value.ndim == 4:  # timm's with convolutions of 1 x 1
                found[name] = value.flatten(1)
    return found if "downsample_layers.3.1.weight" in found and "stages.0.0.dwconv.weight" in found else None


def _from_torchvision(name: str) -> str:
    """Names of torchvision: `features.1.0.block.3.weight` is `stages.0.0.pwconv1.weight`."""
    if halving := re.fullmatch(r"features\.([0246])\.([01])\.(weight|bias)", name):
        number, layer, kind = halving.groups()
        return f"downsample_layers.{int(number) // 2}.{layer}.{kind}"
    if block := re.fullmatch(r"features\.([1357])\.(\d+)\.block\.([0235])\.(weight|bias)", name):
        number, index, layer, kind = block.groups()
        return f"stages.{int(number) // 2}.{index}.{TORCHVISION[layer]}.{kind}"
    if scale := re.fullmatch(r"features\.([1357])\.(\d+)\.layer_scale", name):
        return f"stages.{int(scale[1]) // 2}.{scale[2]}.gamma"
    return name
