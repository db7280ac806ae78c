"""Augmentation of pixels: executes the changes that `augment` drew, with torch, on the device the pixels are on.

One implementation for CPU and GPU: bilinear sampling at half-pixel centres with a replicated border.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_lmk.data.loading.augment import Changes, invert
from ddpm_lmk.data.loading.order import keyed_seed
from ddpm_lmk.system.accelerator import to_device

Intensity = Literal["per_image", "full_range"]


def develop(raw: Tensor, changes: Changes, *, seed: int, positions: np.ndarray, intensity: Intensity) -> Tensor:
    """Network input `[B, 1, S, S]` float32 in [0, 1] from pixels `[B, S, S]`: uint8, or uint16 bits as int16.

    Order, as the paper's: move, then scale to [0, 1]; after that gamma, contrast, brightness, noise, and a clamp.
    """
    images = warp(_as_float(raw)[:, None].contiguous(memory_format=torch.channels_last), changes)
    for part in _parts(images):
        _to_unit_range(images[part], raw.dtype, intensity)
    return tone(images, changes, seed=seed, positions=positions)


def cut(raw: Tensor, back: Tensor, size: int, *, finer: int = 1, intensity: Intensity) -> Tensor:
    """A crop of each picture: `[B, 1, size, size]` float32 in [0, 1], channels-last, whose own extremes are 0 and 1.

    Args:
        raw: `[B, 1, F, F]` uint8, or uint16 bits as int16.
        back: `[B, 2, 3]` float64, pixels of the crop to pixels of the picture.
        finer: how many times finer it is sampled, a side, before that is averaged: what one crop pixel covers of the
            picture, or more, keeps the crop free of aliasing.
        intensity: as in `develop`; `per_image` takes the extremes of the crop.
    """
    count, side = len(raw), raw.shape[-1]
    crops = torch.empty(count, size, size, 1, device=raw.device).permute(0, 3, 1, 2)
    steps = (torch.arange(size * finer, dtype=torch.float64, device=raw.device) + 0.5) / finer - 0.5
    x, y = back.unbind(1)  # each [B, 3]; in grid_sample's coordinates, where -1 and 1 are the picture's borders
    columns = torch.complex(x[:, :1] * steps, y[:, :1] * steps) * (2 / side)
    rows = torch.complex(x[:, 1:2] * steps + x[:, 2:] + 0.5, y[:, 1:2] * steps + y[:, 2:] + 0.5) * (2 / side) - (1 + 1j)
    columns, rows = columns.to(torch.complex64), rows.to(torch.complex64)
    for part in _parts(crops):
        sampled = _sample(_as_float(raw[part]), columns[part], rows[part])
        crops[part] = F.avg_pool2d(sampled, finer) if finer > 1 else sampled
        _to_unit_range(crops[part], raw.dtype, intensity)
    return crops


def warp(images: Tensor, changes: Changes) -> Tensor:
    """Move `images` `[B, 1, S, S]` float32 in place; those that do not move keep their exact values."""
    moved = np.flatnonzero(changes.is_moved)
    if len(moved) == 0:
        return images
    columns, rows = _sampling_axes(changes.matrix[moved], images.shape[-1], images.device)
    if images.device.type == "cpu":
        for k, i in enumerate(moved.tolist()):
            images[i : i + 1] = _sample(images[i : i + 1], columns[k : k + 1], rows[k : k + 1])
        return images
    index = to_device(torch.from_numpy(moved), images.device)
    return images.index_copy_(0, index, _sample(images.index_select(0, index), columns, rows))


def tone(images: Tensor, changes: Changes, *, seed: int, positions: np.ndarray, stream: str = "augment") -> Tensor:
    """Change intensities of `images` `[B, 1, S, S]` in [0, 1], in place; those that keep theirs are not touched."""
    is_toned = changes.is_toned
    for part in _parts(images):
        if is_toned[part].any():
            images[part] = _tone(images[part], changes[part], seed, positions[part], stream)
    return images


def _parts(images: Tensor) -> list[slice]:
    # On the CPU one by one: an image stays in the cache (at 256 px, 16 at once took 2.4 times as long), and its bits
    # cannot depend on the batch it is in.
    return [slice(i, i + 1) for i in range(len(images))] if images.device.type == "cpu" else [slice(None)]


def _sampling_axes(matrix: np.ndarray, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where output pixels look, in grid_sample's coordinates: the part of each column and of each row, `[M, S]`.

    With x = ((u + 1) S - 1) / 2 the centred coordinate is u S / 2: the linear part stays, only the offset changes.
    A position is the sum of its column's and its row's part, both complex numbers x + iy.
    """
    back = invert(matrix)
    centre = np.full(2, (size - 1) / 2)
    offset = (back[:, :, :2] @ centre + back[:, :, 2] - centre) * 2 / size
    u = (2 * np.arange(size) + 1) / size - 1
    columns = (back[:, 0, 0] + 1j * back[:, 1, 0])[:, None] * u
    rows = (back[:, 0, 1] + 1j * back[:, 1, 1])[:, None] * u + (offset[:, 0] + 1j * offset[:, 1])[:, None]
    parts = (torch.from_numpy(part.astype(np.complex64)) for part in (columns, rows))
    column_part, row_part = (to_device(part, device) for part in parts)
    return column_part, row_part


def _sample(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    # One contiguous addition of complex numbers takes a tenth of the time of filling x and y in turn.
    grid = torch.view_as_real(columns[:, None, :] + rows[:, :, None])  # [M, S, S, 2]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _as_float(raw: Tensor) -> Tensor:
    """A fresh float32 copy of uint8, or of uint16 bits in int16 (see `pixels`)."""
    if raw.dtype == torch.int16:
        return (raw.to(torch.int32) & 0xFFFF).to(torch.float32)
    return raw.to(torch.float32)


def _to_unit_range(images: Tensor, stored: torch.dtype, intensity: Intensity) -> None:
    """Scale grey values that were stored as `stored` to [0, 1], in place."""
    if intensity == "per_image":
        _stretch(images)
    else:
        images /= 255.0 if stored == torch.uint8 else 65535.0


def _stretch(images: Tensor) -> None:
    """(x - min) / (max - min) per image (docs/method.md, section 2), in place; a constant image becomes 0."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    span = high - low
    images.sub_(low).div_(span + (span == 0))


def _tone(images: Tensor, changes: Changes, seed: int, positions: np.ndarray, stream: str) -> Tensor:
    def column(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values.astype(np.float32)), images.device).view(-1, 1, 1, 1)

    toned = images ** column(changes.gamma)
    mean = toned.mean((1, 2, 3), keepdim=True)
    toned = mean + (toned - mean) * column(changes.contrast) + column(changes.brightness)
    if changes.noise_std.any():
        toned += column(changes.noise_std) * _noise(images, changes.noise_std, seed, positions, stream)
    return toned.clamp_(0, 1)


def _noise(images: Tensor, noise_std: np.ndarray, seed: int, positions: np.ndarray, stream: str) -> Tensor:
    """Standard normal noise, each image's from its own generator; CPU and CUDA draw different numbers."""
    noise = torch.zeros_like(images)
    for index in np.flatnonzero(noise_std):
        generator = torch.Generator(images.device)
        generator.manual_seed(keyed_seed(seed, f"{stream}/noise", int(positions[index])))
        noise[index] = torch.randn(images.shape[1:], generator=generator, device=images.device)
    return noise
