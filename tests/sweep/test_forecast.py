"""How long a sweep takes: what is left of it, shared out over its workers, and corrected by what runs really took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ddpm_lmk.config import RunConfig
from ddpm_lmk.data.spec import DatasetSpec
from ddpm_lmk.engine.forecast import Timing
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.launcher import Placement
from ddpm_lmk.launcher.placement import worker_environment
from ddpm_lmk.sweep import Sweep, forecast, load_sweep
from ddpm_lmk.sweep.expand import SweepRun
from ddpm_lmk.sweep.forecast import forecast_sweep, workers_per_device
from ddpm_lmk.sweep.progress import Remaining, span_s
from tests.sweep.sweeps import write_content, write_run

SECONDS = {"landmarks": 2.0, "denoise": 1.0}  # of an image


@pytest.fixture
def sweep(tmp_path: Path, packed_phantoms: Path) -> Sweep:
    """Eight cells of ten steps and a stage of fifty."""
    write_run(tmp_path / "run.yaml", packed_phantoms, duration="10 steps")
    write_run(tmp_path / "learn.yaml", packed_phantoms, kind="denoise", duration="50 steps")
    content = {"name": "s", "run": "run.yaml", "stages": {"p": {"run": "learn.yaml"}}, "set": {"evaluate.split": None}}
    grid = {"shots": [2, 3], "seeds": [0, 1], "start": {"scratch": None, "p": "stage:p"}}
    return load_sweep(write_content(tmp_path, content | {"grids": [grid]}), out=tmp_path / "out")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int, int | None]]:
    """Every call that times steps: the kinds of runs, how many processes side by side, and on how many GPUs."""
    calls: list[tuple[list[str], int, int | None]] = []

    def time_apart(runs: Sequence[RunConfig], *, processes: int, devices: int | None, **more: Any) -> list[Timing]:
        calls.append(([cfg.task.kind for cfg in runs], processes, devices))
        return [Timing(SECONDS[cfg.task.kind], 0.0, images=2, of=2, steps=3, start_s=5.0) for cfg in runs]

    monkeypatch.setattr(forecast, "time_apart", time_apart)
    return calls


def test_one_run_of_each_kind_is_timed_beside_the_others_there_will_be(
    sweep: Sweep, timed: list[tuple[list[str], int, int | None]]
) -> None:
    left = forecast_sweep(sweep, "cpu", workers=3)

    assert timed == [(["denoise"], 1, None), (["landmarks"], 3, None)]  # one stage, eight cells of one kind
    assert len(left.runs) == 9
    assert left.seconds()["stage p"] == 50 * 2 * 1.0
    assert left.seconds()["scratch-k2-s0"] == 10 * 2 * 2.0
    assert left.total_s == (5 + 100) + (5 + 3 * 40)  # eight cells on three workers are three in a row
    assert str(left) == "about 4 min here: 1 stage and 8 cells on 3 workers (from steps timed here)"


def test_workers_that_share_gpus_are_timed_on_those_they_share(
    sweep: Sweep, timed: list[tuple[list[str], int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_run(cfg: RunConfig, spec: DatasetSpec, placement: Placement, **more: Any) -> Timing | str:
        assert (placement, more["is_apart"]) == (Placement("cuda", 2), True)
        return Timing(1.0, 0.0, images=1, of=1, steps=3, processes=2)

    monkeypatch.setattr(forecast, "time_run", time_run)
    left = forecast_sweep(sweep, "cuda", workers=4, devices=2)

    assert timed == [(["landmarks"], 4, 2)]
    assert left.seconds()["stage p"] == 50 * 2 / 2  # a stage is shared out over both GPUs


def test_what_is_done_is_not_counted_and_what_was_begun_counts_from_its_checkpoint(
    sweep: Sweep, timed: list[tuple[list[str], int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SweepRun, "is_done", lambda run: run.name.startswith("scratch"))
    (sweep.stages[0].folder / "checkpoints" / "step-00000030").mkdir(parents=True)
    left = forecast_sweep(sweep, "cpu", workers=2)

    assert left.seconds() == {"stage p": 20 * 2.0, **{f"p-k{k}-s{s}": 40.0 for k in (2, 3) for s in (0, 1)}}
    assert left.rows() == [["stage p", "1", "40 s", "40 s"], ["p, 2, 3 labels", "4", "40 s", "3 min"]]


def test_where_the_device_is_not_here_nothing_is_known(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "time_apart", lambda runs, **more: ["no such device"] * len(runs))
    monkeypatch.setattr(forecast, "time_run", lambda cfg, spec, place, **more: "no such device")
    left = forecast_sweep(sweep, "cuda", workers=2)

    assert str(left) == "how long it takes is not known: no such device"
    assert left.rows()[0] == ["stage p", "1", "not known", "not known"]


def test_where_a_stage_takes_days_its_cells_are_not_timed(
    sweep: Sweep, timed: list[tuple[list[str], int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, "denoise", 7200.0)
    left = forecast_sweep(sweep, "cpu", workers=2)

    assert timed == [(["denoise"], 1, None)]
    assert left.unknown
    assert str(left).startswith("more than 8 days here: 1 stage and 8 cells on 2 workers (from steps timed here; not")


def test_jobs_go_to_whoever_is_free_first() -> None:
    assert span_s([3, 3, 2, 2, 2], 2) == 7
    assert span_s([4.0], 2, busy=[1.0, 3.0]) == 5
    assert span_s([], 2, busy=[1.0]) == 1


def test_what_runs_took_corrects_what_is_left(sweep: Sweep) -> None:
    seconds = {"stage p": 100.0, **{cell.name: 10.0 for cell in sweep.cells}}
    left = Remaining(sweep, seconds, workers=2, stages_at_once=2)
    assert left.seconds() == 100 + 4 * 10
    left.start("stage p")
    left.advance("stage p", 0.75)
    assert left.seconds() == 25 + 40

    left.end("stage p", 300.0)  # three times as long, against one forecast of 100 s that was right: twice
    assert left.seconds() == 80
    for name in ("scratch-k2-s0", "scratch-k2-s1"):
        left.start(name)
        left.advance(name, 0.5)
    assert left.seconds() == 10 + 3 * 20
    left.skip("scratch-k2-s0")  # failed
    assert left.seconds() == 70  # six wait for two workers, of which one is free at once and one in ten seconds


def test_without_a_forecast_the_first_cell_that_ends_tells_by_its_images(sweep: Sweep) -> None:
    left = Remaining(sweep, {}, workers=1, stages_at_once=1)
    left.skip("stage p")
    assert left.seconds() is None
    left.end("scratch-k2-s0", 30.0)
    assert left.seconds() == 7 * 30


def test_workers_of_a_trial_train_at_once_and_leave_nothing(sweep: Sweep, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    rate = forecast.measure_rate(sweep.cells[0], 2, device="cpu")
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
    monkeypatch.setattr(forecast, "measure_rate", lambda cell, count, device: rates[count])
    assert workers_per_device("auto", sweep, device="cpu", say=lambda text: None) == chosen


def test_a_number_of_workers_is_taken_as_it_is_and_anything_else_refused(sweep: Sweep) -> None:
    assert workers_per_device("3", sweep, device="cpu", say=print) == 3
    for wrong in ("0", "many", "-1"):
        with pytest.raises(ConfigError, match="wanted a number of workers, or auto"):
            workers_per_device(wrong, sweep, device="cpu", say=print)


def test_workers_of_a_sweep_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(slot: int) -> str:
        return worker_environment("cuda", slot, 4, devices=2)["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible(slot) for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")
    assert [visible(slot) for slot in range(4)] == ["5", "7", "5", "7"]
