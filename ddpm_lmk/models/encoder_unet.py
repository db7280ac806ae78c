"""The U-Net of the paper's baselines: an image encoder going down, a light decoder coming up.

The encoders are DenseNet, VGG and ResNeXt without their classifiers, under torchvision's parameter names and with its
initialisation: at scale 1 and the published blocks, weights of densenet161, vgg19 and resnext50_32x4d fit. Their maps
at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image side are those segmentation-models-pytorch 0.3.3 takes, whose decoder this
is (docs/method.md, section 5). With densenet161: 38.73 M parameters, 16.9 GMAC at 256 x 256. ConvNeXt has maps from 1/4
on, and a vision transformer all of them at the size of its patches, which a decoder of its own doubles.

BatchNorm sees what a device computes at once, so images of a micro-batch influence one another: see
`engine.collectives` for what that means on several processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import EncoderUNetConfig, Network
from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.models.convnext import CONVNEXTS, ConvNeXt, convnext_tensors
from ddpm_lmk.models.vit import VITS, VisionTransformer, vit_tensors
from ddpm_lmk.models.weights import load_all

Maps = list[Tensor]
# Of ImageNet, in the order red, green, blue; intensities in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """Images [B, in_channels, S, S] -> five maps, largest first.

    Attributes:
        channels: of the five maps.
    """

    channels: list[int]


class DenseNet(Encoder):
    """Every layer of a block sees all maps before it (Huang et al., CVPR 2017); maps before each transition's conv."""

    def __init__(self, cfg: EncoderUNetConfig) -> None:
        super().__init__()
        growth = max(1, round(48 * cfg.scale))  # 48 is densenet161's
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
                x = relu(norm(x))  # the decoder's skip, as the library takes it: after the norm, before channels halve
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
    """Plain 3 x 3 convolutions without norms (Simonyan & Zisserman, 2014): `vgg19`; maps before each pooling."""

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
    """One of the paper's encoders, randomly initialised."""
    return ENCODERS[cfg.encoder](cfg)


def build_any_encoder(cfg: EncoderUNetConfig) -> nn.Module:
    """The encoder of a network, randomly initialised; `scale` is of its channels, or of a transformer's heads."""
    if cfg.encoder in VITS:
        size = VITS[cfg.encoder]
        depth = cfg.blocks[0] if cfg.blocks else size.depth
        heads = max(1, round(size.heads * cfg.scale))
        return VisionTransformer(size, in_channels=cfg.in_channels, heads=heads, depth=depth)
    if cfg.encoder in CONVNEXTS:
        published, blocks = CONVNEXTS[cfg.encoder]
        channels = tuple(max(1, round(count * cfg.scale)) for count in published)
        return ConvNeXt(channels, cfg.blocks or blocks, in_channels=cfg.in_channels)
    return build_encoder(cfg)


