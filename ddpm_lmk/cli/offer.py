"""What to type instead, where a run or a sweep would take very long on this machine."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.config.values import Stage
from ddpm_lmk.engine.forecast import LONG_S
from ddpm_lmk.launcher import Device
from ddpm_lmk.sweep import Sweep
from ddpm_lmk.sweep.file import scales_of
from ddpm_lmk.system.console import duration
from ddpm_lmk.system.shipped import shipped

FITTING = "cpu.yaml"  # in configs/pretrain, configs/finetune and configs/sweep
TOO_LONG = f"that is more than {duration(LONG_S)}"
PRETRAIN_FIRST = f", after a pre-training with configs/pretrain/{FITTING}, whose weights fit it"


def for_run(cfg: RunConfig, command: Stage, run_file: Path, device: Device) -> str | None:
    """The run file for a CPU and the command to type, for the same data and, if they fit, weights; None on a GPU."""
    if device != "cpu":
        return None
    if run_file.name == FITTING:
        return f"{TOO_LONG}; a smaller train.duration takes less"
    paths = cfg.data.path
    words = [f"data.path={paths[0] if len(paths) == 1 else '[' + ', '.join(paths) + ']'}"]
    if cfg.init.weights is None:
        return _offer(command, words)
    if _takes_weights_of(cfg):
        return _offer(command, [*words, f"init.weights={cfg.init.weights}"])
    return _offer(command, [*words, "init.weights=RUN"]) + PRETRAIN_FIRST


def for_sweep(sweep: Sweep, sweep_file: Path, device: Device, *, scale: str | None) -> str | None:
    """A smaller scale of the same file where it has one, else the sweep file for a CPU."""
    if device != "cpu":
        return None
    scales = scales_of(sweep_file) if scale is None else []
    if scales:
        command = shlex.join(["ddpm-lmk", "sweep", str(sweep_file), "--scale", scales[0]])
        return f"{TOO_LONG}; a variant of this file that fits a CPU: {command}"
    if sweep_file.name == FITTING:
        return f"{TOO_LONG}; fewer shots or seeds take less"
    words = [f"data.path={sweep.cells[0].cfg.data.path[0]}"]
    fitting = [cell.cfg.init.weights for cell in sweep.cells if cell.cfg.init.weights and _takes_weights_of(cell.cfg)]
    given = next((weights for weights in fitting if not sweep.makes(weights)), None)
    if given is not None:
        return _offer("sweep", [*words, f"start.pretrained={given}"])
    return _offer("sweep", [*words, "start.pretrained=RUN"]) + PRETRAIN_FIRST


def _takes_weights_of(cfg: RunConfig) -> bool:
    """Has the network of the run file for a CPU the shape of this run's, whose starting weights it would be given?"""
    return cfg.model == _fitting().model


@cache
def _fitting() -> RunConfig:
    return load_run(shipped("configs") / "finetune" / FITTING, ["data.path=."])


def _offer(command: str, words: list[str]) -> str:
    run_file = f"configs/{command}/{FITTING}"
    return f"{TOO_LONG}; a run file that fits a CPU: {shlex.join(['ddpm-lmk', command, run_file, *words])}"
