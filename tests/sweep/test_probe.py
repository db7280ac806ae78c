"""How many workers share a device: tried out with real workers, chosen by what they gain together."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_lmk.errors import ConfigError
from ddpm_lmk.launcher.placement import worker_environment
from ddpm_lmk.sweep import Sweep, load_sweep, probe

RUN = """
name: tiny
data: {{path: {data}, image_size: 32}}
runtime: {{workers: 0}}
model: {{width: 8, multipliers: [1, 2], heads: 2, head_dim: 8}}
task: {{kind: landmarks}}
train: {{duration: 900 steps, global_batch_size: 1, evaluate_every: 5 steps, select: best}}
"""


@pytest.fixture
def sweep(tmp_path: Path, packed_phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "run.yaml").write_text(RUN.format(data=packed_phantoms) + "init: {weights: nowhere}\n")
    text = "name: s\nrun: run.yaml\nset: {data.validation_split: val}\nshots: [2]\nseeds: [0]\n"
    (tmp_path / "sweep.yaml").write_text(text + "grids: [{start: {pretrained: not-there-yet}}]\n")
    return load_sweep(tmp_path / "sweep.yaml")


def test_two_workers_train_at_once_and_leave_nothing(sweep: Sweep, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    rate = probe.measure_rate(sweep.cells[0], 2, device="cpu")
    assert rate is not None
    assert rate > 0
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({1: 10.0, 2: 18.0, 4: 30.0}, 4),
        ({1: 10.0, 2: 18.0, 4: 18.5}, 2),
        ({1: 10.0, 2: 10.2}, 1),
        ({1: 10.0, 2: 12.0, 4: None}, 2),
    ],
)
def test_more_workers_have_to_pay(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, rates: dict[int, float | None], chosen: int
) -> None:
    monkeypatch.setattr(probe, "measure_rate", lambda cell, count, device: rates[count])
    assert probe.workers_per_device("auto", sweep, device="cpu", say=lambda text: None) == chosen


def test_a_number_is_taken_as_it_is_and_anything_else_refused(sweep: Sweep) -> None:
    assert probe.workers_per_device("3", sweep, device="cpu", say=print) == 3
    for wrong in ("0", "many", "-1"):
        with pytest.raises(ConfigError, match="wanted a number of workers, or auto"):
            probe.workers_per_device(wrong, sweep, device="cpu", say=print)


def test_workers_of_a_sweep_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(slot: int) -> str:
        return worker_environment("cuda", slot, 4, devices=2)["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible(slot) for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    assert [visible(slot) for slot in range(4)] == ["5", "7", "5", "7"]