class EncoderUNet(nn.Module):
    """Images [B, 1, S, S] -> maps [B, out_channels, S, S]; S is a multiple of `side_multiple`, else ConfigError.

    A frozen encoder gets no gradients and stays in evaluation: no statistics of its norms change.
    """

    input_mean: Tensor
    input_deviation: Tensor

    def __init__(self, cfg: EncoderUNetConfig, *, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.side_multiple = cfg.in_channels, cfg.side_multiple
        self.is_frozen = cfg.frozen
        self.is_normalized = cfg.is_normalized
        for name, values in (("input_mean", MEAN), ("input_deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.encoder = build_any_encoder(cfg)
        self.decoder: nn.Module
        if isinstance(self.encoder, VisionTransformer):
            self.decoder = PatchDecoder(self.encoder.channels, cfg.decoder)
        elif isinstance(self.encoder, ConvNeXt):
            # Nothing at 1/2 of the side.
            self.decoder = Decoder([0, *_widths(self.encoder)], cfg.decoder, has_center=False)
        else:
            assert isinstance(self.encoder, Encoder)
            self.decoder = Decoder(self.encoder.channels, cfg.decoder, has_center=cfg.encoder == "vgg19")
        if self.is_frozen:
            self.encoder.requires_grad_(False)
        self.final_conv = nn.Conv2d(cfg.decoder[-1], out_channels, 3, padding=1)
        nn.init.xavier_uniform_(self.final_conv.weight)  # the library's segmentation head
        nn.init.zeros_(self.final_conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is None, "this network takes no timestep; RunConfig refuses one"
        if x.shape[-1] % self.side_multiple or x.shape[-2] % self.side_multiple:
            raise ConfigError(
                f"images are {x.shape[-1]} x {x.shape[-2]} pixels, but this model halves its maps down to 1/"
                f"{self.side_multiple}; set data.image_size to a multiple of {self.side_multiple}"
            )
        side = x.shape[-2:]
        x = x.expand(-1, self.in_channels, -1, -1)
        if self.is_normalized:
            x = (x - self.input_mean) / self.input_deviation
        maps = self.encoder(x)  # a frozen one makes no graph, since neither it nor the image wants a gradient
        if isinstance(self.decoder, PatchDecoder):
            return self.final_conv(self.decoder(maps, side))
        return self.final_conv(self.decoder(maps))

    def train(self, mode: bool = True) -> EncoderUNet:
        """As every module's, but for a frozen encoder."""
        super().train(mode)
        if self.is_frozen:
            self.encoder.eval()
        return self


def _widths(encoder: ConvNeXt) -> list[int]:
    return [next(stage.parameters()).shape[0] for stage in encoder.stages]


class Decoder(nn.Module):
    """From the encoder's maps, largest first, back to full size; the last step has no skip, at full size there is none.

    Per level: double size, concatenation with the encoder's map, twice 3 x 3 convolution, BatchNorm and ReLU. VGG,
    which has no norms of its own, gets two more convolutions at the bottom.
    """

    def __init__(self, skips: list[int], channels: tuple[int, ...], *, has_center: bool) -> None:
        super().__init__()
        deepest = skips[-1]
        self.center = nn.Sequential(_conv(deepest, deepest), _conv(deepest, deepest)) if has_center else nn.Identity()
        self.blocks = nn.ModuleList()
        for wide, skip, count in zip((deepest, *channels[:-1]), (*skips[-2::-1], 0), channels, strict=True):
            self.blocks.append(nn.ModuleDict({"conv1": _conv(wide + skip, count), "conv2": _conv(count, count)}))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.center(maps[-1])
        skips = [*maps[-2::-1], *[None] * (len(self.blocks) - len(maps) + 1)]
        for block, skip in zip(self.blocks, skips, strict=True):
            assert isinstance(block, nn.ModuleDict)
            x = double(x)
            x = block["conv2"](block["conv1"](x if skip is None else torch.cat((x, skip), 1)))
        return x


class PatchDecoder(nn.Module):
    """From the maps of a transformer [B, C, H/patch, W/patch] to full size, doubled as `Decoder` does, without skips.

    Patches of 14 pixels are no power of two: the last size is reached by linear interpolation.
    """

    def __init__(self, count: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(count, channels[0], 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True)
        )
        self.blocks = nn.ModuleList()
        for wide, narrow in pairwise(channels):
            self.blocks.append(nn.ModuleDict({"conv1": _conv(wide, narrow), "conv2": _conv(narrow, narrow)}))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        x = self.project(x)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, nn.ModuleDict)
            x = double(x)
            if number == len(self.blocks) and x.shape[-2:] != side:
                x = F.interpolate(x, size=side, mode="bilinear", align_corners=False)
            x = block["conv2"](block["conv1"](x))
        return x


def double(x: Tensor) -> Tensor:
    """Every pixel four times, in channels-last memory."""
    # `F.interpolate` would do the same, but loses its gradient where it is compiled for a CPU under autocast.
    x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    batch, height, width, count = x.shape
    wide = x[:, :, None, :, None, :].expand(batch, height, 2, width, 2, count)
    return wide.reshape(batch, 2 * height, 2 * width, count).permute(0, 3, 1, 2)


def _conv(channels_in: int, channels_out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


OURS = "encoder."
LEFT_BEHIND = ("classifier.", "fc.")
# Files of before torchvision 0.3 write `norm.1` for `norm1`: module names with dots were allowed then.
OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
STEMS = ("features.conv0.weight", "features.0.weight", "conv1.weight")
SOURCE = (
    "ImageNet weights of the paper's encoders: https://download.pytorch.org/models/ (densenet161-8d451a50.pth, "
    "vgg19-dcbb9e9d.pth, resnext50_32x4d-7cdf4587.pth), made readable by `ddpm-lmk import-weights`; "
    "of the others: docs/weights.md"
)


def is_encoder_only(cfg: Network, state: Mapping[str, Tensor]) -> bool:
    """Is the encoder all that these weights have of the network of `cfg`?"""
    return cfg.kind == "encoder_unet" and not any(name.startswith("decoder.") for name in state)


def load_encoder(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an encoder's tensors, of one of our runs or of torchvision's classifiers, into `model.encoder`.

    Raises CheckpointError and changes nothing unless every tensor of the encoder is there with its shape.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise CheckpointError("found weights of an encoder; wanted model.kind=encoder_unet to put them into")
    own = encoder.state_dict()
    found = encoder_tensors(state)
    for name in STEMS:
        if name in own and name in found and own[name].shape[1] == 1 < found[name].shape[1]:
            # A stem for colour, summed: the same maps as for a grey image repeated three times, as in the library.
            found[name] = found[name].sum(1, keepdim=True)
    for name in own:
        if name.endswith("num_batches_tracked") and name not in found:  # old files; of no use where momentum is given
            found[name] = own[name]
    try:
        load_all(encoder, found)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (model.encoder, model.scale, model.blocks). {SOURCE}") from error


def encoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, under the names of ours: torchvision's present ones, `vit`, `convnext`."""
    foreign = vit_tensors(state) or convnext_tensors(state)
    if foreign is not None:
        return foreign
    if any(name.startswith(OURS) for name in state):
        return {name.removeprefix(OURS): value for name, value in state.items() if name.startswith(OURS)}
    kept = {name: value for name, value in state.items() if not name.startswith(LEFT_BEHIND)}
    return {OLD_NAME.sub(r"\1\2.", name): value for name, value in kept.items()}


def require_file(path: str) -> None:
    """Raise CheckpointError, which says where ImageNet weights are found, unless there is something at `path`."""
    if not Path(path).exists():
        raise CheckpointError(f"{path} does not exist; give a run, a snapshot or a .safetensors file. {SOURCE}")
