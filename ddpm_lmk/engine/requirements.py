"""Settings of the engine that exclude one another, or need what is not installed or not on this device.

Importing this does not import torch.
"""

from __future__ import annotations

import importlib.util

from ddpm_lmk.config import RunConfig
from ddpm_lmk.errors import ConfigError, LaunchError


def check_exclusions(cfg: RunConfig, *, world: int, zero: int) -> None:
    """Raise `ConfigError` where the run asks for what cannot be kept together on so many processes."""
    share = cfg.train.global_batch_size // world
    if cfg.train.cuda_graphs and (zero or share > (cfg.train.given_micro_batch or share)):
        raise ConfigError(
            f"train.cuda_graphs=true with {f'ZeRO {zero}' if zero else 'several micro-batches'}: a replayed graph "
            "writes its gradients over those of the micro-batch before (pytorch#169545); use one micro-batch per "
            "process (train.micro_batch=null) and no ZeRO, or train.cuda_graphs=false"
        )
    if zero and cfg.train.exactness == "exact":
        raise ConfigError("train.exactness=exact cannot be kept with ZeRO, which adds in its own order; use ordered")
    if zero and cfg.optim.kind == "muon":
        raise ConfigError("optim.kind=muon needs whole matrices, of which ZeRO leaves a process a part; use adamw")
    if zero and cfg.data.propagate is not None:
        raise ConfigError(
            "data.propagate trains several runs one after the other in one process, where ZeRO shares out the state of "
            "one; use a launch file without zero"
        )
    if zero and cfg.train.weight_standardization == "step":
        raise ConfigError(
            "train.weight_standardization=step cannot be kept with ZeRO, which shares out gradients before they are "
            "those of weights; use auto or pass"
        )


def check_cuda_graphs(cfg: RunConfig, device: str) -> None:
    """Raise `LaunchError` for CUDA graphs on another device."""
    if cfg.train.cuda_graphs and device != "cuda":
        raise LaunchError(f"train.cuda_graphs=true, but this run is on {device}; use a GPU, or train.cuda_graphs=false")


def check_zero(zero: int, world: int) -> None:
    """Raise `LaunchError` where ZeRO is asked for and cannot be had."""
    if zero and importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("the launch file asks for ZeRO, found no DeepSpeed; pip install 'ddpm-lmk[deepspeed]'")
    if zero and world == 1:
        raise LaunchError("ZeRO shares the optimizer's state among processes, found one; use more, or zero: 0")


def check_trackers(cfg: RunConfig) -> None:
    """Raise `LaunchError` where a tracker is asked for and not installed."""
    for name in cfg.runtime.trackers:
        if importlib.util.find_spec(name) is None:
            raise LaunchError(f"runtime.trackers names {name}, which is not here; pip install 'ddpm-lmk[trackers]'")
