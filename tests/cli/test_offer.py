"""What is offered where a run would take very long: a command whose data and weights fit its network."""

from __future__ import annotations

from pathlib import Path

from ddpm_lmk.cli.dry_run import smaller_run, smaller_sweep
from ddpm_lmk.config.load import load_run
from ddpm_lmk.sweep import load_sweep
from ddpm_lmk.system.shipped import shipped

CONFIGS = shipped("configs")
WORDS = ["data.path=shards/mine", "init.weights=runs/mine"]


def test_weights_are_offered_again_only_to_a_network_that_takes_them() -> None:
    small = load_run(CONFIGS / "finetune" / "isbi_cpu.yaml", WORDS)
    large = load_run(CONFIGS / "finetune" / "base.yaml", WORDS)
    command = "ddpm-lmk finetune configs/finetune/cpu.yaml data.path=shards/mine init.weights="

    assert (smaller_run(small, "finetune", Path("isbi_cpu.yaml"), "cpu") or "").endswith(f"{command}runs/mine")
    told = smaller_run(large, "finetune", Path("base.yaml"), "cpu") or ""
    assert f"{command}RUN, after a pre-training with configs/pretrain/cpu.yaml" in told
    assert "runs/mine" not in told


def test_a_sweep_of_a_large_network_is_offered_a_pretraining_for_the_small_one() -> None:
    file = CONFIGS / "sweep" / "base.yaml"
    told = smaller_sweep(load_sweep(file, ["data.path=shards/mine"]), file, "cpu", scale=None) or ""

    command = "ddpm-lmk sweep configs/sweep/cpu.yaml data.path=shards/mine start.pretrained=RUN"
    assert f"{command}, after a pre-training with configs/pretrain/cpu.yaml" in told


def test_on_a_gpu_nothing_is_offered() -> None:
    cfg = load_run(CONFIGS / "finetune" / "base.yaml", WORDS)
    assert smaller_run(cfg, "finetune", Path("base.yaml"), "cuda") is None
