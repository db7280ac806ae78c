"""`ddpm-lmk bench --compare`: ratios with bounds, refusals, usage errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_lmk.bench import Result, read_results
from tests.cli.commands import SMOKE, Lmk


def write(folder: Path, seconds: float, *, noise: float) -> Path:
    """A result with one row of 12 values around `seconds`."""
    result = Result("step", settings={})
    spread = np.exp(noise * np.linspace(-1, 1, 12)[[0, 11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6]])
    result.add("train step", {"cpu_s": (seconds * spread).tolist()}, conditions={"precision": "fp32"})
    return result.write(folder, "tiny")


def test_compare_prints_a_ratio_with_bounds(lmk: Lmk, tmp_path: Path) -> None:
    slow, fast = write(tmp_path / "a", 10.0, noise=0.01), write(tmp_path / "b", 1.0, noise=0.01)

    result = lmk("bench", "--compare", slow, fast)
    assert result.code == 0, result.err
    assert "A over B" in result.out
    assert " x (" in result.out
    assert "not distinguishable" not in result.out


def test_compare_refuses_a_ratio_that_the_noise_does_not_support(lmk: Lmk, tmp_path: Path) -> None:
    write(tmp_path / "a", 1.0, noise=0.5)
    write(tmp_path / "b", 1.05, noise=0.5)

    result = lmk("bench", "--compare", tmp_path / "a", tmp_path / "b")
    assert result.code == 0, result.err
    assert "not distinguishable" in result.out
    assert " x (" not in result.out


def test_compare_of_what_is_no_result_is_a_usage_error(lmk: Lmk, tmp_path: Path) -> None:
    assert lmk("bench", "--compare", tmp_path, tmp_path).code == 2
    assert lmk("bench", "--compare", tmp_path / "nowhere.json", tmp_path).code == 2
    assert lmk("bench", "no-such-benchmark").code == 2


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(lmk: Lmk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = lmk("bench", "step", "--out", tmp_path / "file")
    assert result.code == 6
    assert "is a file" in result.err


@pytest.mark.slow
def test_bench_runs_a_benchmark_in_a_process_of_its_own(
    lmk: Lmk, packed_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SMOKE.parents[1]))
    words = ("--run", SMOKE / "pretrain.yaml", f"data.path={packed_phantoms}", "--steps", 8, "--device", "cpu")

    result = lmk("bench", "train", *words, "--out", tmp_path)
    assert result.code == 0, result.err
    [found] = read_results(tmp_path, "train")
    assert found.facts["settings"]["name"] == "smoke-pretrain"
