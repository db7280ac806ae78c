"""Images drawn from a denoising model, shared out over all ranks, and the picture that shows them.

The noise an image starts from is a function of the run's seed and the image's number, so a sample keeps its place
whatever the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.loading.order import keyed_seed
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.system import files
from ddpm_lmk.system.accelerator import to_device
from ddpm_lmk.system.heartbeat import beat
from ddpm_lmk.tasks import DenoiseTask
from ddpm_lmk.tasks.noise_schedule import NUM_STEPS, ddim_sample

MARGIN_PX = 2


@torch.no_grad()
def draw_samples(
    cfg: RunConfig,
    task: DenoiseTask,
    model: nn.Module,
    parallel: Parallel,
    *,
    count: int,
    num_steps: int = NUM_STEPS,
    show: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Draw images by DDIM, uint8 `[count, S, S]`, the same on every rank; call on every rank.

    Args:
        num_steps: DDIM steps; at most as many as the model has timesteps.
        show: called with how many of this rank's passes are done, and of how many.
    """
    was_training = model.training
    model.eval()
    mine = list(range(parallel.rank, count, parallel.world))
    batches = [mine[start : start + cfg.evaluate.batch] for start in range(0, len(mine), cfg.evaluate.batch)]
    drawn: dict[int, np.ndarray] = {}
    steps, passes = min(num_steps, task.schedule.num_timesteps - 1), 0
    for part in batches:
        noise = to_device(torch.stack([_noise(cfg, number) for number in part]), parallel.device)
        with parallel.autocast(cfg.train.precision):
            for denoised in ddim_sample(model, task.schedule, noise, num_steps=steps, target=task.cfg.target):
                beat("sample")
                images = denoised
                passes += 1
                if show is not None:
                    show(passes, steps * len(batches))
        drawn |= dict(zip(part, (images.float() * 255).round().byte().cpu().numpy()[:, 0], strict=True))
    model.train(was_training)
    gathered = {number: image for part in parallel.gather(drawn) for number, image in part.items()}
    return np.stack([gathered[number] for number in range(count)])


def to_png(images: np.ndarray, path: Path) -> None:
    """Write images uint8 `[K, S, S]` as one nearly square sheet."""
    side = images.shape[-1] + MARGIN_PX
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = np.zeros((rows * side - MARGIN_PX, columns * side - MARGIN_PX), np.uint8)
    for number, image in enumerate(images):
        y, x = (side * place for place in divmod(number, columns))
        sheet[y : y + side - MARGIN_PX, x : x + side - MARGIN_PX] = image
    is_encoded, png = cv2.imencode(".png", sheet)
    assert is_encoded
    files.write_bytes(path, png.tobytes())


def _noise(cfg: RunConfig, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(keyed_seed(cfg.seed, "sample", number))
    return torch.randn((1, cfg.data.image_size, cfg.data.image_size), generator=generator)
