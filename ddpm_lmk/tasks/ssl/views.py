"""Random views of images for self-supervised learning, made on the device the images are on.

Every draw is a function of `(seed, position, number of the view)`, like all randomness here, so a resumed run and any
micro-batch see the same views. The operations are those of torchvision's transforms as the papers use them (random
resized crop, mirroring, brightness and contrast in random order, Gaussian blur, solarization at one half).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ddpm_lmk.config.task import EncoderTaskConfig, ViewConfig
from ddpm_lmk.data.loading.order import keyed_uniform
from ddpm_lmk.system.accelerator import to_device

TRIES = 10  # of a crop's area and shape, before the whole image is taken
RATIO = (3 / 4, 4 / 3)
AREA, SHAPE = slice(0, TRIES), slice(TRIES, 2 * TRIES)
LEFT, TOP, FLIP, JITTER, BRIGHTNESS, CONTRAST, ORDER, BLUR, SIGMA, SOLARIZE = range(2 * TRIES, 2 * TRIES + 10)
COLUMNS = 2 * TRIES + 10

Floats = NDArray[np.float64]


def draw_views(
    cfg: EncoderTaskConfig, images: Tensor, positions: Tensor, *, seed: int, stream: str = "view"
) -> list[Tensor]:
    """Views of `images` `[B, 1, S, S]` in [0, 1], in the order of `cfg.views`: one `[B, 1, s, s]` each.

    Args:
        positions: `[B]` in host memory, the keys.
        stream: names the purpose, so that an evaluation draws others.
    """
    keys = positions.numpy()  # in host memory: nothing waits for the device
    if cfg.drawn == "micro_batch":
        keys = np.full_like(keys, keys[0])
    kinds = [view for view in cfg.views for _ in range(view.count)]
    return [
        make_view(view, images, keyed_uniform(seed, f"{stream}-{number}", keys, COLUMNS))
        for number, view in enumerate(kinds)
    ]


def make_view(view: ViewConfig, images: Tensor, u: Floats) -> Tensor:
    """One view of each image, from uniform numbers `u` `[B, COLUMNS]`."""

    def column(values: Floats) -> Tensor:
        return to_device(torch.from_numpy(values.astype(np.float32)), images.device).view(-1, 1, 1, 1)

    size = view.size or images.shape[-1]
    matrix = to_device(torch.from_numpy(crop_matrix(view, u).astype(np.float32)), images.device)
    grid = F.affine_grid(matrix, [len(images), 1, size, size], align_corners=False)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    is_toned = u[:, JITTER] < view.jitter
    brightness = column(np.where(is_toned, 1 + (2 * u[:, BRIGHTNESS] - 1) * view.brightness, 1.0).clip(min=0))
    contrast = column(np.where(is_toned, 1 + (2 * u[:, CONTRAST] - 1) * view.contrast, 1.0).clip(min=0))
    # torchvision draws the order of its tone changes; both are cheap enough to be computed.
    first = _contrasted(_brightened(x, brightness), contrast)
    second = _brightened(_contrasted(x, contrast), brightness)
    x = torch.where(column(u[:, ORDER]) < 0.5, first, second)
    if view.blur:
        low, high = view.blur_sigma
        sigma = np.where(u[:, BLUR] < view.blur, low + (high - low) * u[:, SIGMA], 0.0)
        x = blurred(x, sigma, radius=math.ceil(4 * high))
    is_solar = column(np.where(u[:, SOLARIZE] < view.solarize, 1.0, 0.0))
    return torch.where((is_solar > 0) & (x >= 0.5), 1 - x, x)


def crop_matrix(view: ViewConfig, u: Floats) -> Floats:
    """`[B, 2, 3]` in normalised coordinates: pixels of the view to pixels of the image.

    As torchvision's RandomResizedCrop: area uniform, ratio of the sides log-uniform; the first of ten that fits.
    """
    area = view.crop[0] + (view.crop[1] - view.crop[0]) * u[:, AREA]
    ratio = np.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * u[:, SHAPE])
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)  # [B, TRIES], shares of the side
    fits = (width <= 1) & (height <= 1)
    chosen = fits.argmax(1)
    rows = np.arange(len(u))
    width = np.where(fits.any(1), width[rows, chosen], 1.0)
    height = np.where(fits.any(1), height[rows, chosen], 1.0)
    left, top = (1 - width) * u[:, LEFT], (1 - height) * u[:, TOP]
    matrix = np.zeros((len(u), 2, 3))
    matrix[:, 0, 0] = np.where(u[:, FLIP] < view.flip, -width, width)
    matrix[:, 1, 1] = height
    matrix[:, 0, 2], matrix[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    return matrix


def blurred(x: Tensor, sigma: Floats, *, radius: int) -> Tensor:
    """Each image of `x` `[B, 1, h, w]` with its own Gaussian, reflected at the border; sigma 0 leaves it as it is."""
    offsets = np.arange(-radius, radius + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kernel = np.where(
            sigma[:, None] > 0, np.exp(-(offsets**2) / (2 * np.square(sigma[:, None]))), (offsets == 0) * 1.0
        )
    kernel /= kernel.sum(1, keepdims=True)
    weight = to_device(torch.from_numpy(kernel.astype(np.float32)), x.device)  # [B, K]
    one = F.pad(x.transpose(0, 1), (radius, radius, radius, radius), mode="reflect")  # [1, B, ., .]
    one = F.conv2d(one, weight[:, None, None, :], groups=len(x))
    return F.conv2d(one, weight[:, None, :, None], groups=len(x)).transpose(0, 1)


def _brightened(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def _contrasted(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)
