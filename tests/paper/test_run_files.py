"""The values of configs/paper are the released code's, and `--diff` shows where our recipes differ."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from tests.cli.commands import CONFIGS, run_command

PAPER = CONFIGS / "paper"
SETS = ("chest", "cephalometric", "hand")

# place in docs/method.md, run file, key, the code's value
VALUES: list[tuple[str, str, str, Any]] = [
    ("0 fact 1", "*", "model.width", 256),
    ("6a 1", "*", "model.groups", 4),
    ("6a 1", "*", "model.multipliers", (1, 2, 4, 8)),
    ("6a 2", "*", "model.heads", 4),
    ("6a 2", "*", "model.head_dim", 32),
    ("6a 2", "*", "model.linear_attention", True),
    ("1", "*", "model.pixel_unshuffle", 1),
    ("1", "*", "model.checkpointing", True),
    ("2, 3", "*", "seed", 42),
    ("2, 3", "*", "train.precision", "fp32"),
    ("2, 3", "*", "train.epoch_boundary", "epoch"),
    ("2, 3", "*", "train.spikes", None),
    ("2, 3", "*", "data.image_size", 256),
    ("2, 3", "*", "data.intensity", "per_image"),
    ("2, 3", "*", "data.augment.probability", 0.5),
    ("2, 3", "*", "data.augment.shift", 0.02),
    ("2, 3", "*", "data.augment.rotate_deg", 2.0),
    ("3", "*", "data.require_dataset.aspect", "squeeze"),
    ("6a 4", "*", "data.require_dataset.convention", "paper"),
    ("2, 3", "*", "optim.betas", (0.9, 0.999)),
    ("2, 3", "*", "optim.eps", 1e-8),
    ("2, 3", "*", "optim.weight_decay", 0.01),
    ("2, 3", "*", "optim.decay_all", True),
    ("2, 3", "*", "optim.schedule", "constant"),
    ("2, 3", "*", "optim.warmup.count", 0),
    ("6a 3", "pretrain*", "data.splits", ("train", "val")),
    ("6a 5", "pretrain*", "data.augment.scale", 0.0),
    ("2", "pretrain*", "data.require_dataset.filter", "linear"),
    ("2", "pretrain*", "data.dedup.duplicates", "keep"),
    ("2", "pretrain*", "data.dedup.leakage", "keep"),
    ("2", "pretrain*", "task.schedule", "linear"),
    ("2", "pretrain*", "task.num_timesteps", 500),
    ("2", "pretrain*", "task.t_min", 1),
    ("2", "pretrain*", "task.target", "eps"),
    ("2", "pretrain*", "task.loss", "l2"),
    ("2", "pretrain*", "optim.lr", 1e-4),
    ("2", "pretrain*", "optim.clip.kind", "value"),
    ("2", "pretrain*", "optim.clip.limit", 1.0),
    ("2", "pretrain*", "train.gradient", "sum"),
    ("2", "pretrain*", "train.global_batch_size", 32),
    ("2", "pretrain*", "train.micro_batch", 4),
    ("2", "pretrain*", "train.ema.decay", 0.995),
    ("2", "pretrain*", "train.ema.warmup", False),
    ("6a 6", "pretrain_chest", "train.duration.count", 6000),
    ("6a 6", "pretrain_cephalometric", "train.duration.count", 8000),
    ("6a 6", "pretrain_hand", "train.duration.count", 8000),
    ("6a 7", "finetune*", "data.draw", "first"),
    ("0 fact 8", "finetune*", "data.validation_split", "val"),
    ("3", "finetune*", "data.require_dataset.filter", "gaussian"),
    ("3", "finetune*", "task.timestep", None),
    ("3", "finetune*", "task.views", 1),
    ("3", "finetune*", "optim.lr", 1e-5),
    ("3", "finetune*", "optim.clip", None),
    ("3", "finetune*", "optim.plateau.factor", 0.5),
    ("3", "finetune*", "optim.plateau.patience", 13),
    ("3", "finetune*", "optim.plateau.threshold", 1e-4),
    ("3", "finetune*", "train.duration.count", 200),
    ("3", "finetune*", "train.duration.unit", "epochs"),
    ("3", "finetune*", "train.gradient", "nominal"),
    ("3", "finetune*", "train.global_batch_size", 16),
    ("3", "finetune*", "train.micro_batch", 2),
    ("3", "finetune*", "train.ema", None),
    ("3", "finetune*", "train.patience", 27),
    ("3", "finetune*", "train.select", "best"),
    ("2", "finetune*", "init.use", "ema"),
    ("6a 5", "finetune_chest*", "data.augment.scale", 0.0),
    ("3", "finetune_cephalometric*", "data.augment.scale", 0.02),
    ("3", "finetune_hand*", "data.augment.scale_axes", "independent"),
    *(("3", f"finetune_{name}", "task.codec.kind", "disc") for name in SETS),
    *(("3", f"finetune_{name}", "task.codec.sigma_px", 5.0) for name in SETS),
    *(("3", f"finetune_{name}", "task.codec.masks", "warped") for name in SETS),
    ("3", "finetune_*_contour", "task.codec.kind", "contour"),
    ("3", "finetune_*_contour", "task.codec.pixel", "floor"),
    ("3", "finetune_*_contour", "task.codec.decode_radius_px", 0.0),
    ("5", "finetune_*_contour", "task.codec.ere_cut", 0.05),
]


def value(cfg: RunConfig, key: str) -> Any:
    found: Any = cfg
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@cache
def loaded(path: Path) -> RunConfig:
    return load_run(path, ["data.path=shards"])


@pytest.mark.parametrize("row", VALUES, ids=lambda row: f"{row[1]}-{row[2]} (docs/method.md {row[0]})")
def test_value(row: tuple[str, str, str, Any]) -> None:
    _, files, key, wanted = row
    paths = [path for path in PAPER.glob(f"{files}.yaml") if path.stem.startswith(("pretrain", "finetune"))]
    paths = [path for path in paths if loaded(path).model.kind == "ddpm_unet"]  # baselines: test_encoders
    assert paths
    assert {path.stem: value(loaded(path), key) for path in paths} == {path.stem: wanted for path in paths}


@pytest.mark.parametrize(
    ("ours", "paper", "keys"),
    [
        (
            "pretrain/base.yaml",
            "pretrain_hand.yaml",
            "data.splits data.augment.scale data.require_dataset.convention train.gradient train.epoch_boundary "
            "optim.clip.kind train.duration model.width train.precision task.target",
        ),
        (
            "finetune/base.yaml",
            "finetune_chest.yaml",
            "data.validation_split data.draw data.augment.scale data.require_dataset.convention task.codec.kind "
            "task.codec.masks task.timestep optim.lr optim.plateau.patience train.gradient train.patience "
            "train.select seed train.ema train.epoch_boundary",
        ),
    ],
)
def test_the_differences_from_our_recipes_are_listed(ours: str, paper: str, keys: str) -> None:
    command = "pretrain" if paper.startswith("pretrain") else "finetune"
    result = run_command(command, PAPER / paper, "--diff", CONFIGS / ours)
    assert result.code == 0, result.err
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip() and not line.startswith(" ")}
    assert set(keys.split()) <= set(rows)
    assert "mean over the batch; or the sum" in rows["train.gradient"]
