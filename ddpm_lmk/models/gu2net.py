"""GU2Net, which the paper calls YOLO+: one landmark network for several datasets (docs/method.md, section 5).

Convolutions are separable: the depthwise 3x3 and the normalisation belong to a dataset (a "domain"), the pointwise
products, nearly all of the parameters, to all of them. A local U-Net sees the image at full size, a global network the
image and the local maps at a quarter of it, and a landmark is where both agree: the map is the product of two
probabilities. Images are brought to mean 0 and variance 1 first. With three datasets of 19, 37 and 6 landmarks and
width 64 this has the 4,381,052 parameters of the original; smaller widths are its relatives. Written from its
description (Zhu et al., MICCAI 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_lmk.config import GU2NetConfig
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.models.blocks import PointwiseConv2d
from ddpm_lmk.system.accelerator import to_device

DILATIONS = (1, 2, 5, 2, 1)
REDUCTION = 4  # the global network works at 1/4 of the image side


class PerDomain(nn.ModuleList):
    """One module per dataset; every call names the one to use."""

    def __init__(self, count: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__(make(index) for index in range(count))

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self[domain](x)


class SeparableBlock(nn.Module):
    """Depthwise 3x3 of a domain, pointwise of all, normalisation of a domain, LeakyReLU."""

    def __init__(self, channels_in: int, channels_out: int, domains: int) -> None:
        super().__init__()
        self.depthwise = PerDomain(
            domains, lambda _: nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in)
        )
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1)
        self.norm = PerDomain(domains, lambda _: nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return F.leaky_relu(self.norm(self.pointwise(self.depthwise(x, domain)), domain), 0.01)


class DoubleBlock(nn.Module):
    """Two separable blocks."""

    def __init__(self, channels_in: int, channels_out: int, domains: int, *, between: int | None = None) -> None:
        super().__init__()
        between = between or channels_out
        self.first = SeparableBlock(channels_in, between, domains)
        self.second = SeparableBlock(between, channels_out, domains)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.second(self.first(x, domain), domain)


class LocalNet(nn.Module):
    """A U-Net of four halvings and separable blocks: [B, 1, S, S] -> [B, width, S, S]."""

    def __init__(self, width: int, domains: int) -> None:
        super().__init__()
        channels = [width * factor for factor in (1, 2, 4, 8, 8)]
        self.stem = PerDomain(domains, lambda _: PointwiseConv2d(1, width))
        self.enter = DoubleBlock(width, width, domains)
        self.downs = nn.ModuleList(DoubleBlock(inner, outer, domains) for inner, outer in pairwise(channels))
        given = [*channels[-3::-1], width]  # what each way up hands on
        self.ups = nn.ModuleList(
            DoubleBlock(2 * skip, out, domains, between=skip) for skip, out in zip(channels[-2::-1], given, strict=True)
        )

    def forward(self, x: Tensor, domain: int) -> Tensor:
        x = self.enter(self.stem(x, domain), domain)
        skips = []
        for block in self.downs:
            skips.append(x)
            x = block(F.max_pool2d(x, 2), domain)
        for block in self.ups:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = block(torch.cat((skip, x), dim=1), domain)
        return x


class GlobalNet(nn.Module):
    """Dilated convolutions over the image and the local maps at a quarter of the side; each domain has its own."""

    def __init__(self, width: int, landmarks: Sequence[int]) -> None:
        super().__init__()
        domains = len(landmarks)
        self.see_image = PerDomain(domains, lambda _: nn.Conv2d(1, width, 3, padding=1))
        self.see_local = PerDomain(domains, lambda d: nn.Conv2d(landmarks[d], width, 3, padding=1))
        self.dilated = PerDomain(domains, lambda _: nn.Sequential(*(_dilated(2 * width, step) for step in DILATIONS)))

    def forward(self, image: Tensor, local: Tensor, domain: int) -> Tensor:
        """[B, 1, S, S] and [B, N, S, S] probabilities -> [B, 2 width, S/4, S/4]."""
        # Every fourth pixel, not a mean of 16: as published, and it keeps thin bone edges.
        small_image, small_local = image[..., ::REDUCTION, ::REDUCTION], local[..., ::REDUCTION, ::REDUCTION]
        x = torch.cat((self.see_image(small_image, domain), self.see_local(small_local, domain)), dim=1)
        return self.dilated(x, domain)


class GU2Net(nn.Module):
    """Images [B, 1, S, S] and domains [B] -> logits [B, N, S, S], N the landmarks of all domains, one after the other.

    The logit is that of the product of the local and the global probability. Maps of landmarks that an image's domain
    does not have are 0. S must be a multiple of 16, else ConfigError. The output layers are `final_conv`.
    """

    side_multiple = 16

    def __init__(self, cfg: GU2NetConfig, *, domains: Sequence[int]) -> None:
        super().__init__()
        self.landmarks = tuple(domains)
        self.starts = (0, *accumulate(domains))
        count = len(self.landmarks)
        self.local_net = LocalNet(cfg.width, count)
        self.global_net = GlobalNet(cfg.width, self.landmarks)
        self.final_conv = nn.ModuleDict(
            {
                "near": PerDomain(count, lambda d: nn.Conv2d(cfg.width, self.landmarks[d], 1)),
                "far": PerDomain(count, lambda d: nn.Conv2d(2 * cfg.width, self.landmarks[d], 1)),
            }
        )

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """`domain` [B] lies in host memory; None: every image is of the first."""
        if x.shape[-1] % self.side_multiple or x.shape[-2] % self.side_multiple:
            raise ConfigError(
                f"images are {x.shape[-1]} x {x.shape[-2]} pixels; set data.image_size to a multiple of "
                f"{self.side_multiple} for model.kind=gu2net"
            )
        x = _normalized(x)
        found = [0] if domain is None else domain.unique().tolist()
        if len(found) == 1 and len(self.landmarks) == 1:
            return self._maps(x, 0)
        # One pass per domain: its norms and depthwise kernels see only images of their own.
        maps: Tensor | None = None
        for index in found:
            rows = None if domain is None else to_device((domain == index).nonzero().squeeze(1), x.device)
            part = self._maps(x if rows is None else x.index_select(0, rows), index)
            wide = F.pad(part, (0, 0, 0, 0, self.starts[index], self.starts[-1] - self.starts[index + 1]))
            maps = wide.new_zeros(len(x), *wide.shape[1:]) if maps is None else maps
            maps = wide if rows is None else maps.index_copy(0, rows, wide)
        assert maps is not None
        return maps

    def _maps(self, x: Tensor, domain: int) -> Tensor:
        """Logits [B, N of the domain, S, S]."""
        near = self.final_conv["near"](self.local_net(x, domain), domain)
        far = self.final_conv["far"](self.global_net(x, near.sigmoid(), domain), domain)
        return logit_of_product(near, _enlarged(far))


def logit_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) sigmoid(b): odds are 1 / (e^-a + e^-b + e^-(a + b)). Computed in fp32 at least."""
    a, b = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (a, b))
    return -torch.logsumexp(torch.stack((-a, -b, -(a + b))), dim=0)


def _normalized(images: Tensor) -> Tensor:
    """Each image [B, 1, S, S] to mean 0 and variance 1; one without contrast to 0."""
    variance, mean = torch.var_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
    return (images - mean) * (variance + 1e-12).rsqrt()  # an all-black image stays 0 instead of becoming NaN


def _enlarged(x: Tensor) -> Tensor:
    """Each pixel 4 x 4 times, by repetition (not by `interpolate`, whose compiled gradient is zero under autocast)."""
    return x.repeat_interleave(REDUCTION, dim=-2).repeat_interleave(REDUCTION, dim=-1)


def _dilated(channels: int, dilation: int) -> nn.Sequential:
    """A dilated 3x3 convolution that keeps the size, normalisation, ReLU."""
    conv = nn.Conv2d(channels, channels, 3, dilation=dilation, padding=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
