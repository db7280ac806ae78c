"""Which precision a machine is given, and what is said of one that it only emulates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_lmk.config import RunConfig
from ddpm_lmk.engine import device_fit
from ddpm_lmk.inference.load import open_run

ROOT = Path(__file__).resolve().parents[2]
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
OLD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def run(wanted: str) -> RunConfig:
    """A run large enough for bf16."""
    data: dict[str, Any] = {"path": ["shards"], "image_size": 128}
    model = {"width": 32, "multipliers": (1, 2), "patch": 4, "checkpointing": False}
    return RunConfig.model_validate(
        {"name": "run", "data": data, "model": model, "task": {"kind": "denoise"}, "train": {"precision": wanted}}
    )


@pytest.fixture
def new_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with instructions for bf16, and nothing that keeps this process from them."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for name in RESTRICTIONS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, "bf16"),  # oneDNN reads the older name second
        ({"ONEDNN_MAX_CPU_ISA": "of another age"}, "bf16"),  # which oneDNN ignores
        ({"ATEN_CPU_CAPABILITY": "avx512"}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32"),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "fp32"),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "fp32"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "fp32"),
        (OLD, "fp32"),
    ],
)
@pytest.mark.usefixtures("new_processor")
def test_auto_honours_what_keeps_a_process_from_instructions(
    environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = device_fit.choose_precision(run("auto"), "cpu")
    assert found.name == wanted
    assert wanted == "bf16" or any(f"{name}={value}" in found.reason for name, value in environment.items())


def test_auto_is_fp32_on_a_gpu_that_would_emulate_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert device_fit.choose_precision(run("auto"), "cuda").name == wanted


def test_what_is_emulated_is_said_with_a_factor_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_fit, "times_fp32", lambda name: {"bf16": 9.1, "fp16": 27.4}[name])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    said = device_fit.emulation_warning(run("bf16"), "bf16", "cpu")
    assert said is not None
    for words in ("train.precision=bf16 is emulated here", "9 times as long as in fp32", "train.precision=auto"):
        assert words in said
    assert "27 times" in (device_fit.emulation_warning(run("fp16"), "fp16", "cpu") or "")
    begun = device_fit.emulation_warning(run("auto"), "bf16", "cpu")
    assert begun is not None, "a run that began elsewhere keeps its precision"
    assert begun.startswith("this run began in bf16 on another machine")


def test_nothing_is_said_of_what_is_fast_or_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_fit, "times_fp32", lambda name: 0.7)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert device_fit.emulation_warning(run("bf16"), "bf16", "cpu") is None, "a processor unknown to us that is fast"
    assert device_fit.emulation_warning(run("auto"), "fp32", "cpu") is None
    assert device_fit.emulation_warning(run("bf16"), "bf16", "cuda") is None


def test_a_run_says_so_before_its_first_step_and_is_used_in_fp32(
    packed_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--cpu", "1", "--out", str(tmp_path / "run"), f"data.path={packed_phantoms}", "train.precision=bf16"]
    command = [sys.executable, "-m", "ddpm_lmk.cli", "pretrain", str(ROOT / "configs/smoke/pretrain.yaml"), *words]
    environment = {**os.environ, **OLD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, _, _ = done.stderr.partition("step=1/4")
    assert "bf16 is emulated here" in before
    assert "train.precision=auto takes what is fast" in before
    for name, value in OLD.items():
        monkeypatch.setenv(name, value)
    assert open_run(tmp_path / "run", device="cpu").cfg.train.precision == "fp32"
