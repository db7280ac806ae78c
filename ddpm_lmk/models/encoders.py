"""DenseNet, VGG and ResNeXt without their classifiers, under torchvision's parameter names.

With scale 1 and the published blocks, weights of torchvision's densenet161, vgg19 and resnext50_32x4d fit
(`weights.load_encoder`). An encoder gives its maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image side, the ones
segmentation-models-pytorch takes: of DenseNet those before each transition's convolution, of VGG those before each
pooling. Initialisation is torchvision's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import EncoderUNetConfig

Maps = list[Tensor]


class Encoder(nn.Module):
    """Images [B, in_channels, S, S] -> five maps, largest first.

    Attributes:
        channels: of the five maps.
    """

    channels: list[int]


class DenseNet(Encoder):
    """Every layer of a block sees all maps before it (Huang et al., CVPR 2017); growth 48 in densenet161."""

    def __init__(self, cfg: EncoderUNetConfig) -> None:
        super().__init__()
        growth = max(1, round(48 * cfg.scale))
        count = 2 * growth
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(cfg.in_channels, count, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(count))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        self.channels = [count]
        blocks = cfg.blocks or (6, 12, 36, 24)
        for index, layers in enumerate(blocks, start=1):
            self.features.add_module(f"denseblock{index}", _DenseBlock(count, growth, layers))
            count += growth * layers
            self.channels.append(count)
            if index < len(blocks):
                self.features.add_module(f"transition{index}", _transition(count))
                count //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(count))
        _initialise(self, fan_out=False)

    def forward(self, x: Tensor) -> Maps:
        maps = []
        for name, module in self.features.named_children():
            if name.startswith("transition"):
                norm, relu, conv, pool = cast(nn.Sequential, module)
                x = relu(norm(x))
                maps.append(x)
                x = pool(conv(x))
            else:
                x = module(x)
                if name in ("relu0", "norm5"):
                    maps.append(x)
        return maps


class _DenseLayer(nn.Module):
    def __init__(self, count: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(count)
        self.conv1 = nn.Conv2d(count, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x), inplace=True))), inplace=True))


class _DenseBlock(nn.Module):
    def __init__(self, count: int, growth: int, layers: int) -> None:
        super().__init__()
        for index in range(layers):
            self.add_module(f"denselayer{index + 1}", _DenseLayer(count + index * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat((x, layer(x)), 1)
        return x


def _transition(count: int) -> nn.Sequential:
    transition = nn.Sequential()
    transition.add_module("norm", nn.BatchNorm2d(count))
    transition.add_module("relu", nn.ReLU(inplace=True))
    transition.add_module("conv", nn.Conv2d(count, count // 2, 1, bias=False))
    transition.add_module("pool", nn.AvgPool2d(2))
    return transition


class Vgg(Encoder):
    """Plain 3 x 3 convolutions without norms (Simonyan & Zisserman, 2014), the library's `vgg19`."""

    def __init__(self, cfg: EncoderUNetConfig) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.channels = []
        count: int = cfg.in_channels
        for published, layers in zip((64, 128, 256, 512, 512), cfg.blocks or (2, 2, 4, 4, 4), strict=True):
            width = max(1, round(published * cfg.scale))
            for _ in range(layers):
                self.features.append(nn.Conv2d(count, width, 3, padding=1))
                self.features.append(nn.ReLU(inplace=True))
                count = width
            self.features.append(nn.MaxPool2d(2))
            self.channels.append(width)
        self.channels = [*self.channels[1:], count]
        _initialise(self, fan_out=True)

    def forward(self, x: Tensor) -> Maps:
        maps = []
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                maps.append(x)
            x = module(x)
        return [*maps[1:], x]  # the decoder has no use for the first, at full size


class ResNext(Encoder):
    """Bottlenecks of 32 groups (Xie et al., CVPR 2017), torchvision's resnext50_32x4d."""

    def __init__(self, cfg: EncoderUNetConfig) -> None:
        super().__init__()
        groups = max(1, round(32 * cfg.scale))
        count = 2 * groups
        self.conv1 = nn.Conv2d(cfg.in_channels, count, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(count)
        self.channels = [count]
        for index, layers in enumerate(cfg.blocks or (3, 4, 6, 3)):
            wide = 8 * groups * 2**index
            stride = 1 if index == 0 else 2
            stage = [
                _Bottleneck(count, wide, groups, stride),
                *(_Bottleneck(wide, wide, groups) for _ in range(layers - 1)),
            ]
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
            count = wide
            self.channels.append(count)
        _initialise(self, fan_out=True)

    def forward(self, x: Tensor) -> Maps:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = [x]
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
                maps.append(x)
        return maps


class _Bottleneck(nn.Module):
    """Channels to half, a grouped 3 x 3 convolution, back, and the input added."""

    def __init__(self, count: int, wide: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        inner = wide // 2
        self.conv1 = nn.Conv2d(count, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        if stride > 1 or count != wide:
            self.downsample: nn.Module | None = nn.Sequential(
                nn.Conv2d(count, wide, 1, stride=stride, bias=False), nn.BatchNorm2d(wide)
            )
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


def _initialise(encoder: nn.Module, *, fan_out: bool) -> None:
    """Kaiming normal with zero biases, as torchvision does; norms start at one and zero by themselves."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if fan_out else "fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


ENCODERS: dict[str, type[DenseNet] | type[Vgg] | type[ResNext]] = {
    "densenet161": DenseNet,
    "resnext50": ResNext,
    "vgg19": Vgg,
}


def build_encoder(cfg: EncoderUNetConfig) -> Encoder:
    """The encoder of a network, randomly initialised."""
    return ENCODERS[cfg.encoder](cfg)
