"""Tiny finished runs to call commands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import SMOKE, Lmk, run_command


@pytest.fixture
def lmk() -> Lmk:
    """Calls a command and returns its exit code, standard output and standard error."""
    return run_command


@pytest.fixture(scope="session")
def pretrained(packed_phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke pre-training run. Do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    result = run_command("pretrain", SMOKE / "pretrain.yaml", "--cpu", 1, "--out", out, f"data.path={packed_phantoms}")
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="session")
def finetuned(packed_phantoms: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished smoke fine-tuning run from `pretrained`. Do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "finetune"
    words = (f"data.path={packed_phantoms}", f"init.weights={pretrained}")
    result = run_command("finetune", SMOKE / "finetune.yaml", "--cpu", 1, "--out", out, *words)
    assert result.code == 0, result.err
    return out
