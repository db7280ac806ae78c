"""Completion by a shell: what the script that it installs asks of the program, and gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_lmk import cli

ROOT = Path(__file__).resolve().parents[2]
SMOKE = {f"configs/smoke/{name}.yaml" for name in ("finetune", "pretrain", "sweep")}
ASK = "import sys\nfrom ddpm_lmk import cli\ncode = cli.run([])\nassert 'torch' not in sys.modules\nsys.exit(code)\n"


def complete(words: str, cwd: Path) -> list[str]:
    """What bash offers for the last of these words."""
    asked = {"_DDPM_LMK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=cwd,
        env=os.environ | asked | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", "it would stand in the middle of the line"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted", "others"),
    [
        ("ddpm-lmk pre", {"pretrain", "predict"}, False),
        ("ddpm-lmk shards pa", {"pack"}, False),
        ("ddpm-lmk finetune --dr", {"--dry-run"}, False),
        (
            "ddpm-lmk pretrain configs/smoke/",
            SMOKE,
            False,
        ),
        ("ddpm-lmk pretrain mi", {"mine.yaml", "mine/"}, False),
        ("ddpm-lmk pretrain launch/x.yaml data.sh", {"data.shots=", "data.shuffle_window="}, False),
        (
            "ddpm-lmk sweep sweep.yaml --dry-run train.em",
            {"train.ema.decay=", "train.ema.warmup="},
            False,
        ),
        ("ddpm-lmk pretrain run.yaml ", {"data.", "seed=", "task."}, True),
    ],
)
def test_what_begins_so_is_offered(words: str, wanted: set[str], others: bool, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "mine").mkdir()
    found = set(complete(words, tmp_path))
    assert wanted <= found
    assert others or found == wanted


def test_help_says_how_to_install_it_below_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("--install-completion") > shown.index("shards")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_shown_for_the_usual_shells(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert cli.run(["--show-completion", shell]) == 0
    assert "_DDPM_LMK_COMPLETE" in capsys.readouterr().out
