"""Executes drawn changes on pixels, with torch, on the device the pixels are on.

One implementation for CPU and GPU: bilinear sampling at half-pixel centres with a replicated border. On the CPU images
are done one by one: one image stays in the cache (at 256 px, 32 at once take 2.8 times as long) and its bits cannot
depend on the batch it is in. What to change is decided in `augment`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_lmk.data.augment import Changes, invert
from ddpm_lmk.data.order import keyed_seed

Intensity = Literal["per_image", "full_range"]


def develop(raw: Tensor, changes: Changes, *, seed: int, positions: np.ndarray, intensity: Intensity) -> Tensor:
    """Network input `[B, 1, S, S]` float32 in [0, 1] from pixels `[B, S, S]`: uint8, or uint16 bits as int16.

    Order, as the paper's: move, then scale to [0, 1]; after that gamma, contrast, brightness, noise, and a clamp.
    """
    if raw.device.type != "cpu":
        images = _develop(raw, changes, seed, positions, intensity)
        return images.contiguous(memory_format=torch.channels_last)
    is_changed = changes.is_moved | changes.is_toned
    images = torch.empty(len(raw), 1, *raw.shape[1:]).contiguous(memory_format=torch.channels_last)
    for i in range(len(raw)):
        one = slice(i, i + 1)
        images[one] = _develop(raw[one], changes[one] if is_changed[i] else None, seed, positions[one], intensity)
    return images


def warp(images: Tensor, changes: Changes) -> Tensor:
    """Move `images` `[B, 1, S, S]` float32 by the matrices; those that do not move keep their exact values."""
    moved = np.flatnonzero(changes.is_moved)
    if len(moved) == 0:
        return images
    index = torch.from_numpy(moved).to(images.device)
    grid = _sampling_grid(changes.matrix[moved], images.shape[-1], images.device)
    samples = F.grid_sample(
        images.index_select(0, index), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return images.index_copy(0, index, samples)


def _sampling_grid(matrix: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Where output pixels look, in grid_sample's coordinates, `[M, S, S, 2]` float32.

    With x = ((u + 1) S - 1) / 2 the centred coordinate is u S / 2: the linear part stays, only the offset changes.
    A position is a column's part plus a row's part; as complex numbers x + iy that is one contiguous addition, a tenth
    of the time of filling x and y in turn.
    """
    back = invert(matrix)
    centre = np.full(2, (size - 1) / 2)
    offset = (back[:, :, :2] @ centre + back[:, :, 2] - centre) * 2 / size
    u = (2 * np.arange(size) + 1) / size - 1
    columns = (back[:, 0, 0] + 1j * back[:, 1, 0])[:, None] * u
    rows = (back[:, 0, 1] + 1j * back[:, 1, 1])[:, None] * u + (offset[:, 0] + 1j * offset[:, 1])[:, None]
    column_part, row_part = (torch.from_numpy(part.astype(np.complex64)).to(device) for part in (columns, rows))
    return torch.view_as_real(column_part[:, None, :] + row_part[:, :, None])


def _develop(raw: Tensor, changes: Changes | None, seed: int, positions: np.ndarray, intensity: Intensity) -> Tensor:
    images = _as_float(raw)[:, None]
    if changes is not None:
        images = warp(images, changes)
    largest = 255.0 if raw.dtype == torch.uint8 else 65535.0
    images = _min_max(images) if intensity == "per_image" else images / largest
    return images if changes is None else _change_intensities(images, changes, seed, positions)


def _as_float(raw: Tensor) -> Tensor:
    """float32 of the pixels; torch has few kernels for uint16, so 16-bit pixels travel as int16 bits."""
    if raw.dtype == torch.int16:
        return (raw.to(torch.int32) & 0xFFFF).to(torch.float32)
    return raw.to(torch.float32)


def _min_max(images: Tensor) -> Tensor:
    """(x - min) / (max - min) per image (paper.md, section 2); an image of one value becomes 0, never NaN."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    span = high - low
    return (images - low) / torch.where(span > 0, span, torch.ones_like(span))


def _change_intensities(images: Tensor, changes: Changes, seed: int, positions: np.ndarray) -> Tensor:
    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(images.device).view(-1, 1, 1, 1)

    if not changes.is_toned.any():
        return images
    changed = images
    if (changes.gamma != 1).any():
        changed = changed ** column(changes.gamma)
    if (changes.contrast != 1).any():
        mean = changed.mean((1, 2, 3), keepdim=True)
        changed = mean + (changed - mean) * column(changes.contrast)
    if changes.brightness.any():
        changed = changed + column(changes.brightness)
    if changes.noise_std.any():
        changed = changed + column(changes.noise_std) * _noise(images, changes.noise_std, seed, positions)
    return changed.clamp(0, 1)


def _noise(images: Tensor, noise_std: np.ndarray, seed: int, positions: np.ndarray) -> Tensor:
    """Standard normal noise, each image's from its own generator; CPU and CUDA draw different numbers."""
    noise = torch.zeros_like(images)
    for index in np.flatnonzero(noise_std):
        generator = torch.Generator(images.device)
        generator.manual_seed(keyed_seed(seed, "augment/noise", int(positions[index])))
        noise[index] = torch.randn(images.shape[1:], generator=generator, device=images.device)
    return noise
