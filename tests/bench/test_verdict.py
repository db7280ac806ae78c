"""Two sides are compared where they measured alike; everything else is named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_lmk.bench import Result, read_result
from ddpm_lmk.bench.compare import compare_sides, conclude, open_side, summarise
from ddpm_lmk.bench.result import Stored
from ddpm_lmk.errors import ConfigError


def write(folder: Path, seconds: float, *, seed: int, noise: float = 0.01, **conditions: Any) -> Path:
    """A result of one row, of 12 rounds of about `seconds`."""
    result = Result("step", settings={})
    values = seconds * np.exp(noise * np.random.default_rng(seed).standard_normal(12))
    result.add("train step", {"cpu_s": values.tolist()}, conditions={"preset": "tiny", **conditions})
    return result.write(folder, f"{seed}")


def read(path: Path, **hardware: Any) -> Stored:
    """A file, as if its machine were steady, and another one where `hardware` says so."""
    facts = json.loads(path.read_text())
    facts["anchor_s"] = [1.0]
    facts["hardware"] |= hardware
    return Stored(path, facts)


def test_a_ratio_is_printed_where_the_noise_supports_it_and_refused_where_not(tmp_path: Path) -> None:
    slow, fast = read(write(tmp_path, 1.0, seed=1)), read(write(tmp_path, 0.8, seed=2))
    noisy = read(write(tmp_path, 0.95, seed=3, noise=0.3))

    [line], _ = compare_sides([slow], [fast])
    assert line.comparison.ratio == pytest.approx(1.25, rel=0.03)
    assert not line.is_better
    assert summarise([line], []).startswith("slower in 1 rows (most: train step preset tiny, 1.2")
    [line], _ = compare_sides([slow], [noisy])
    assert line.comparison.ratio is None
    assert str(line.comparison).startswith("not distinguishable")


def test_another_precision_is_named_and_not_compared(tmp_path: Path) -> None:
    fp32 = read(write(tmp_path, 1.0, seed=1, precision="fp32"))
    bf16 = read(write(tmp_path, 0.5, seed=2, precision="bf16"))

    lines, remarks = compare_sides([fp32], [bf16])
    assert lines == []
    assert "train step: not the same thing (precision fp32 and bf16): not compared" in remarks


def test_a_cpu_and_a_gpu_are_not_compared_by_processor_time(tmp_path: Path) -> None:
    here = read(write(tmp_path, 1.0, seed=1))
    there = read(write(tmp_path, 0.5, seed=2), device="cuda", device_name="a card")

    lines, remarks = compare_sides([here], [there])
    assert lines == []
    assert any("not compared" in remark for remark in remarks)
    assert "differs: hardware.device_name: None | a card" in remarks


@pytest.mark.parametrize(("load", "is_refused"), [(0.5, False), (64.0, True)])
def test_the_clock_of_a_busy_cpu_supports_no_ratio(load: float, is_refused: bool, tmp_path: Path) -> None:
    sides = []
    for seconds in (1.0, 3.0):
        result = Result("train", settings={})
        result.add("training", {"wall_s": [seconds] * 8})
        sides.append(read(result.write(tmp_path, f"{seconds}"), cores=2))
        sides[-1].facts["load_1_min_before_and_after"] = [load, load]

    [line], _ = compare_sides(sides[:1], sides[1:])
    assert (line.comparison.ratio is None) == is_refused
    assert not is_refused or "by the clock of a busy machine (load 64 and 64)" in str(line.comparison)


def test_every_earlier_result_is_compared_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lmk.bench.result.measure_anchor", lambda device: [1.0])  # whatever else runs here
    first, second = (write(tmp_path / name, 1.0, seed=number) for number, name in enumerate("ab"))
    result = Result("step", settings={})
    result.add("train step", {"cpu_s": [0.5] * 8}, conditions={"preset": "tiny"})

    path = conclude(result, tmp_path / "b", "new", earlier=[tmp_path / "a"])

    said = capsys.readouterr().err
    assert f"against {first.name}" in said
    assert f"against {second.name}" in said
    assert said.count("faster in 1 rows") == 2
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert read_result(path).rows[0].busy_s == [0.5] * 8


def test_a_folder_without_results_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no result"):
        open_side(tmp_path)
