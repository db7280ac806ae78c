"""The forward and backward diffusion processes: schedules, `q_sample`, `p_sample`, and two samplers.

Timesteps are integers in [0, T); `alpha_bar[t]` is the share of signal power left after step t, so t = 0 is almost
clean and t = T - 1 almost noise. Sources: Ho et al. 2020 (DDPM; Eq. 2 and 4 are those of the paper this project
follows), Nichol & Dhariwal 2021 (cosine schedule), Song et al. 2021 (DDIM), Salimans & Ho 2022 (v-prediction).
Nothing here knows about networks, data or randomness keys: noise and timesteps come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

NUM_STEPS = 50  # passes of a sample drawn by DDIM

Target = Literal["eps", "x0", "v"]
Denoiser = Callable[[Tensor, Tensor], Tensor]

COSINE_OFFSET = 0.008  # keeps the first betas from vanishing (Nichol & Dhariwal 2021, section 3.2)
MAX_BETA = 0.999


class NoiseSchedule:
    """Betas and their running products, kept in float64 and handed out in float32 on the device of the images."""

    def __init__(
        self,
        kind: Literal["linear", "cosine"] = "linear",
        *,
        num_timesteps: int = 500,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        if kind == "linear":
            betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        else:
            betas = cosine_betas(num_timesteps)
        self.num_timesteps = num_timesteps
        self.betas = betas
        self.alpha_bar = torch.cumprod(1.0 - betas, dim=0)  # float64: 500 factors near 1 lose digits in fp32
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each `[B, 1, 1, 1]` float32, for timesteps `[B]`."""
        if t.device not in self._on_device:
            signal = self.alpha_bar.sqrt().float().to(t.device)
            noise = (1.0 - self.alpha_bar).sqrt().float().to(t.device)
            self._on_device[t.device] = (signal, noise)
        signal, noise = self._on_device[t.device]
        return signal[t].view(-1, 1, 1, 1), noise[t].view(-1, 1, 1, 1)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise `x_0` to timestep `t` in one jump (Eq. 2): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

        Args:
            x_0: clean images `[B, C, H, W]` in [0, 1].
            t: timesteps `[B]`, integers in [0, num_timesteps).
            eps: standard normal noise, the shape of `x_0`.
        """
        signal, noise = self.signal_and_noise(t)
        return signal * x_0 + noise * eps

    def regression_target(self, x_0: Tensor, t: Tensor, eps: Tensor, target: Target) -> Tensor:
        """What a network of kind `target` has to output for `q_sample(x_0, t, eps)`; the shape of `x_0`."""
        if target == "eps":
            return eps
        if target == "x0":
            return x_0
        signal, noise = self.signal_and_noise(t)
        return signal * eps - noise * x_0

    def x_0_and_eps(self, x_t: Tensor, t: Tensor, output: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Clean image and noise implied by a network's `output` at `x_t`; the inverse of `regression_target`."""
        signal, noise = self.signal_and_noise(t)
        if target == "eps":
            return (x_t - noise * output) / signal, output
        if target == "x0":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, noise * x_t + signal * output

    def p_sample(self, x_t: Tensor, t: int, eps_hat: Tensor, z: Tensor | None) -> Tensor:
        """One ancestral step from `t` to `t - 1` (Eq. 4), variance beta_t; `z` is standard normal, None adds none."""
        beta, alpha_bar = float(self.betas[t]), float(self.alpha_bar[t])
        mean = (x_t - beta / math.sqrt(1.0 - alpha_bar) * eps_hat) / math.sqrt(1.0 - beta)
        return mean if z is None else mean + math.sqrt(beta) * z


def cosine_betas(num_timesteps: int) -> Tensor:
    """Betas `[T]` float64 whose running product follows a squared cosine (Nichol & Dhariwal 2021, Eq. 17)."""
    steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    level = torch.cos((steps + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1.0 - level[1:] / level[:-1]).clamp(max=MAX_BETA)


@torch.no_grad()
def ddpm_sample(
    model: Denoiser, schedule: NoiseSchedule, x_t: Tensor, *, generator: torch.Generator, target: Target = "eps"
) -> Iterator[Tensor]:
    """Ancestral sampling from noise `x_t` `[B, C, H, W]`, t = T - 1 ... 1 as the released code; yields every state.

    The last state yielded is the image; values are not clipped.
    """
    for t in range(schedule.num_timesteps - 1, 0, -1):  # t = 0 was never trained on (t_min = 1)
        steps = torch.full((len(x_t),), t, device=x_t.device)
        _, eps_hat = schedule.x_0_and_eps(x_t, steps, model(x_t, steps), target)
        z = torch.randn(x_t.shape, generator=generator, device=x_t.device) if t > 1 else None
        x_t = schedule.p_sample(x_t, t, eps_hat, z)
        yield x_t


def ddim_timesteps(num_steps: int, num_timesteps: int) -> list[int]:
    """`num_steps` timesteps from the last down to 1, evenly spaced."""
    if not 1 <= num_steps < num_timesteps:
        raise ValueError(f"num_steps={num_steps}, wanted 1..{num_timesteps - 1}")
    return torch.linspace(num_timesteps - 1, 1, num_steps).round().long().tolist()


@torch.no_grad()
def ddim_sample(
    model: Denoiser, schedule: NoiseSchedule, x_t: Tensor, *, num_steps: int = NUM_STEPS, target: Target = "eps"
) -> Iterator[Tensor]:
    """Deterministic DDIM sampling (Song et al. 2021, eta = 0) over `num_steps` evenly spaced timesteps.

    Yields the estimate of x_0 at each. It is clipped to [0, 1], the range of the training images, before each jump.
    """
    timesteps = ddim_timesteps(num_steps, schedule.num_timesteps)
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        steps = torch.full((len(x_t),), t, device=x_t.device)
        x_0, _ = schedule.x_0_and_eps(x_t, steps, model(x_t, steps), target)
        x_0 = x_0.clamp(0, 1)
        yield x_0
        if t_next is None:
            return
        signal, noise = schedule.signal_and_noise(steps)
        eps_hat = (x_t - signal * x_0) / noise
        x_t = schedule.q_sample(x_0, torch.full_like(steps, t_next), eps_hat)
