"""Run files of the paper's baselines have the released values (docs/method.md, section 5), oddities included."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.config.load import load_run
from ddpm_lmk.engine.parallel import Parallel
from ddpm_lmk.run import execute
from tests.cli.commands import CONFIGS

METHODS = ("mocov3", "simclrv2", "dino")
OPERATIONS = ("crop", "flip", "jitter", "brightness", "contrast")

# run file, key, the released value
VALUES: list[tuple[str, str, Any]] = [
    *((name, key, value) for name in METHODS for key, value in (
        ("model.encoder", "densenet161"),
        ("model.scale", 1.0),
        ("model.blocks", None),
        ("model.in_channels", 3),
        ("data.image_size", 256),
        ("data.augment.probability", 0.0),
        ("data.splits", ("train", "val")),
        ("task.drawn", "micro_batch"),
        ("task.mean", 0.5),
        ("task.std", (0.229, 0.224, 0.225)),
        ("optim.lr", 1e-4),
        ("optim.weight_decay", 0.01),
        ("optim.schedule", "constant"),
        ("optim.clip", None),
        ("train.micro_batch", 4),
        ("train.global_batch_size", 32),
        ("train.gradient", "sum"),
        ("train.precision", "fp32"),
        ("train.duration.count", 10000),
        ("train.ema", None),
    )),
    ("mocov3", "task.projector", (2048, 2048, 256)),
    ("mocov3", "task.predictor", (2048, 256)),
    ("mocov3", "task.momentum", 0.999),
    ("mocov3", "task.momentum_schedule", "constant"),
    ("mocov3", "task.temperature", 0.5),
    ("mocov3", "task.loss_scale", "one"),
    ("simclrv2", "task.projector", (2208, 2208, 128)),
    ("simclrv2", "task.temperature", 0.5),
    ("dino", "task.head", (2048, 2048, 256)),
    ("dino", "task.prototypes", 256),
    ("dino", "task.student_temperature", 0.1),
    ("dino", "task.teacher_temperature", (0.5, 0.5)),
    ("dino", "task.center_momentum", 0.5),
    ("dino", "task.momentum", 0.996),
    ("dino", "task.momentum_schedule", "constant"),
    ("dino", "task.frozen", 0.0),
]  # fmt: skip


@cache
def run_file(method: str) -> RunConfig:
    return load_run(CONFIGS / "paper" / f"pretrain_{method}.yaml", ["data.path=x"])


@pytest.mark.parametrize(
    ("method", "key", "wanted"), VALUES, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_value(method: str, key: str, wanted: Any) -> None:
    found: Any = run_file(method)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == wanted


def test_views_are_the_released_ones() -> None:
    first, second = run_file("mocov3").task.views  # type: ignore[union-attr]
    assert [getattr(first, name) for name in OPERATIONS] == [(0.08, 1.0), 0.5, 0.8, 0.4, 0.4]
    assert (first.solarize, second.solarize, first.blur, first.blur_sigma) == (0.0, 0.2, 0.5, (0.1, 2.0))
    (both,) = run_file("simclrv2").task.views  # type: ignore[union-attr]
    assert [getattr(both, name) for name in OPERATIONS] == [(0.2, 1.0), 0.5, 0.8, 0.8, 0.8]
    crops = run_file("dino").task.views  # type: ignore[union-attr]
    assert [(view.count, view.size) for view in crops] == [(1, 224), (1, 224), (6, 96)]


@pytest.mark.parametrize("name", ["chest", "cephalometric", "hand"])
def test_baselines_are_fine_tuned_as_the_ddpm_is(name: str) -> None:
    """All but the network: loss, optimizer, batches, plateau and patience."""
    ddpm, baseline = (
        load_run(CONFIGS / "paper" / f"finetune_{name}{end}.yaml", ["data.path=x"]).model_dump()
        for end in ("", "_encoder")
    )
    assert {key for key in ddpm if ddpm[key] != baseline[key]} == {"name", "model"}
    assert baseline["model"]["encoder"] == "densenet161"
    assert baseline["model"]["decoder"] == (256, 128, 64, 32, 16)


HEADS = {
    "mocov3": ["task.projector=[16,8]", "task.predictor=[16,8]"],
    "simclrv2": ["task.projector=[16,8]"],
    "dino": ["task.head=[16,8]", "task.prototypes=8"],
}
SMALL = [
    "model.scale=0.125",
    "model.blocks=[1,1,1,1]",
    "data.image_size=32",
    "runtime.workers=0",
    "data.require_dataset.filter=null",
]


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_the_protocol_runs_at_a_small_size(method: str, packed_phantoms: Path, tmp_path: Path) -> None:
    """Pre-training with short last windows and gradient sums, then fine-tuning from its encoder, as in the tables."""
    words = [*SMALL, f"data.path={packed_phantoms}"]
    cfg = load_run(
        CONFIGS / "paper" / f"pretrain_{method}.yaml",
        [*words, *HEADS[method], "train.duration=4 steps", "train.global_batch_size=12"],
    )
    views = tuple(view.model_copy(update={"size": 32, "blur": 0.0}) for view in cfg.task.views)  # type: ignore[union-attr]
    cfg = cfg.model_copy(update={"task": cfg.task.model_copy(update={"views": views})})
    parallel = Parallel("cpu")
    results = execute(cfg, tmp_path / "run", parallel=parallel)
    assert results["train"]["images"] == 2 * (12 + 4)  # 16 images an epoch: windows of 12 and 4
    start = ["data.shots=3", "model.in_channels=3", "init.use=model", f"init.weights={tmp_path / 'run'}"]
    tuning = load_run(
        CONFIGS / "paper" / "finetune_cephalometric_encoder.yaml", [*words, *start, "train.duration=2 epochs"]
    )
    results = execute(tuning, tmp_path / "tuned", parallel=parallel)
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["parent"]["loaded"] == "encoder"
    assert results["protocols"]["paper"]["mre"] > 0
