"""The U-Net of the paper's baselines: a classifier's convolutions going down, a light decoder coming up.

The decoder is the one of segmentation-models-pytorch 0.3.3 (paper.md, section 5): per level nearest enlargement,
concatenation with the encoder's map, twice 3 x 3 convolution, BatchNorm and ReLU; VGG has two more convolutions at the
bottom. With densenet161: 38.73 M parameters, 16.9 GMAC at 256 x 256. Ours names the last convolution `final_conv`, as
in every network here.

BatchNorm sees what a device computes at once, so images of a micro-batch influence one another: see
`engine.statistics` for what that means on several processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_lmk.config import EncoderUNetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models.encoders import build_encoder


class EncoderUNet(nn.Module):
    """Images [B, 1, S, S] -> maps [B, out_channels, S, S]; S is a multiple of 32, else ConfigError."""

    def __init__(self, cfg: EncoderUNetConfig, *, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.side_multiple = cfg.in_channels, cfg.side_multiple
        self.encoder = build_encoder(cfg)
        self.decoder = Decoder(self.encoder.channels, cfg.decoder, has_center=cfg.encoder == "vgg19")
        self.final_conv = nn.Conv2d(cfg.decoder[-1], out_channels, 3, padding=1)
        nn.init.xavier_uniform_(self.final_conv.weight)
        nn.init.zeros_(self.final_conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is None, "this network takes no timestep; RunConfig refuses one"
        if x.shape[-1] % self.side_multiple or x.shape[-2] % self.side_multiple:
            raise ConfigError(
                f"images are {x.shape[-1]} x {x.shape[-2]} pixels, but this model halves its maps down to 1/"
                f"{self.side_multiple}; set data.image_size to a multiple of {self.side_multiple}"
            )
        return self.final_conv(self.decoder(self.encoder(x.expand(-1, self.in_channels, -1, -1))))


class Decoder(nn.Module):
    """From the encoder's maps, largest first, back to full size."""

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
        for block, skip in zip(self.blocks, [*maps[-2::-1], None], strict=True):
            assert isinstance(block, nn.ModuleDict)
            x = double(x)
            x = block["conv2"](block["conv1"](x if skip is None else torch.cat((x, skip), 1)))
        return x


def double(x: Tensor) -> Tensor:
    """Every pixel four times, in channels-last memory.

    `F.interpolate` would do the same, but loses its gradient where it is compiled for a CPU under autocast.
    """
    x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    batch, height, width, count = x.shape
    wide = x[:, :, None, :, None, :].expand(batch, height, 2, width, 2, count)
    return wide.reshape(batch, 2 * height, 2 * width, count).permute(0, 3, 1, 2)


def _conv(channels_in: int, channels_out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))
